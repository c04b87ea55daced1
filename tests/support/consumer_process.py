"""Consumers in processes of their own, which can be killed where a test says; run as a module with an order in JSON."""

import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any, Final
from uuid import UUID

import asyncpg
from pydantic import BaseModel

from outbox import DELETE, Cache, Consumer, Delete, Event, Inbox, Key, Patch, Transaction
from outbox.settings import Settings
from tests.support.faults import Fault, Injector, eventually

SETTINGS: Final = Settings(session_timeout_seconds=1.0, drain_timeout_seconds=5.0)
"""With which a test need not wait for a killed member."""
TABLE: Final = "agent_cache"
INBOX: Final = "agent_inbox"
_ROOT: Final = Path(__file__).parents[2]


class CachedName(BaseModel):
    agent_id: UUID
    name: str
    note: str = ""


@dataclass(frozen=True)
class Vocabulary:
    """Events, a cache and an inbox on a topic of the test's own."""

    named: type[Event]
    noted: type[Event]
    gone: type[Event]
    cache: Cache[CachedName]
    inbox: Inbox
    echoed: type[Event]


def vocabulary(topic: str) -> Vocabulary:
    """Declare them for a topic."""

    class AgentEvent(Event, topic=topic):
        agent_id: Key[UUID]

    class Named(AgentEvent, type="agent.named"):
        name: str

    class Noted(AgentEvent, type="agent.noted"):
        note: str

    class Gone(AgentEvent, type="agent.gone"):
        pass

    class Echoed(Event, topic=f"{topic}-echoes", type="agent.echoed"):
        agent_id: Key[UUID]
        name: str

    inbox = Inbox(INBOX, topic=topic)

    async def echo(tx: Transaction, event: Named) -> None:
        tx.emit(Echoed(agent_id=event.agent_id, name=event.name))
        await tx.execute("insert into effects (agent_id, name) values ($1, $2)", event.agent_id, event.name)

    echo.__annotations__["event"] = Named
    inbox.on(echo)
    cache = Cache(CachedName, table=TABLE, key="agent_id", topic=topic)

    def named(event: Named) -> CachedName:
        return CachedName(agent_id=event.agent_id, name=event.name)

    def noted(event: Noted) -> Patch:
        return Patch(event.agent_id, note=event.note)

    def gone(event: Gone) -> Delete:
        return DELETE

    for handler, event in ((named, Named), (noted, Noted), (gone, Gone)):
        handler.__annotations__["event"] = event
        cache.on(handler)
    return Vocabulary(Named, Noted, Gone, cache, inbox, Echoed)


async def create_table(db: "asyncpg.Pool[asyncpg.Record]") -> None:
    """The cache's table, and a history of each write to it that committed; a table for the inbox's effects."""
    await db.execute(
        f"""
        create table {TABLE} (agent_id uuid primary key, name text not null check (name <> 'forbidden'),
                              note text not null);
        create table effects (id bigint generated always as identity, agent_id uuid not null,
                              name text not null check (name <> 'forbidden'));
        create table writes (id bigint generated always as identity, agent_id uuid, at bigint);
        create function remember() returns trigger language plpgsql as $$ begin
            insert into writes (agent_id, at) values (new.agent_id, new.outbox_position); return null; end $$;
        select outbox.prepare_cache('{TABLE}');
        create trigger remember after insert or update on {TABLE} for each row execute function remember();"""
    )


@dataclass(frozen=True)
class Order:
    """What a process is to do."""

    url: str
    servers: str
    topic: str
    fault: dict[str, Any] | None = None
    inbox: bool = False


@dataclass
class ConsumerProcess:
    """One consumer."""

    process: "Popen[bytes]"

    async def died(self) -> int:
        """How it ended, once it has."""

        async def look() -> bool:
            return self.process.poll() is not None

        await eventually(look, what="the consumer ended")
        assert self.process.returncode is not None
        return self.process.returncode

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)


@contextmanager
def consumer_process(
    url: str, servers: str, topic: str, fault: Fault | None = None, *, inbox: bool = False
) -> Iterator[ConsumerProcess]:
    """A consumer of `vocabulary(topic)`, of its cache or of its inbox, killed at the end at the latest."""
    order = json.dumps(asdict(Order(url, servers, topic, asdict(fault) if fault else None, inbox)))
    with Popen([sys.executable, "-m", "tests.support.consumer_process", order], cwd=_ROOT) as process:
        try:
            yield ConsumerProcess(process)
        finally:
            process.kill()


async def _main(order: Order) -> None:
    if order.fault:
        Injector(Fault(**order.fault)).install()
    words = vocabulary(order.topic)
    target = words.inbox if order.inbox else words.cache
    async with (
        asyncpg.create_pool(order.url, min_size=1, max_size=4) as pool,
        Consumer(pool, order.servers, target, group=order.topic, settings=SETTINGS) as consumer,
    ):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
        await consumer.run()


if __name__ == "__main__":
    asyncio.run(_main(Order(**json.loads(sys.argv[1]))))
