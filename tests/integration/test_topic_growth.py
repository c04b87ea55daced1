"""H15: a topic grows from 4 to 8 partitions under a relay and its consumers.

On Apache Kafka, because the embedded broker cannot.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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


@asynccontextmanager
async def running(pool: Pool, servers: str, topic: str, words: Vocabulary) -> AsyncIterator[Consumer]:
    """A relay, and a consumer with an inbox and a cache."""
    targets = (words.inbox, words.cache)
    async with Relay(pool, servers), Consumer(pool, servers, *targets, group=topic, settings=SETTINGS) as consumer:
        yield consumer


async def grown(pool: Pool, servers: str, words: Vocabulary, topic: str) -> set[int]:
    """The partitions that are used after the topic grew while all of it ran, and the relay was started again."""
    await create_table(pool)
    await create_topic(servers, topic, partitions=4)
    await create_topic(servers, f"{topic}-echoes")
    async with running(pool, servers, topic, words) as consumer:
        await emit(pool, words, range(10))
        await handled(pool, 10 * len(AGENTS))
        await grow_topic(servers, topic, partitions=8)

        async def eight() -> bool:
            return len(consumer.states) == 8

        await eventually(eight, what="the consumer has the new partitions", timeout_seconds=60)
        await emit(pool, words, range(10, 15))
    async with running(pool, servers, topic, words):
        await emit(pool, words, range(15, 20))
        await handled(pool, 20 * len(AGENTS))
    return await used(pool, topic)


async def used(pool: Pool, topic: str) -> set[int]:
    """The partitions that have been read from."""
    rows = await pool.fetch("select partition from outbox.positions where next_offset > 0 and topic = $1", topic)
    return {row["partition"] for row in rows}


async def judge(pool: Pool, count: int) -> None:
    """By the inbox every agent was called by each number once, in order; in the cache it has the last one."""
    effects: dict[UUID, list[str]] = {}
    for row in await pool.fetch("select agent_id, name from effects order by id"):
        effects.setdefault(row["agent_id"], []).append(row["name"])
    assert effects == {agent: [f"{number}" for number in range(count)] for agent in AGENTS}
    assert {row["name"] for row in await pool.fetch(f"select name from {TABLE}")} == {f"{count - 1}"}
    assert await pool.fetch("select agent_id, at from writes group by 1, 2 having count(*) > 1") == []


async def test_h15_a_topic_grows(
    log_pool: Pool,
    real_kafka: RealKafka,
    topic: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Keys keep their partitions, order is kept, and neither inbox nor cache counts anything twice; an alarm.

    Then the way out that docs/operations.md describes: nothing in flight, everybody at the end, the new count.
    """
    monkeypatch.setattr(limits, "TOPICS_LOOK_SECONDS", 0.2)
    words, servers = vocabulary(topic), real_kafka.bootstrap_servers
    assert await grown(log_pool, servers, words, topic) == {0, 1, 2, 3}
    await judge(log_pool, 20)

    async def alarmed() -> bool:
        return any("8 partitions and 4 are pinned" in message for message in caplog.messages)

    async with running(log_pool, servers, topic, words):  # at the latest when a tenure begins
        await eventually(alarmed, what="the relay's log says that the topic has grown")
    await log_pool.execute("update outbox.topics set partition_count = 8 where topic = $1", topic)
    async with running(log_pool, servers, topic, words):
        await emit(log_pool, words, range(20, 25))
        await handled(log_pool, 25 * len(AGENTS))
    await judge(log_pool, 25)
    assert await used(log_pool, topic) > {0, 1, 2, 3}


async def test_h15_without_the_pinned_count_keys_move(
    log_pool: Pool, real_kafka: RealKafka, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule taken out: a relay that starts goes by Kafka's count instead. Keys are in two partitions at once."""

    async def load_what_kafka_has(self: Topics) -> None:
        known = {row["topic"] for row in await self._pool.fetch("select topic from outbox.topics")}
        await self._producer.start()
        self._counts = {name: count for name in known if (count := await self._producer.partitions(name)) is not None}

    monkeypatch.setattr(Topics, "load", load_what_kafka_has)
    assert await grown(log_pool, real_kafka.bootstrap_servers, vocabulary(topic), topic) > {0, 1, 2, 3}
