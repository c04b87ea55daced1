"""A consumer fills caches that have an owner by itself, beside live events through Kafka."""

import logging
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from outbox import Cache, Consumer, OwnerPage, Pool, Relay, SqlOwner, limits, transaction
from outbox.event import Event, Key
from outbox.settings import Settings
from tests.support.caching import TABLE, CachedAgent, rows
from tests.support.faults import eventually
from tests.support.kafka_server import create_topic
from tests.support.owning import QUERY, create_agents, owned

SETTINGS = Settings(session_timeout_seconds=6.0)


@pytest_asyncio.fixture
async def pool(log_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(limits, "OWNER_PAGE_ROWS", 10)
    monkeypatch.setattr(limits, "BOOTSTRAP_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(limits, "REBUILD_LEASE_SECONDS", 0.5)
    await create_agents(log_pool)
    await log_pool.execute("insert into agents select gen_random_uuid(), 'agent ' || n from generate_series(1, 95) n")
    return log_pool


def declared(topic: str, owner: SqlOwner) -> tuple[Cache[CachedAgent], type[Event]]:
    class Named(Event, topic=topic, type="agent.named"):
        agent_id: Key[UUID]
        agent_name: str

    cache = Cache(CachedAgent, table=TABLE, key="agent_id", topic=topic, owner=owner)

    def named(event: Named) -> CachedAgent:
        return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name)

    named.__annotations__ = {"event": Named, "return": CachedAgent}
    cache.on(named)
    return cache, Named


async def complete_log(pool: Pool) -> str | None:
    found: str | None = await pool.fetchval("select complete_log from outbox.caches where name = $1", TABLE)
    return found


async def test_the_consumers_of_a_group_fill_a_cache_once_and_again_for_a_new_log(
    pool: Pool, broker: str, topic: str
) -> None:
    pages, looks = 0, 0

    class Counting(SqlOwner):
        async def page(self, after: object | None, limit: int) -> OwnerPage:
            nonlocal pages, looks
            pages += limit > 1
            looks += limit == 1
            return await super().page(after, limit)

    await create_topic(broker, topic, partitions=2)
    cache, named = declared(topic, Counting(pool, QUERY))
    other, _ = declared(topic, Counting(pool, QUERY))
    async with (
        Relay(pool, broker, settings=SETTINGS),
        Consumer(pool, broker, cache, settings=SETTINGS),
        Consumer(pool, broker, other, settings=SETTINGS),
    ):
        async with transaction(pool) as tx:
            await tx.execute("insert into agents (id, name) values ($1, 'live')", key := uuid4())
            tx.emit(named(agent_id=key, agent_name="live"))

        async def equal() -> bool:
            return await complete_log(pool) is not None and await rows(pool) == await owned(pool)

        await eventually(equal, what="the cache is filled")
        before = looks

        async def looked() -> bool:
            return looks >= before + 6

        await eventually(looked, what="both consumers have looked again")
        assert pages == 10, "filled once, by one of them"
        assert await cache.wait_for(pool, key, tx.receipt, timeout=30) is not None
        ghost = uuid4()
        await pool.execute(f"insert into {TABLE} (agent_id, agent_name, tags) values ($1, 'ghost', '{{}}')", ghost)
        await pool.execute("update outbox.caches set complete_log = 'a-0000'")

        async def again() -> bool:
            return await equal() and ghost not in await rows(pool)

        await eventually(again, what="the cache is filled again, because it lacks a log")


async def test_an_owner_that_fails_stops_nobody(
    pool: Pool, broker: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="outbox.consumer.bootstrap")
    await create_topic(broker, topic, partitions=1)
    cache, named = declared(topic, SqlOwner(pool, "select id as agent_id from nowhere"))
    async with (
        Relay(pool, broker, settings=SETTINGS),
        Consumer(pool, broker, cache, settings=SETTINGS) as consumer,
    ):
        async with transaction(pool) as tx:
            tx.emit(named(agent_id=(key := uuid4()), agent_name="applied all the same"))
        assert await cache.wait_for(pool, key, tx.receipt, timeout=30) is not None

        async def told() -> bool:
            return "the owner's query fails" in caplog.text

        await eventually(told, what="the log says why")
        cache.owner = SqlOwner(pool, QUERY)  # type: ignore[misc]

        async def filled() -> bool:
            return await complete_log(pool) is not None

        await eventually(filled, what="mended, it is filled")
        consumer.stop()
        await consumer.run()
    assert key not in await rows(pool), "the owner never had it: its event was emitted without a row"
