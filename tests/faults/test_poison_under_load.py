"""Records that Apache Kafka refuses, among those of an idempotent producer under load.

Proven: nothing is lost, repeated or out of order, only the poison's own key is parked, and the producer lives on, so
the other partitions do not even notice. Where a refused record stands within its key is tested in
tests/integration/test_relay_life.py.
"""

import random
import sys
from collections.abc import Sequence

import pytest

import outbox
from outbox import Pool
from tests.support.faults import eventually
from tests.support.kafka_server import RealKafka, create_topic
from tests.support.relay_process import Relays
from tests.support.writers import Writers

pytestmark = pytest.mark.crash

LIMIT_BYTES = 20_000


async def until_parked(pool: Pool, keys: Sequence[str]) -> None:
    async def look() -> bool:
        return await pool.fetchval("select array_agg(key order by key) from outbox.parked_keys") == sorted(keys)

    await eventually(look, what=f"exactly {keys} parked", timeout_seconds=60)


async def test_refused_records_among_others(
    log_pool: Pool, database: str, real_kafka: RealKafka, relays: Relays, topic: str, seed: int
) -> None:
    servers = real_kafka.bootstrap_servers
    await create_topic(servers, topic, partitions=3, settings={"max.message.bytes": str(LIMIT_BYTES)})
    rng = random.Random(seed)
    writers = Writers(log_pool, topic, keys=tuple(f"key-{n:02}" for n in range(20)), seed=seed)
    await writers.set_up()
    relay = relays.start(database, servers, window_max_events=200, lease_seconds=4.0)
    await writers.burst(20)
    await eventually(
        lambda: log_pool.fetchval("select true from outbox.topics where topic = $1", topic), what="the topic is pinned"
    )
    # As if the limit had been lowered since: emit would refuse what it knows to be too large.
    await log_pool.execute("update outbox.topics set max_message_bytes = null")

    doomed = rng.sample(writers.keys, k=4)
    for number, key in enumerate(doomed, 1):
        poison = writers.event(key=key, identity=rng.randbytes(LIMIT_BYTES).hex())
        async with outbox.transaction(log_pool) as tx:
            for n in range(100):  # in the middle of a batch
                await writers.change(tx, writers.keys[n % len(writers.keys)])
                if n == 50:
                    tx.emit(poison)
        await writers.run(writers=4, transactions=15)
        await until_parked(log_pool, doomed[:number])
    verdict = await writers.judge(servers)
    sys.stdout.write(f"{verdict.explain()}\n")
    assert verdict.valid, f"{verdict.explain()}\n{relay.log[-4000:]}"
    assert "another producer goes on" not in relay.log
    assert await relay.terminate() == 0
