"""The whole way in one test: a service's transaction, the relay, Kafka, the consumer, a row in another database."""

import asyncio
import contextlib
from collections.abc import Iterator
from uuid import UUID, uuid4

import asyncpg
import pytest
from pydantic import BaseModel

import outbox
from outbox import DELETE, Cache, Consumer, Delete, Event, Key, Patch, Relay
from outbox.embedded import Databases
from outbox.settings import Settings
from outbox.upkeep import migrate
from tests.support.kafka_server import create_topic

QUICK = Settings(session_timeout_seconds=1.0, fetch_wait_seconds=0.01)
OWNER = "create table agents (id uuid primary key, name text not null)"
CACHE = """
create table workflow_agent_cache (agent_id uuid primary key, agent_name text not null, tags text[] not null);
select outbox.prepare_cache('workflow_agent_cache')
"""


class CachedAgent(BaseModel):
    agent_id: UUID
    agent_name: str
    tags: list[str] = []


class ChangedMindError(Exception):
    """The service's own reason to roll back."""


@pytest.fixture
def second_database(any_postgres: Databases) -> Iterator[str]:
    name = f"second_{uuid4().hex[:12]}"
    yield any_postgres.create_database(name)
    any_postgres.drop_database(name)


async def test_from_a_services_transaction_to_another_services_row(
    any_database: str, second_database: str, broker: str, topic: str
) -> None:
    """Read your own write through the cache: created, renamed, patched, rolled back, deleted."""

    class AgentEvent(Event, topic=topic):
        agent_id: Key[UUID]

    class AgentNamed(AgentEvent, type="agent.named"):
        agent_name: str

    class AgentTagged(AgentEvent, type="agent.tagged"):
        tags: list[str]

    class AgentDeleted(AgentEvent, type="agent.deleted"):
        pass

    agents = Cache(CachedAgent, table="workflow_agent_cache", key="agent_id", topic=topic)

    @agents.on
    def named(event: AgentNamed) -> CachedAgent:
        return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name)

    @agents.on
    def tagged(event: AgentTagged) -> Patch:
        return Patch(event.agent_id, tags=event.tags)

    @agents.on
    def deleted(_event: AgentDeleted) -> Delete:
        return DELETE

    async with (
        asyncio.timeout(60),
        asyncpg.create_pool(any_database, min_size=1) as owner,
        asyncpg.create_pool(second_database, min_size=1) as reader,
    ):
        await asyncio.gather(migrate.up(owner), migrate.up(reader), create_topic(broker, topic, partitions=3))
        await owner.execute(OWNER)
        await reader.execute(CACHE)
        ada, bob = uuid4(), uuid4()

        async with Relay(owner, broker), Consumer(reader, broker, agents, settings=QUICK):
            async with outbox.transaction(owner) as tx:
                for agent_id, name in ((ada, "Ada"), (bob, "Bob")):
                    await tx.execute("insert into agents values ($1, $2)", agent_id, name)
                    tx.emit(AgentNamed(agent_id=agent_id, agent_name=name))
            for agent_id, name in ((ada, "Ada"), (bob, "Bob")):
                row = await agents.wait_for(reader, agent_id, tx.receipt, timeout=30)
                assert row == CachedAgent(agent_id=agent_id, agent_name=name)

            async with outbox.transaction(owner) as tx:
                await tx.execute("update agents set name = 'Ada L.' where id = $1", ada)
                tx.emit(AgentNamed(agent_id=ada, agent_name="Ada L."))
                with contextlib.suppress(ChangedMindError):
                    async with outbox.transaction(tx) as inner:
                        await inner.execute("delete from agents where id = $1", bob)
                        inner.emit(AgentDeleted(agent_id=bob))
                        raise ChangedMindError
                tx.emit(AgentTagged(agent_id=ada, tags=["first"]))
            token = str(tx.receipt)  # as it comes back from a browser
            row = await agents.wait_for(reader, ada, token, timeout=30)
            assert row == CachedAgent(agent_id=ada, agent_name="Ada L.", tags=["first"])

            async with outbox.transaction(owner) as tx:
                await tx.execute("delete from agents where id = $1", ada)
                tx.emit(AgentDeleted(agent_id=ada))
            assert await agents.wait_for(reader, ada, tx.receipt, timeout=30) is None

            assert await agents.get_many(reader, [ada, bob]) == [CachedAgent(agent_id=bob, agent_name="Bob")]
        source = {row["id"]: row["name"] for row in await owner.fetch("select * from agents")}
        cached = await reader.fetch("select agent_id, agent_name from workflow_agent_cache")
        assert {row["agent_id"]: row["agent_name"] for row in cached} == source == {bob: "Bob"}
