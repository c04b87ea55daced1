"""Consumers on a broker: from start to stop, with others in the group, from emit to cache."""

import random
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from outbox import CacheDeclarationError, Consumer, Event, Pool, Relay, transaction
from outbox.consumer import Outcome, State
from outbox.errors import NotMigrated
from outbox.upkeep import migrate
from tests.support.consumer_process import SETTINGS, TABLE, CachedName, Vocabulary, create_table, vocabulary
from tests.support.faults import eventually
from tests.support.kafka_server import create_topic
from tests.support.producing import produce, produce_raw


def traffic(words: Vocabulary, count: int, seed: int) -> list[Event]:
    """Events of a few agents; a note only ever follows a name."""
    dice = random.Random(seed)
    agents = [UUID(int=number) for number in range(1, 40)]
    alive: set[UUID] = set()
    events: list[Event] = []
    for number in range(count):
        agent = dice.choice(agents)
        kind = dice.random()
        if agent not in alive or kind < 0.6:
            events.append(words.named.model_validate({"agent_id": agent, "name": f"name {number}"}))
            alive.add(agent)
        elif kind < 0.85:
            events.append(words.noted.model_validate({"agent_id": agent, "note": f"note {number}"}))
        else:
            events.append(words.gone.model_validate({"agent_id": agent}))
            alive.discard(agent)
    return events


async def cached(pool: Pool) -> list[CachedName]:
    rows = await pool.fetch(f"select agent_id, name, note from {TABLE} order by agent_id")
    return [CachedName(**row) for row in rows]


async def applied(pool: Pool, offsets: int) -> None:
    """Wait until the partitions' positions add up."""

    async def look() -> bool:
        return bool(await pool.fetchval("select coalesce(sum(next_offset), 0) = $1 from outbox.positions", offsets))

    await eventually(look, what=f"{offsets} records applied", timeout_seconds=40)


async def counted(consumer: Consumer, totals: Outcome) -> None:
    """Wait until the consumer has counted what it committed."""

    async def look() -> bool:
        return consumer.totals == totals

    await eventually(look, what=f"{totals}, it has {consumer.totals}")


async def all_running(*consumers: Consumer, partitions: int) -> None:
    async def look() -> bool:
        states = [state for consumer in consumers for state in consumer.states.values()]
        return len(states) == partitions and set(states) == {State.RUNNING} and all(c.states for c in consumers)

    await eventually(look, what="partitions shared out", timeout_seconds=40)


def expected(words: Vocabulary, events: list[Event]) -> list[CachedName]:
    return sorted(words.cache.fold(events), key=lambda row: row.agent_id)


async def test_from_emit_to_cache_and_back(log_pool: Pool, broker: str, topic: str) -> None:
    """The whole way: a transaction emits, relay and consumer carry, and the receipt's holder reads its own write."""
    words = vocabulary(topic)
    await create_table(log_pool)
    await create_topic(broker, topic, partitions=2)
    async with Relay(log_pool, broker), Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS):
        agent = uuid4()
        for name in ("first", "second"):
            async with transaction(log_pool) as tx:
                tx.emit(words.named.model_validate({"agent_id": agent, "name": name}))
            row = await words.cache.wait_for(log_pool, agent, tx.receipt, timeout=30)
            assert row is not None
            assert row.name == name
        async with transaction(log_pool) as tx:
            tx.emit(words.gone.model_validate({"agent_id": agent}))
        assert await words.cache.wait_for(log_pool, agent, tx.receipt, timeout=30) is None


async def test_a_restart_goes_on_where_the_database_stands(log_pool: Pool, broker: str, topic: str) -> None:
    words = vocabulary(topic)
    await create_table(log_pool)
    await create_topic(broker, topic, partitions=3)
    events = traffic(words, 600, seed=1)
    await produce(broker, topic, events[:400], window=1, partitions=3)
    async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS) as consumer:
        await applied(log_pool, 400)
        await counted(consumer, Outcome(applied=400))
    await produce(broker, topic, events[400:], window=2, partitions=3)
    async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS) as consumer:
        await applied(log_pool, 600)
        await counted(consumer, Outcome(applied=200))
    assert await cached(log_pool) == expected(words, events)


