"""A database that is away while the group rebalances, and records that Kafka deleted before they were applied."""

import logging
import time
from collections.abc import Iterator

import aiokafka
import asyncpg
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete

from outbox import Consumer, Pool
from outbox.consumer import State
from outbox.consumer.lanes import Lanes
from outbox.embedded import Postgres
from outbox.upkeep import migrate
from tests.integration.test_consumer import all_running, applied, cached, traffic
from tests.support.consumer_process import SETTINGS, CachedName, create_table, vocabulary
from tests.support.faults import eventually
from tests.support.handmade import MadePage, pages_of
from tests.support.kafka_server import RealKafka, create_topic
from tests.support.producing import LOG, produce

PARTITIONS = 4
EVENTS = 200
SEED = 11


@pytest.fixture
def server() -> Iterator[Postgres]:
    """A database server that the test may stop."""
    with Postgres() as own:
        yield own


@pytest.mark.timeout(300)
@pytest.mark.parametrize("away_seconds", [15.0, pytest.param(60.0, marks=pytest.mark.faults)])
async def test_the_database_is_away_during_a_rebalance(
    server: Postgres, broker: str, topic: str, away_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, members stay, and failures are as few as the backoff allows.

    Red without the pause in `Lanes._claim_until_running`: thousands of failures.
    """
    assignments: list[int] = []
    assigned = Lanes.assigned

    def counted(self: Lanes, partitions: list[aiokafka.TopicPartition]) -> None:
        assignments.append(len(list(partitions)))
        assigned(self, partitions)

    monkeypatch.setattr(Lanes, "assigned", counted)
    words = vocabulary(topic)
    events = traffic(words, EVENTS, SEED)
    await create_topic(broker, topic, partitions=PARTITIONS)
    url = server.create_database("outage")
    async with asyncpg.create_pool(url, min_size=1, max_size=8) as pool:
        await migrate.up(pool)
        await create_table(pool)
        async with Consumer(pool, broker, words.cache, settings=SETTINGS) as stays:
            async with Consumer(pool, broker, words.cache, settings=SETTINGS) as leaves:
                await all_running(stays, leaves, partitions=PARTITIONS)
                await produce(broker, topic, events[:100], window=1, partitions=PARTITIONS)
                await applied(pool, 100)
                before = len(assignments)
                server.shutdown()
                gone_at = time.monotonic()
                await produce(broker, topic, events[100:], window=2, partitions=PARTITIONS)
            await has_all(stays)

            async def back() -> bool:
                return time.monotonic() - gone_at >= away_seconds

            await eventually(back, what="the end of the outage", timeout_seconds=away_seconds + 10)
            membership = stays._membership
            assert membership is not None
            failures = membership.lanes.failures
            server.start()
            await applied(pool, EVENTS)
            assert await cached(pool) == sorted(words.cache.fold(events), key=by_agent)
            assert len(assignments) - before <= 4, "rebalances: the one for the member that left, and its neighbours"
            assert 1 <= failures <= PARTITIONS * 20, "claims, at 0.05 s, 0.1 s, ... 30 s"


def by_agent(row: CachedName) -> str:
    return str(row.agent_id)


async def has_all(consumer: Consumer) -> None:
    async def look() -> bool:
        return len(consumer.states) == PARTITIONS

    await eventually(look, what="the other member's partitions", timeout_seconds=40)


async def test_records_that_kafka_deleted_need_a_rebuild(
    log_pool: Pool, real_kafka: RealKafka, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Red when a claim does not compare the stored position with the log's start: what was lost is skipped silently."""
    caplog.set_level(logging.INFO, "outbox")
    servers = real_kafka.bootstrap_servers
    words = vocabulary(topic)
    events = traffic(words, 30, SEED)
    await create_table(log_pool)
    await create_topic(servers, topic, partitions=1)
    await produce(servers, topic, events[:10], window=1, partitions=1)
    async with Consumer(log_pool, servers, words.cache, settings=SETTINGS):
        await applied(log_pool, 10)
    await produce(servers, topic, events[10:20], window=2, partitions=1)
    await delete_before(servers, topic, 18)
    async with Consumer(log_pool, servers, words.cache, settings=SETTINGS) as consumer:

        async def halted() -> bool:
            return consumer.states.get((topic, 0)) is State.NEEDS_REBUILD

        await eventually(halted, what="the partition stands still", timeout_seconds=40)
        assert await log_pool.fetchrow("select next_offset, state from outbox.positions") == (10, "needs_rebuild")
        assert "deleted records that were not applied" in caplog.text
        rows = [row.model_dump(mode="json") for row in words.cache.fold(events[:20])]
        owner = await pages_of(log_pool, words.cache)
        await owner.merge(MadePage(LOG, "300000:300000:", rows), after=None, through=None)
        await log_pool.execute("update outbox.positions set state = 'restarting'")  # as `outbox cache rebuild` does
        await applied(log_pool, 20)
        assert await cached(log_pool) == sorted(words.cache.fold(events[:20]), key=by_agent)
        await produce(servers, topic, events[20:], window=4, partitions=1)
        await applied(log_pool, 30)
        assert await cached(log_pool) == sorted(words.cache.fold(events), key=by_agent)
        assert await log_pool.fetchval("select state from outbox.positions") == "running"


async def delete_before(servers: str, topic: str, offset: int) -> None:
    """As retention does."""
    admin = AIOKafkaAdminClient(bootstrap_servers=servers)
    await admin.start()
    try:
        at = aiokafka.TopicPartition(topic, 0)
        await admin.delete_records({at: RecordsToDelete(before_offset=offset)}, timeout_ms=10_000)
    finally:
        await admin.close()
    consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=servers)
    await consumer.start()
    try:

        async def gone() -> bool:
            return bool((await consumer.beginning_offsets([at]))[at] == offset)

        await eventually(gone, what="the records are gone")
    finally:
        await consumer.stop()
