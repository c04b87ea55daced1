"""Partitions are those of Kafka's own client: the values are from its test of murmur2, with the sign bit cleared."""

import pytest

from outbox.kafka import partition_hash
from tests.support.history import kafka_hash

OF_THE_JAVA_CLIENT = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}


@pytest.mark.parametrize(("key", "value"), OF_THE_JAVA_CLIENT.items())
def test_a_key_is_hashed_as_the_java_client_does(key: str, value: int) -> None:
    assert kafka_hash(key) == value & 0x7FFFFFFF
    assert partition_hash(key) == value & 0x7FFFFFFF
