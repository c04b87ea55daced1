"""Freshness through all of it: an owner's transaction, its relay, Kafka, the consumer, a row known to be fresh."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio
from pydantic import BaseModel

import outbox
from outbox import Cache, Consumer, Event, Key, Pool, Relay, Stale, StaleReason, kafka_admin
from outbox.consumer import watermarks
from outbox.embedded import Databases
from outbox.settings import Settings
from outbox.upkeep import migrate
from tests.support.faults import eventually
from tests.support.kafka_server import RealKafka, create_topic

CACHE = """
create table workflow_agent_cache (agent_id uuid primary key, agent_name text not null);
select outbox.prepare_cache('workflow_agent_cache')
"""


class CachedAgent(BaseModel):
    agent_id: UUID
    agent_name: str


@dataclass(slots=True)
class Services:
    """An owner and a service with a cache, each with a database of its own."""

    owner: Pool
    reader: Pool
    broker: str
    agents: Cache[CachedAgent]
    event: Any
    settings: Settings

    def relay(self) -> Relay:
        return Relay(self.owner, self.broker, settings=self.settings)

    def consumer(self) -> Consumer:
        return Consumer(self.reader, self.broker, self.agents, settings=self.settings)

    async def rename(self, agent_id: UUID, name: str) -> None:
        async with outbox.transaction(self.owner) as tx:
            tx.emit(self.event(agent_id=agent_id, agent_name=name))

    async def fresh(self, agent_id: UUID, within: float = 5.0) -> CachedAgent | None:
        """The row, once the cache knows that it is fresh."""
        row: CachedAgent | None = None

        async def look() -> bool:
            nonlocal row
            try:
                row = await self.agents.get(self.reader, agent_id, fresh_within=within)
            except Stale:
                return False
            return True

        await eventually(look, what=f"{agent_id} is known to be fresh")
        return row

    async def shows(self, agent_id: UUID, name: str) -> None:
        """Wait until the row has this name, and is known to be fresh."""

        async def look() -> bool:
            row = await self.fresh(agent_id, within=1.0)
            return row is not None and row.agent_name == name

        await eventually(look, what=f"{agent_id} is known to be {name}")

    async def stale(self, agent_id: UUID, within: float) -> Stale:
        """Why the row is not known to be fresh, once it is not."""

        async def look() -> Stale | None:
            try:
                await self.agents.get(self.reader, agent_id, fresh_within=within)
            except Stale as stale:
                return stale
            return None

        found = await eventually(look, what=f"{agent_id} is stale")
        assert found is not None
        return found


@pytest.fixture
def second_database(any_postgres: Databases) -> Iterator[str]:
    name = f"second_{uuid4().hex[:12]}"
    yield any_postgres.create_database(name)
    any_postgres.drop_database(name)


@pytest_asyncio.fixture
async def services(any_database: str, second_database: str, broker: str, topic: str) -> AsyncIterator[Services]:
    async with two_services(any_database, second_database, broker, topic) as made:
        yield made


@asynccontextmanager
async def two_services(owner_url: str, reader_url: str, servers: str, topic: str) -> AsyncIterator[Services]:
    class AgentNamed(Event, topic=topic, type="agent.named"):
        agent_id: Key[UUID]
        agent_name: str

    agents = Cache(CachedAgent, table="workflow_agent_cache", key="agent_id", topic=topic)

    @agents.on
    def named(event: AgentNamed) -> CachedAgent:
        return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name)

    settings = Settings(
        session_timeout_seconds=1.0,
        fetch_wait_seconds=0.01,
        lease_seconds=1.0,
        watermark_seconds=0.1,
        watermark_topic=f"marks-{topic}",
        max_clock_skew_seconds=0.1,
    )
    async with two_pools(owner_url, reader_url) as (owner, reader):
        await create_topic(servers, topic, partitions=3)
        await reader.execute(CACHE)
        yield Services(owner, reader, servers, agents, AgentNamed, settings)


@asynccontextmanager
async def two_pools(owner_url: str, reader_url: str) -> AsyncIterator[tuple[Pool, Pool]]:
    async with (
        asyncpg.create_pool(owner_url, min_size=1) as owner,
        asyncpg.create_pool(reader_url, min_size=1) as reader,
    ):
        await asyncio.gather(migrate.up(owner), migrate.up(reader))
        yield owner, reader


async def test_a_stopped_relay_is_noticed_although_the_consumer_has_no_lag(services: Services) -> None:
    """Fresh while a relay runs, whether or not anything happens; stale when it stops; fresh again with a successor."""
    agent = uuid4()
    async with services.consumer():
        async with services.relay():
            await services.rename(agent, "Ada")
            await services.shows(agent, "Ada")
            assert await services.fresh(uuid4()) is None
        stale = await services.stale(agent, within=1.0)
        assert stale.reason is StaleReason.BEHIND
        assert 1.0 < stale.lag_seconds < math.inf
        published = await services.owner.fetchval(
            "select sum(e.value::bigint) from outbox.shards s, jsonb_each(s.next_offsets) t, jsonb_each_text(t.value) e"
        )
        assert await services.reader.fetchval("select sum(next_offset) from outbox.positions") == published, "no lag"
        await services.rename(agent, "Ada L.")
        assert (await services.stale(agent, within=1.0)).lag_seconds > 1.0
        async with services.relay():
            await services.shows(agent, "Ada L.")


async def test_on_apache_kafka(real_kafka: RealKafka, postgres: Databases, database: str, topic: str) -> None:
    """The same with a broker that compacts and that creates topics only when asked; two tenures of the relay."""
    agent, name = uuid4(), f"second_{uuid4().hex[:12]}"
    try:
        url = postgres.create_database(name)
        async with two_services(database, url, real_kafka.bootstrap_servers, topic) as services, services.consumer():
            for version in ("Ada", "Ada L."):
                async with services.relay():
                    await services.rename(agent, version)
                    await services.shows(agent, version)
                assert (await services.stale(agent, within=0.3)).reason is StaleReason.BEHIND
            facts = await kafka_admin.describe(real_kafka.bootstrap_servers, [services.settings.watermark_topic])
            assert [fact.config["cleanup.policy"] for fact in facts] == ["compact"]
    finally:
        postgres.drop_database(name)


async def test_a_row_that_is_fresh_shows_what_was_committed_before(services: Services) -> None:
    """The promise itself: whatever had committed `fresh_within` ago is in the answer, at any moment, under load."""
    agent = uuid4()
    committed: list[tuple[float, int]] = []
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    async def write() -> None:
        for version in range(200):
            await services.rename(agent, str(version))
            committed.append((loop.time(), version))
        done.set()

    async with services.consumer(), services.relay():
        await services.rename(agent, "-1")
        await services.fresh(agent)
        writing = asyncio.create_task(write())
        answers = 0
        within = 0.5
        while not done.is_set() or not answers:
            asked = loop.time()
            try:
                row = await services.agents.get(services.reader, agent, fresh_within=within)
            except Stale:
                await asyncio.sleep(0)
                continue
            at_least = max((version for at, version in committed if at < asked - within), default=-1)
            assert row is not None or at_least < 0
            assert row is None or int(row.agent_name) >= at_least
            answers += 1
        await writing


async def test_every_process_of_a_group_may_follow(services: Services) -> None:
    """Two consumers of one group, of which one has no partition to read, write the same rows; either is enough."""
    agent = uuid4()
    async with services.relay():
        async with services.consumer(), services.consumer():
            await services.rename(agent, "Ada")
            await services.fresh(agent)
        async with services.consumer():
            await services.stale(agent, within=0.0)
            await services.fresh(agent, within=1.0)


async def test_a_missing_watermark_topic_is_waited_for(
    services: Services, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No relay of this version runs yet: nothing is known, nothing is logged, and the cache is fed all the same."""
    monkeypatch.setattr(watermarks, "_MISSING_TOPIC_MAX_SECONDS", 0.05)
    agent = uuid4()
    elsewhere = services.settings.model_copy(update={"watermark_topic": f"{services.settings.watermark_topic}-other"})
    async with services.consumer() as consumer:
        async with Relay(services.owner, services.broker, settings=elsewhere):
            await services.rename(agent, "Ada")

            async def fed() -> bool:
                return await services.agents.get(services.reader, agent) is not None

            await eventually(fed, what="the row")
            assert (await services.stale(agent, within=60.0)).reason is StaleReason.UNKNOWN
        assert consumer.totals.applied == 1
        assert "watermarks" not in caplog.text
        async with services.relay():
            await services.fresh(agent)
