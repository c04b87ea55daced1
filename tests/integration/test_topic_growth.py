"""H15: a topic grows from 4 to 8 partitions under a relay and its consumers.

On Apache Kafka, because the embedded broker cannot.
"""

from uuid import UUID

import pytest

import outbox
from outbox import Consumer, Pool, Relay, limits
from outbox.relay.topics import Topics
from tests.support.consumer_process import SETTINGS, TABLE, Vocabulary, create_table, vocabulary
from tests.support.faults import eventually
from tests.support.kafka_server import RealKafka, create_topic, grow_topic

AGENTS = [UUID(int=number) for number in range(1, 41)]


async def emit(pool: Pool, words: Vocabulary, numbers: range) -> None:
    """Each agent is called by each number, in order."""
    for number in numbers:
        async with outbox.transaction(pool) as tx:
            for agent in AGENTS:
                tx.emit(words.named.model_validate({"agent_id": agent, "name": f"{number}"}))


async def handled(pool: Pool, count: int) -> None:
    async def look() -> bool:
        return bool(await pool.fetchval("select count(*) >= $1 from effects", count))

    await eventually(look, what=f"{count} effects", timeout_seconds=60)


async def grown(pool: Pool, servers: str, topic: str, caplog: pytest.LogCaptureFixture) -> dict[UUID, list[str]]:
    """What the inbox did for each agent, in order, before and after the topic grew while all of it ran."""
    words = vocabulary(topic)
    await create_table(pool)
    await create_topic(servers, topic, partitions=4)
    await create_topic(servers, f"{topic}-echoes")
    async with (
        Relay(pool, servers),
        Consumer(pool, servers, words.inbox, words.cache, group=topic, settings=SETTINGS) as consumer,
    ):
        await emit(pool, words, range(10))
        await handled(pool, 10 * len(AGENTS))
        await grow_topic(servers, topic, partitions=8)

        async def eight() -> bool:
            return len(consumer.states) == 8

        await eventually(eight, what="the consumer has the new partitions", timeout_seconds=60)
        await emit(pool, words, range(10, 15))
        # A relay that starts now sees eight partitions, and goes by what is pinned.
    async with (
        Relay(pool, servers),
        Consumer(pool, servers, words.inbox, words.cache, group=topic, settings=SETTINGS),
    ):
        await emit(pool, words, range(15, 20))
        await handled(pool, 20 * len(AGENTS))

        async def told() -> bool:
            return any("8 partitions and 4 are pinned" in message for message in caplog.messages)

        await eventually(told, what="an alarm")
    effects: dict[UUID, list[str]] = {}
    for row in await pool.fetch("select agent_id, name from effects order by id"):
        effects.setdefault(row["agent_id"], []).append(row["name"])
    return effects


@pytest.fixture(autouse=True)
def _looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOPICS_LOOK_SECONDS", 0.2)


async def test_h15_a_topic_grows(
    log_pool: Pool, real_kafka: RealKafka, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys keep their partitions, order is kept, and neither inbox nor cache counts anything twice."""
    effects = await grown(log_pool, real_kafka.bootstrap_servers, topic, caplog)
    assert effects == {agent: [f"{number}" for number in range(20)] for agent in AGENTS}
    assert {row["name"] for row in await log_pool.fetch(f"select name from {TABLE}")} == {"19"}
    twice = await log_pool.fetch("select agent_id, at from writes group by 1, 2 having count(*) > 1")
    assert twice == []
    used = await log_pool.fetch("select partition from outbox.positions where next_offset > 0 and topic = $1", topic)
    assert {row["partition"] for row in used} == {0, 1, 2, 3}


async def test_h15_without_the_pinned_count_keys_move(
    log_pool: Pool,
    real_kafka: RealKafka,
    topic: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rule taken out: a relay that starts reads Kafka's count instead. Half of the keys are in new partitions."""

    async def load_what_kafka_has(self: Topics) -> None:
        known = {row["topic"] for row in await self._pool.fetch("select topic from outbox.topics")}
        await self._producer.start()
        self._counts = {name: count for name in known if (count := await self._producer.partitions(name)) is not None}

    monkeypatch.setattr(Topics, "load", load_what_kafka_has)
    monkeypatch.setattr(Topics, "_compare", lambda *_: outbox.relay.topics.log.error("8 partitions and 4 are pinned"))
    await grown(log_pool, real_kafka.bootstrap_servers, topic, caplog)
    used = await log_pool.fetch("select partition from outbox.positions where next_offset > 0 and topic = $1", topic)
    assert {row["partition"] for row in used} > {0, 1, 2, 3}
