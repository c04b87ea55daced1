"""A relay's life: several at once, signals, zombies, lost connections, missing topics, poison."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final

import asyncpg
import pytest

import outbox
from outbox import Pool, Relay
from outbox.settings import Settings
from tests.support.faults import Fault, eventually, stopped
from tests.support.history import topic_reader
from tests.support.kafka_server import RealKafka, create_topic
from tests.support.relay_process import QUICK, RelayProcess, Relays
from tests.support.writers import Writers, identify

IDLE: Final = """
select exists (select from pg_locks where locktype = 'advisory' and classid = 1868724273 and mode = 'ExclusiveLock'
                                      and database = (select oid from pg_database where datname = current_database()))
"""


def settings(**changed: object) -> Settings:
    return Settings(**{**QUICK, **changed})  # type: ignore[arg-type]


def sees(pool: Pool, query: str) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return bool(await pool.fetchval(query))

    return look


async def workload(pool: Pool, servers: str, topic: str, *, partitions: int = 3) -> Writers:
    await create_topic(servers, topic, partitions=partitions)
    writers = Writers(pool, topic)
    await writers.set_up()
    return writers


async def check(writers: Writers, servers: str, *, duplicates_max: int = 0) -> None:
    verdict = await writers.judge(servers, duplicates_max=duplicates_max)
    assert verdict.valid, verdict.explain()


# ------------------------------------------------------------------------------------------- several relays


@pytest.mark.crash
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
async def test_standby_takes_over(
    log_pool: Pool, database: str, broker: str, topic: str, relays: Relays, number: signal.Signals
) -> None:
    """Two relays at once: one works, the other takes over; after SIGTERM without waiting for the lease to run out."""
    writers = await workload(log_pool, broker, topic)
    lease_seconds = 1.0 if number is signal.SIGKILL else 20.0
    first = relays.start(database, broker, lease_seconds=lease_seconds)
    await eventually(
        sees(log_pool, "select lease_owner is not null from outbox.shards"), what="the first has the lease"
    )
    second = relays.start(database, broker, lease_seconds=lease_seconds)
    load = asyncio.create_task(writers.run(writers=3, transactions=30))
    await eventually(sees(log_pool, "select max(window_no) > 3 from outbox.windows"), what="the first works")
    first.signal(number)
    assert await first.wait() == (-9 if number is signal.SIGKILL else 0), first.log
    await load
    # In order nothing is repeated; killed, or where the broker was too slow to acknowledge, at most what was in flight.
    is_orderly = number is signal.SIGTERM and not any(word in first.log for word in ("abandoning", "another producer"))
    await check(writers, broker, duplicates_max=0 if is_orderly else 2 * 2500)
    assert await log_pool.fetchval("select lease_epoch from outbox.shards") == 2
    assert await second.terminate() == 0


@pytest.mark.crash
@pytest.mark.parametrize(
    "site",
    ["kafka.send", "outbox.relay.window.log", "outbox.relay.window.read", "outbox.relay.lease.renew"],
)
async def test_zombie_is_fenced(
    log_pool: Pool, database: str, broker: str, topic: str, relays: Relays, site: str
) -> None:
    """SIGSTOP for longer than the lease, then SIGCONT: nothing lost, nothing out of order as our consumers apply it.

    The successor has logged and published more by then. What the zombie still delivers are duplicates; what it tries to
    log is refused. Its own deadline, the epoch and the number of the window stand behind each other: without the epoch
    this test stays green, so that rule has tests of its own (H13).
    """
    writers = await workload(log_pool, broker, topic)
    await writers.burst(30)
    zombie = relays.start(database, broker, window_max_events=10, fault=Fault(site, "before", "stop", visit=2))
    await stopped(zombie.pid)
    successor = relays.start(database, broker, window_max_events=10)
    await writers.run(writers=3, transactions=5)
    async with topic_reader(broker, topic) as reader:
        await writers.published(reader)
    zombie.signal(signal.SIGCONT)
    await writers.run(writers=3, transactions=5)
    await check(writers, broker, duplicates_max=2 * 10)
    assert "lease taken, epoch 2" in successor.log
    assert zombie.exited.is_set() is False
    await successor.terminate()
    await eventually(lambda: _in_log(zombie, "lease taken, epoch 3"), what="the zombie stands by, and takes over")
    assert await zombie.terminate() == 0, zombie.log


async def _in_log(relay: RelayProcess, text: str) -> bool:
    return text in relay.log


async def test_sigterm_finishes_writes_done_and_releases_the_lease(
    log_pool: Pool, database: str, broker: str, topic: str, relays: Relays
) -> None:
    writers = await workload(log_pool, broker, topic)
    relay = relays.start(database, broker, lease_seconds=60.0)
    await writers.burst(200)
    await eventually(sees(log_pool, "select exists (select from outbox.windows)"), what="a window is logged")
    assert await relay.terminate() == 0
    done = await log_pool.fetchrow(
        "select s.lease_until, s.done_through, (select max(window_no) from outbox.windows) as last from outbox.shards s"
    )
    assert done["lease_until"] is None
    assert done["done_through"] == done["last"]
    successor = relays.start(database, broker, lease_seconds=60.0)
    await check(writers, broker)
    assert "replaying" not in successor.log


# --------------------------------------------------------------------------------------------- connections


async def test_a_lost_postgresql_connection_resumes(log_pool: Pool, broker: str, topic: str, database: str) -> None:
    """`pg_terminate_backend` for all of the relay's connections, several times: nothing lost, duplicates within P4."""
    writers = await workload(log_pool, broker, topic)
    ours = "application_name = 'victim' and datname = current_database()"
    async with (
        asyncpg.create_pool(database, min_size=1, max_size=6, server_settings={"application_name": "victim"}) as pool,
        Relay(pool, broker, settings=settings(window_max_events=50)),
    ):
        for _ in range(3):
            await writers.run(writers=2, transactions=5)
            await eventually(sees(log_pool, IDLE), what="the relay works, then idles")
            assert await log_pool.fetchval(
                f"select count(pg_terminate_backend(pid)) from pg_stat_activity where {ours}"
            )
            await writers.run(writers=2, transactions=5)
        await check(writers, broker, duplicates_max=3 * 2 * 50)


