"""The producer that can be thrown away, against a broker that does not answer."""

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from outbox import kafka
from outbox.settings import Settings
from tests.support.faults import stopped
from tests.support.kafka_server import RealKafka, create_topic

QUICK = Settings(publish_timeout_seconds=1.0)


@pytest.fixture
def thawed(real_kafka: RealKafka) -> Iterator[RealKafka]:
    """Answers again afterwards, whatever the test did to it."""
    yield real_kafka
    os.kill(real_kafka.pid, signal.SIGCONT)


def batch_of_one(producer: kafka.Producer, value: bytes = b"v") -> kafka.Batch:
    batch = producer.batch()
    assert batch.append(timestamp=None, key=b"k", value=value, headers=[]) is not None
    return batch


async def test_a_refused_batch_leaves_the_producer_usable(real_kafka: RealKafka, topic: str) -> None:
    """Seen red: the batch behind a refused one was out of sequence, which cost other partitions their producer."""
    await create_topic(real_kafka.bootstrap_servers, topic, settings={"max.message.bytes": "2000"})
    producer = kafka.Producer(real_kafka.bootstrap_servers, QUICK)
    await producer.start()
    for offset in range(3):
        with pytest.raises(kafka.UNPUBLISHABLE):
            await producer.send(batch_of_one(producer, os.urandom(4_000)), topic, 0)
        assert await producer.send(batch_of_one(producer), topic, 0) == offset
    assert producer.generation == 1
    await producer.stop()


async def test_a_producer_with_a_request_in_flight_is_discarded_and_another_one_goes_on(
    thawed: RealKafka, topic: str
) -> None:
    """Seen red: aiokafka put the failed batch back into its queue, a KeyError that ended the relay."""
    await create_topic(thawed.bootstrap_servers, topic)
    producer = kafka.Producer(thawed.bootstrap_servers, QUICK)
    await producer.start()
    assert await producer.send(batch_of_one(producer), topic, 0) == 0

    os.kill(thawed.pid, signal.SIGSTOP)
    await stopped(thawed.pid)
    sending = asyncio.create_task(producer.send(batch_of_one(producer), topic, 0))
    with pytest.raises((kafka.KafkaError, TimeoutError)):
        await sending
    await producer.discard(producer.generation)

    os.kill(thawed.pid, signal.SIGCONT)
    await producer.start()
    assert await producer.send(batch_of_one(producer), topic, 0) in {1, 2}  # the frozen one may have arrived late
    await producer.stop()


async def test_a_tail_finds_partitions_that_it_has_not_read(real_kafka: RealKafka, topic: str) -> None:
    """The restore guard's evidence.

    Seen red: Apache Kafka tells a consumer of the partitions of its own topics only, so `ends` found none of any topic,
    and the guard looked at nothing.
    """
    await create_topic(real_kafka.bootstrap_servers, topic, partitions=2)
    producer = kafka.Producer(real_kafka.bootstrap_servers, QUICK)
    await producer.start()
    for _ in range(3):
        await producer.send(batch_of_one(producer), topic, 1)
    await producer.stop()
    async with kafka.Tail(real_kafka.bootstrap_servers) as tail:
        assert (await tail.counts())[topic] == 2
        ends = await tail.ends(topic, 2)
        assert ends == {0: (0, 0), 1: (0, 3)}
        assert [record.offset async for record in tail.read(topic, ends)] == [0, 1, 2]
        assert await tail.ends(topic, 1) == {0: (0, 0)}
        assert await tail.ends(f"{topic}-missing", 2) == {}
