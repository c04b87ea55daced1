"""kill -9 of a consumer between any two of its steps: nothing is lost, nothing is applied twice."""

import signal
from uuid import UUID

import pytest

from outbox import Consumer, Pool, parking
from tests.integration.test_consumer import applied, cached, expected, traffic
from tests.support.consumer_process import SETTINGS, TABLE, consumer_process, create_table, vocabulary
from tests.support.faults import Fault, eventually
from tests.support.kafka_server import create_topic
from tests.support.producing import produce

pytestmark = pytest.mark.crash

SITES = [
    Fault("consumer.kafka.ends", "after"),
    Fault("outbox.consumer.apply.claim", "after"),
    Fault("outbox.consumer.apply.advance", "before"),
    Fault("outbox.consumer.apply.advance", "after"),
    Fault("outbox.cache.merge.merge_rows", "before"),
    Fault("outbox.cache.merge.merge_rows", "after"),
    Fault("outbox.cache.merge.merge_rows", "after", visit=2),
    Fault("outbox.consumer.parking.open_keys", "after"),
    Fault("outbox.consumer.parking.queue", "after"),
]


@pytest.mark.parametrize("fault", SITES, ids=str)
async def test_killed_between_update_and_commit(
    log_pool: Pool, database: str, broker: str, topic: str, fault: Fault
) -> None:
    words = vocabulary(topic)
    await create_table(log_pool)
    await create_topic(broker, topic, partitions=2)
    events = traffic(words, 400, seed=4)
    poisoned = words.named.model_validate({"agent_id": "00000000-0000-0000-0000-0000000000ff", "name": "forbidden"})
    await produce(broker, topic, [*events, poisoned], window=1, partitions=2)
    with consumer_process(database, broker, topic, fault) as victim:
        assert await victim.died() == -signal.SIGKILL
    async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS):
        await applied(log_pool, 401)
    assert await cached(log_pool) == expected(words, events)
    assert await log_pool.fetch("select agent_id, at from writes group by 1, 2 having count(*) > 1") == []
    waiting = await log_pool.fetch("select key, count(*) from outbox.parked_events where parker = $1 group by 1", TABLE)
    assert [tuple(row) for row in waiting] == [(str(poisoned.model_dump()["agent_id"]), 1)]


RETRY_SITES = [
    Fault(f"outbox.consumer.retries.{statement}", side)
    for statement, side in (
        ("due", "after"), ("due_keys", "after"), ("events", "after"), ("applied", "before"), ("applied", "after"),
        ("free", "before"), ("free", "after"), ("failed", "after"),
    )
]  # fmt: skip


@pytest.mark.parametrize("fault", RETRY_SITES, ids=str)
async def test_killed_while_it_retries(log_pool: Pool, database: str, broker: str, topic: str, fault: Fault) -> None:
    """Patches wait for their rows, which come; one row never does. Each patch has its effect once, in order."""
    words = vocabulary(topic)
    await create_table(log_pool)
    await create_topic(broker, topic)
    agents = [UUID(int=number) for number in range(1, 6)]
    events = [words.noted.model_validate({"agent_id": agent, "note": f"{n}"}) for n in range(4) for agent in agents]
    await produce(broker, topic, events, window=1, partitions=1)
    async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS):
        await applied(log_pool, 20)
        await log_pool.execute("update outbox.parked_keys set retry_at = null")
    await log_pool.executemany(
        f"insert into {TABLE} (agent_id, name, note) values ($1, 'n', '')", [(agent,) for agent in agents[1:]]
    )
    await log_pool.execute("truncate writes")
    await parking.retry_all(log_pool)
    with consumer_process(database, broker, topic, fault) as victim:
        assert await victim.died() == -signal.SIGKILL

    async def one_left() -> bool:
        return bool(await log_pool.fetchval("select count(*) = 1 from outbox.parked_keys"))

    await parking.retry_all(log_pool)
    async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS):
        await eventually(one_left, what="all but one key are free")
    assert await log_pool.fetchval("select count(*) from outbox.parked_events") == 4
    assert {row.note for row in await cached(log_pool)} == {"3"}
    assert await log_pool.fetch("select agent_id, at from writes group by 1, 2 having count(*) > 1") == []


async def test_a_frozen_owner_wakes_up_to_nothing(log_pool: Pool, database: str, broker: str, topic: str) -> None:
    """Stopped with its batch open, it loses the partition; what it does when it wakes up changes nothing."""
    words = vocabulary(topic)
    await create_table(log_pool)
    await create_topic(broker, topic)
    events = traffic(words, 200, seed=5)
    await produce(broker, topic, events[:100], window=1, partitions=1)
    with consumer_process(database, broker, topic, Fault("outbox.consumer.apply.advance", "before", "stop")) as zombie:

        async def claimed() -> bool:
            return bool(await log_pool.fetchval("select exists (select from outbox.positions where epoch = 1)"))

        await eventually(claimed, what="the zombie has claimed")
        async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS):
            await applied(log_pool, 100)
            zombie.signal(signal.SIGCONT)
            await produce(broker, topic, events[100:], window=2, partitions=1)
            await applied(log_pool, 200)
    assert await cached(log_pool) == expected(words, events)
    assert await log_pool.fetch("select agent_id, at from writes group by 1, 2 having count(*) > 1") == []
