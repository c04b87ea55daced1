"""kill -9 of a consumer with an inbox, between a handler and COMMIT and elsewhere: every effect is there once."""

import signal
from uuid import UUID

import pytest

from outbox import Consumer, Event, Pool
from tests.integration.test_consumer import applied
from tests.support.consumer_process import INBOX, SETTINGS, Vocabulary, consumer_process, create_table, vocabulary
from tests.support.faults import Fault, eventually
from tests.support.kafka_server import create_topic
from tests.support.producing import produce

pytestmark = pytest.mark.crash

SITES = [
    Fault("outbox.consumer.apply.advance", "after"),
    Fault("outbox.consumer.messages.receive", "before"),
    Fault("outbox.consumer.messages.receive", "after"),
    Fault("outbox.transaction.flush", "before"),
    Fault("outbox.transaction.flush", "after"),
    Fault("outbox.transaction.flush", "after", visit=2),
    Fault("outbox.consumer.handling.end_event", "after", visit=50),
    Fault("outbox.consumer.parking.queue", "after"),
]


def traffic(words: Vocabulary, count: int) -> list[Event]:
    """Names of a few agents; the 301st, of an agent of its own, is poison."""
    agents = [UUID(int=number) for number in range(1, 40)]
    events = [
        words.named.model_validate({"agent_id": agents[number % len(agents)], "name": f"name {number}"})
        for number in range(count)
    ]
    poisoned = [{"agent_id": UUID(int=255), "name": name} for name in ("before", "forbidden", "after")]
    return events[:300] + [words.named.model_validate(fields) for fields in poisoned] + events[300:]


async def judge(pool: Pool, events: list[Event]) -> None:
    """Each event has its effect once, in the order of its key, and each effect its own event once."""
    wanted: dict[UUID, list[str]] = {}
    for event in events:
        fields = event.model_dump()
        wanted.setdefault(fields["agent_id"], []).append(fields["name"])
    wanted[UUID(int=255)] = ["before"]
    found: dict[UUID, list[str]] = {}
    for row in await pool.fetch("select agent_id, name from effects order by id"):
        found.setdefault(row["agent_id"], []).append(row["name"])
    assert found == wanted
    echoed: dict[UUID, list[str]] = {}
    query = "select key, convert_from(payload, 'utf8')::jsonb ->> 'name' as name from outbox.events order by position"
    for row in await pool.fetch(query):
        echoed.setdefault(UUID(row["key"]), []).append(row["name"])
    assert echoed == wanted
    waiting = await pool.fetch("select key from outbox.parked_events where parker = $1 order by id", INBOX)
    assert [row["key"] for row in waiting] == [str(UUID(int=255))] * 2


@pytest.mark.parametrize("fault", SITES, ids=str)
async def test_killed_between_handler_and_commit(
    log_pool: Pool, database: str, broker: str, topic: str, fault: Fault
) -> None:
    words = vocabulary(topic)
    await create_table(log_pool)
    await create_topic(broker, topic, partitions=2)
    events = traffic(words, 400)
    await produce(broker, topic, events, window=1, partitions=2)
    with consumer_process(database, broker, topic, fault, inbox=True) as victim:
        assert await victim.died() == -signal.SIGKILL
    async with Consumer(log_pool, broker, words.inbox, group=topic, settings=SETTINGS):
        await applied(log_pool, len(events))
    await judge(log_pool, events)


async def test_a_frozen_owner_wakes_up_to_nothing(log_pool: Pool, database: str, broker: str, topic: str) -> None:
    """Stopped before its batch, it loses the partition; when it wakes up, its epoch is old and its batch rejected."""
    words = vocabulary(topic)
    await create_table(log_pool)
    await create_topic(broker, topic)
    events = traffic(words, 400)
    await produce(broker, topic, events[:100], window=1, partitions=1)
    fault = Fault("outbox.consumer.apply.advance", "before", "stop")
    with consumer_process(database, broker, topic, fault, inbox=True) as zombie:

        async def claimed() -> bool:
            return bool(await log_pool.fetchval("select exists (select from outbox.positions where epoch = 1)"))

        await eventually(claimed, what="the zombie has claimed")
        async with Consumer(log_pool, broker, words.inbox, group=topic, settings=SETTINGS):
            await applied(log_pool, 100)
            zombie.signal(signal.SIGCONT)
            await produce(broker, topic, events[100:], window=2, partitions=1)
            await applied(log_pool, len(events))
    await judge(log_pool, events)