async def test_members_come_and_go(log_pool: Pool, broker: str, topic: str) -> None:
    """Two rebalances under load; every row as the fold has it, no write twice."""
    words = vocabulary(topic)
    await create_table(log_pool)
    await create_topic(broker, topic, partitions=4)
    events = traffic(words, 1_500, seed=2)
    async with AsyncExitStack() as stays:
        first = Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS)
        async with first:
            await produce(broker, topic, events[:500], window=1, partitions=4)
            await all_running(first, partitions=4)
            second = await stays.enter_async_context(
                Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS)
            )
            await produce(broker, topic, events[500:1_000], window=2, partitions=4)
            await all_running(first, second, partitions=4)
            await applied(log_pool, 1_000)
        await produce(broker, topic, events[1_000:], window=3, partitions=4)
        await applied(log_pool, 1_500)
        assert set(second.states) == {(topic, number) for number in range(4)}
    assert await cached(log_pool) == expected(words, events)
    assert await log_pool.fetch("select agent_id, at from writes group by 1, 2 having count(*) > 1") == []


async def test_a_topic_that_comes_later(log_pool: Pool, broker: str, topic: str) -> None:
    words = vocabulary(topic)
    await create_table(log_pool)
    async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS):
        try:
            await create_topic(broker, topic)
        except AssertionError as error:  # some brokers create a topic when somebody asks for it
            assert "already" in str(error).lower() or " 36 " in str(error)  # noqa: PT017
        await produce(broker, topic, traffic(words, 10, seed=3), window=1, partitions=1)
        await applied(log_pool, 10)


async def test_records_that_faststream_would_choke_on(log_pool: Pool, broker: str, topic: str) -> None:
    words = vocabulary(topic)
    await create_table(log_pool)
    await create_topic(broker, topic)
    agent = uuid4()
    body = words.named.model_validate({"agent_id": agent, "name": "fine"}).model_dump_json().encode()
    await produce_raw(
        broker,
        topic,
        [
            (b"k", None, []),
            (None, b"", [("ce_type", b"\xff\xfe")]),
            (b"k", None, [("ce_type", None), ("content-type", b"\xff")]),
            (str(agent).encode(), body, [("ce_type", b"agent.named"), ("odd", None), ("odder", b"\xff")]),
        ],
    )
    async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS) as consumer:
        await applied(log_pool, 4)
        await counted(consumer, Outcome(applied=1, unknown=3))
    assert [row.name for row in await cached(log_pool)] == ["fine"]


async def test_starting_tells_what_is_missing(log_pool: Pool, postgres: Any, broker: str, topic: str) -> None:
    words = vocabulary(topic)
    with pytest.raises(CacheDeclarationError, match="no such table"):
        async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS):
            pass
    url = postgres.create_database("empty_" + uuid4().hex[:8])
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as empty:
        with pytest.raises(NotMigrated):
            async with Consumer(empty, broker, words.cache, group=topic, settings=SETTINGS):
                pass


async def test_it_starts_although_nothing_answers_yet(log_pool: Pool, topic: str) -> None:
    """Kafka may come later than the service."""
    words = vocabulary(topic)
    await create_table(log_pool)
    async with Consumer(log_pool, "127.0.0.1:1", words.cache, group=topic, settings=SETTINGS) as consumer:
        assert consumer.states == {}


async def test_services_that_call_their_tables_the_same_do_not_share_a_group(
    log_pool: Pool, postgres: Any, broker: str, topic: str
) -> None:
    """Each gets all partitions, because the default group has the database's name in front."""
    words = vocabulary(topic)
    await create_topic(broker, topic, partitions=2)
    events = traffic(words, 50, seed=6)
    await produce(broker, topic, events, window=1, partitions=2)
    url = postgres.create_database("other_" + uuid4().hex[:8])
    async with asyncpg.create_pool(url, min_size=1, max_size=4) as other_pool:
        await migrate.up(other_pool)
        for pool in (log_pool, other_pool):
            await create_table(pool)
        async with (
            Consumer(log_pool, broker, words.cache, settings=SETTINGS) as one,
            Consumer(other_pool, broker, vocabulary(topic).cache, settings=SETTINGS) as other,
        ):
            for pool in (log_pool, other_pool):
                await applied(pool, 50)
            assert len(one.states) == len(other.states) == 2
            assert await cached(log_pool) == await cached(other_pool) == expected(words, events)
    postgres.drop_database(url.rpartition("/")[2])