# -------------------------------------------------------------------------------------------------- topics


async def test_a_missing_topic_that_is_created_later(log_pool: Pool, real_kafka: RealKafka, topic: str) -> None:
    """Its events wait and are published once it exists; after `missing_topic_seconds` their keys would be parked."""
    writers = Writers(log_pool, topic)
    await writers.set_up()
    servers = real_kafka.bootstrap_servers
    await writers.burst(5)
    async with Relay(log_pool, servers, settings=settings(missing_topic_seconds=60.0)):
        await eventually(sees(log_pool, "select exists (select from outbox.windows)"), what="the window is logged")
        await create_topic(servers, topic, partitions=2)
        await check(writers, servers)
    assert not await log_pool.fetchval("select exists (select from outbox.parked_keys)")


async def test_a_topic_that_stays_missing_parks_its_keys_and_others_flow(
    log_pool: Pool, real_kafka: RealKafka, topic: str
) -> None:
    servers = real_kafka.bootstrap_servers
    writers = await workload(log_pool, servers, topic)
    missing = Writers(log_pool, f"{topic}-missing")
    async with outbox.transaction(log_pool) as tx:
        tx.emit(missing.event(key="m", identity="m1"))
    await writers.burst(5)
    async with Relay(log_pool, servers, settings=settings(missing_topic_seconds=0.1)):
        await check(writers, servers)
    parked = await log_pool.fetchrow("select topic, key, reason from outbox.parked_keys")
    assert tuple(parked) == (missing.topic, "m", "TopicMissing")


# -------------------------------------------------------------------------------------------------- poison


@pytest.mark.parametrize("at", [0, 2, 4], ids=["first", "middle", "last"])
async def test_poison_parks_its_key_from_that_record_on(
    log_pool: Pool, real_kafka: RealKafka, topic: str, at: int
) -> None:
    """The broker refuses one record: it and the key's later ones are parked in order, other keys flow, ordinals stay.

    Seen red: with the parked keys' later records left in the batches.
    """
    servers = real_kafka.bootstrap_servers
    await create_topic(servers, topic, settings={"max.message.bytes": "20000"})
    writers = Writers(log_pool, topic, keys=("good", "bad", "other"))
    await writers.set_up()
    async with outbox.transaction(log_pool) as tx:
        for n in range(5):
            await writers.change(tx, "good")
            if n == at:
                tx.emit(big(writers, "bad"))
            else:
                await writers.change(tx, "bad")
    async with Relay(log_pool, servers, settings=settings(compression="none")):
        await eventually(sees(log_pool, "select exists (select from outbox.parked_keys)"), what="the key is parked")
        await writers.burst(6)  # two more of the key, diverted when their window is logged
        async with topic_reader(servers, topic) as reader:
            await writers.published(reader)
            records = await reader.records(identify)
    parked = await log_pool.fetch(
        "select key, position, window_no, ordinal from outbox.parked_events order by window_no, ordinal"
    )
    assert {row["key"] for row in parked} == {"bad"}
    assert [row["position"] for row in parked] == sorted(row["position"] for row in parked)
    assert len(parked) == 5 - at + 2
    assert (parked[0]["window_no"], parked[0]["ordinal"]) == (1, 2 * (at + 1))
    assert len([record for record in records if record.key == "bad"]) == at
    assert {record.position.ordinal for record in records if record.position and record.position.window == 1} == (
        set(range(1, 11)) - {row["ordinal"] for row in parked if row["window_no"] == 1}
    )
    assert await log_pool.fetchval("select reason from outbox.parked_keys") == "MessageSizeTooLargeError"


def big(writers: Writers, key: str) -> outbox.Event:
    """An event that fits the limit known at emit, and not the topic's."""
    return writers.event(key=key, identity=Random(1).randbytes(30_000).hex())


async def test_relaying_leaves_no_dead_tuples_in_the_log(log_pool: Pool, broker: str, topic: str) -> None:
    """The log is insert-only: relaying neither updates nor deletes a row of it."""
    writers = await workload(log_pool, broker, topic)
    writers.modes = {"plain": 1, "several": 1}
    async with Relay(log_pool, broker, settings=settings()):
        await writers.run(writers=3, transactions=20)
        await check(writers, broker)
    await log_pool.execute("select pg_stat_force_next_flush()")
    touched = await log_pool.fetchrow(
        "select sum(n_dead_tup) as dead, sum(n_tup_upd) as updated, sum(n_tup_del) as deleted, sum(n_live_tup) as live"
        "  from pg_stat_all_tables where schemaname = 'outbox' and relname like 'events\\_slot\\_%'"
    )
    assert (touched["dead"], touched["updated"], touched["deleted"]) == (0, 0, 0)
