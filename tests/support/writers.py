"""Writers that know the truth: each change of a key and the event that reports it commit together, or neither does.

The business table is the witness: `changes` holds what was committed, in the order of each key's row lock. What was
emitted and rolled back is remembered here, so that the checker can tell a phantom.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

import outbox
from outbox import Connection, Event, Key, Pool, postgres
from outbox.wire import Envelope
from tests.support.checker import History, TopicRecord, Verdict, judge
from tests.support.faults import eventually
from tests.support.history import TopicReader, read_changes, topic_reader

TABLES: Final = """
create table accounts (key text primary key, version integer not null default 0);
create table changes (key text not null, version integer not null, identity text primary key,
                      written_at timestamptz not null default clock_timestamp())
"""
CHANGE: Final = """
with up as (update accounts set version = version + 1 where key = $1 returning version)
insert into changes (key, version, identity) select $1, version, $2 from up
"""
CHANGES: Final = "select key, version, identity, null as row from changes"
MODES: Final[Mapping[str, int]] = {"plain": 6, "early": 3, "savepoint": 3, "rolled_back": 1, "several": 2}
"""How a transaction goes about it, with weights; "prepared" (2PC) is there for readings without a relay."""


def changed_event(topic: str) -> type[Event]:
    """An event class for a topic that a test made up."""

    class Changed(Event, topic=topic, type="account.changed"):
        key: Key[str]
        identity: str

    return Changed


class RolledBackError(Exception):
    """Raised by a writer that wants its transaction or savepoint undone."""


@dataclass(slots=True)
class Writers:
    """A workload on few keys, so that transactions wait for each other."""

    pool: Pool
    topic: str
    keys: Sequence[str] = tuple(f"key-{n}" for n in range(8))
    modes: Mapping[str, int] = field(default_factory=lambda: MODES)
    seed: int = 0
    rolled_back: set[str] = field(default_factory=set)
    happened: Counter[str] = field(default_factory=Counter)
    _event: Any = None

    async def set_up(self) -> None:
        """Create the tables and the keys."""
        await self.pool.execute(TABLES)
        await self.pool.executemany("insert into accounts (key) values ($1)", [(key,) for key in self.keys])

    async def run(self, *, writers: int, transactions: int) -> None:
        """So many transactions by each of so many writers at once."""
        tasks = [self._writer(number, transactions) for number in range(writers)]
        await asyncio.gather(*tasks)

    async def _writer(self, number: int, transactions: int) -> None:
        rng = random.Random(f"{self.seed}/{number}")
        for _ in range(transactions):
            mode = rng.choices(list(self.modes), list(self.modes.values()))[0]
            await self.write(rng, mode)

    async def write(self, rng: random.Random, mode: str = "plain", key: str | None = None) -> None:
        """One transaction; a deadlock or a lost connection is taken for what it is: nothing was committed, or all."""
        key = key or rng.choice(self.keys)
        try:
            async with self.pool.acquire() as connection:
                await getattr(self, f"_write_{mode}")(connection, rng, key)
        except RolledBackError:
            pass
        except postgres.CONNECTION_ERRORS:
            self.happened["connection lost"] += 1
            return
        self.happened[mode] += 1

    async def burst(self, events: int, key: str | None = None) -> None:
        """So many changes in one transaction."""
        async with outbox.transaction(self.pool) as tx:
            for n in range(events):
                await self.change(tx, key or self.keys[n % len(self.keys)])

    async def change(self, tx: outbox.Transaction, key: str) -> str:
        """Change one key and report it, in the caller's transaction."""
        identity = uuid4().hex
        await tx.execute(CHANGE, key, identity)
        tx.emit(self.event(key=key, identity=identity))
        return identity

    def event(self, **fields: str) -> Event:
        """An event of this workload."""
        if self._event is None:
            self._event = changed_event(self.topic)
        made: Event = self._event(**fields)
        return made

    # ---------------------------------------------------------------------------------------------- modes

    async def _write_plain(self, connection: Connection, _: random.Random, key: str) -> None:
        async with outbox.transaction(connection) as tx:
            await self.change(tx, key)

    async def _write_early(self, connection: Connection, _: random.Random, key: str) -> None:
        """Take a transaction id long before the row lock, as any first write of something else does."""
        async with outbox.transaction(connection) as tx:
            await tx.execute("select pg_current_xact_id()")
            await tx.execute("select pg_stat_clear_snapshot()")  # some round trips, in which others overtake
            await tx.execute("select count(*) from accounts")
            await self.change(tx, key)

    async def _write_savepoint(self, connection: Connection, rng: random.Random, key: str) -> None:
        async with outbox.transaction(connection) as tx:
            await self.change(tx, key)
            undone = connection.transaction()
            await undone.start()
            self.rolled_back.add(await self.change(tx, key))
            await undone.rollback()
            async with outbox.transaction(tx):
                await self.change(tx, rng.choice([k for k in self.keys if k >= key]))

    async def _write_rolled_back(self, connection: Connection, _: random.Random, key: str) -> None:
        async with outbox.transaction(connection) as tx:
            self.rolled_back.add(await self.change(tx, key))
            raise RolledBackError

    async def _write_several(self, connection: Connection, rng: random.Random, _: str) -> None:
        async with outbox.transaction(connection) as tx:
            for key in sorted(rng.sample(list(self.keys), k=min(3, len(self.keys)))):  # in order: no deadlocks
                await self.change(tx, key)

    async def _write_prepared(self, connection: Connection, _: random.Random, key: str) -> None:
        """In two phases, and through SQL emit, because asyncpg does not join a transaction begun by hand."""
        name, identity = uuid4().hex, uuid4().hex
        await connection.execute("begin")
        await connection.execute(CHANGE, key, identity)
        await connection.execute(
            "select outbox.emit('account.changed', $1, $2, jsonb_build_object('key', $2::text, 'identity', $3::text))",
            self.topic,
            key,
            identity,
        )
        await connection.execute(f"prepare transaction '{name}'")
        await connection.execute("select count(*) from accounts")
        await connection.execute(f"commit prepared '{name}'")

    # -------------------------------------------------------------------------------------------- judging

    async def published(self, reader: TopicReader) -> None:
        """Wait until every committed change is on the topic."""
        committed = {row["identity"] for row in await self.pool.fetch("select identity from changes")}

        async def look() -> bool:
            wanted = committed - await self.parked()
            if await reader.count() < len(wanted):
                return False
            return wanted <= {record.identity for record in await reader.records(identify)}

        await eventually(look, what=f"{len(committed)} changes on the topic or parked", timeout_seconds=60.0)

    async def parked(self) -> set[str]:
        """Identities that wait in parking."""
        rows = await self.pool.fetch(
            "select convert_from(payload, 'UTF8')::jsonb ->> 'identity' as identity from outbox.parked_events"
            " where topic = $1 and state <> 'released'",
            self.topic,
        )
        return {row["identity"] for row in rows}

    async def judge(self, servers: str, *, duplicates_max: int = 0) -> Verdict:
        """Wait until all is published, then compare the whole topic with the truth."""
        async with topic_reader(servers, self.topic) as reader:
            await self.published(reader)
            return await self.compare(await reader.records(identify), reader, duplicates_max=duplicates_max)

    async def compare(self, records: Sequence[TopicRecord], reader: TopicReader, *, duplicates_max: int = 0) -> Verdict:
        """Compare given records with the truth."""
        return judge(
            History(
                changes=await read_changes(self.pool, CHANGES),
                records=records,
                rolled_back=self.rolled_back,
                parked=await self.parked(),
                partition_of=reader.partition_of,
                duplicates_max=duplicates_max,
                happened=dict(self.happened),
            )
        )


def identify(_: Envelope, value: bytes) -> str:
    """The identity that `change` put into the payload."""
    return str(json.loads(value)["identity"])
