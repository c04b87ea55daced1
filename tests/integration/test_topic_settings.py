"""A relay and a consumer say once, at their start, what is unsafe about their topics; asking creates no topic."""

import pytest

from outbox import Consumer, Pool, Relay, kafka_admin
from outbox.settings import Settings
from tests.support.caching import create_table, make_cache
from tests.support.faults import eventually
from tests.support.kafka_server import RealKafka, create_topic
from tests.support.relay_process import QUICK

UNSAFE = {"cleanup.policy": "compact", "retention.ms": "1000", "max.message.bytes": "5000"}


async def test_facts_of_a_topic(broker: str, topic: str) -> None:
    await create_topic(broker, topic, partitions=2, settings={"cleanup.policy": "compact"})
    (facts,) = await kafka_admin.describe(broker, [topic, f"{topic}-missing"])
    assert (facts.topic, facts.replicas, facts.brokers) == (topic, 1, 1)
    assert facts.config["cleanup.policy"] == "compact"
    assert not await kafka_admin.describe(broker, [f"{topic}-missing"]), "not created by being asked for"


async def test_real_kafka_tells_all_that_is_judged(real_kafka: RealKafka, topic: str) -> None:
    servers = real_kafka.bootstrap_servers
    await create_topic(servers, topic, settings=UNSAFE)
    (facts,) = await kafka_admin.describe(servers, [topic])
    judged = {"min.insync.replicas", "unclean.leader.election.enable"}
    assert judged | UNSAFE.keys() <= facts.config.keys()
    assert await kafka_admin.max_message_bytes(servers, topic) == 5_000


async def test_a_relay_says_what_is_unsafe(
    log_pool: Pool, broker: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    await create_topic(broker, topic, settings={"cleanup.policy": "compact"})
    await log_pool.execute("insert into outbox.topics (topic, partition_count) values ($1, 1)", topic)
    async with Relay(log_pool, broker, settings=Settings(**QUICK)):

        async def said() -> bool:
            return f"topic {topic}: cleanup.policy=compact: a record that a stalled relay" in caplog.text

        await eventually(said, what="the finding")


async def test_a_consumer_says_what_is_unsafe(
    log_pool: Pool, broker: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    await create_topic(broker, topic, settings={"cleanup.policy": "compact"})
    await create_table(log_pool)
    cache = make_cache()
    cache.topic = topic  # type: ignore[misc]
    settings = Settings(session_timeout_seconds=1.0, fetch_wait_seconds=0.01, watermark_topic=f"marks-{topic}")
    async with Consumer(log_pool, broker, cache, settings=settings):

        async def said() -> bool:
            return f"topic {topic}: cleanup.policy=compact: compaction keeps a key's last record" in caplog.text

        await eventually(said, what="the finding")
