"""The servers under all measurements, and a fresh database with a fresh topic for each of them."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self
from uuid import uuid4

import aiokafka
import asyncpg
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from benchmarks import workload
from outbox import embedded, postgres
from outbox.embedded import Broker, Databases, Postgres
from outbox.upkeep import migrate

_LOAD_TIMEOUT_SECONDS: Final = 1_800.0
_LOOK_SECONDS: Final = 0.02
_STILL_SECONDS: Final = 0.15
_PROBE_SECONDS: Final = 30.0
_WAKE_LOCK: Final = 1_868_724_273
_IDLE: Final = """
select exists (select from pg_locks l join pg_database d on d.oid = l.database
                where d.datname = current_database() and l.locktype = 'advisory' and l.classid = $1
                  and l.mode = 'ExclusiveLock' and l.granted)
"""


class Ends:
    """How many records a topic holds.

    A look asks for the end offsets, one small request. Apache Kafka answers exactly; the embedded broker answers the
    first offset of the newest batch, plus one. So the looks tell *when* the last batch arrived, and a read from that
    offset on tells how much is there.
    """

    def __init__(self, servers: str, topic: str) -> None:
        """For one topic."""
        self._servers = servers
        self._partitions = [aiokafka.TopicPartition(topic, number) for number in range(workload.PARTITIONS)]
        self._consumer = aiokafka.AIOKafkaConsumer(bootstrap_servers=servers, enable_auto_commit=False)

    async def __aenter__(self) -> Self:
        await self._consumer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._consumer.stop()

    async def total(self) -> int:
        """Records in the topic, exactly."""
        reported = await self._reported()
        consumer = aiokafka.AIOKafkaConsumer(
            bootstrap_servers=self._servers, enable_auto_commit=False, fetch_max_wait_ms=20
        )
        await consumer.start()
        try:
            filled = {partition: end for partition, end in reported.items() if end}
            consumer.assign(list(filled))
            for partition, end in filled.items():
                consumer.seek(partition, end - 1)
            async with asyncio.timeout(_PROBE_SECONDS):
                while any([await consumer.position(partition) < end for partition, end in filled.items()]):
                    await consumer.getmany(timeout_ms=100)
            return sum([int(consumer.highwater(partition)) for partition in filled])
        finally:
            await consumer.stop()

    async def reach(
        self,
        count: int,
        *,
        timeout_seconds: float,
        seen: Callable[[int], None] = lambda _count: None,
        check: Callable[[], None] = lambda: None,
    ) -> float:
        """Wait until the topic holds so many; the time of the look that found the last of them comes back.

        Args:
            count: how many.
            timeout_seconds: for how long.
            seen: called when a look finds more than the one before.
            check: called with each look; raises if waiting has become pointless.

        Raises:
            TimeoutError: it does not.
        """
        deadline = time.perf_counter() + timeout_seconds
        known, changed, probed = 0, time.perf_counter(), True
        while True:
            reported = sum((await self._reported()).values())
            now = time.perf_counter()
            if reported > known:
                known, changed, probed = reported, now, False
                seen(known)
            if known >= count or (not probed and now - changed > _STILL_SECONDS and await self.total() >= count):
                return changed
            probed = probed or now - changed > _STILL_SECONDS
            if now > deadline:
                raise TimeoutError(f"{known} of {count} records in Kafka after {timeout_seconds:.0f} s")
            check()
            await asyncio.sleep(_LOOK_SECONDS)

    async def _reported(self) -> dict[Any, int]:
        ends: dict[Any, int] = await self._consumer.end_offsets(self._partitions)
        return ends


@dataclass(slots=True)
class Ground:
    """A migrated database, a topic of eight partitions, and nothing else in them."""

    database_url: str
    kafka: str
    real_kafka: bool
    topic: str
    pool: postgres.Pool
    ends: Ends

    async def load(self, first: int, last: int, *, before_commit: Callable[[], None] = lambda: None) -> float:
        """Commit events in one transaction; the time at which COMMIT returned comes back."""
        async with self.pool.acquire() as connection:
            async with connection.transaction():
                await connection.execute(workload.LOAD_AT_ONCE, self.topic, first, last, timeout=_LOAD_TIMEOUT_SECONDS)
                await connection.execute(workload.WAKE)
                before_commit()
            return time.perf_counter()

    async def load_singly(self, first: int, last: int) -> None:
        """Commit events in one transaction each; only the loader's own commits do not wait for the disk."""
        async with self.pool.acquire() as connection:
            await connection.execute("set synchronous_commit = off")
            await connection.execute(workload.LOAD_SINGLY, self.topic, first, last, timeout=_LOAD_TIMEOUT_SECONDS)
            await connection.execute("checkpoint")

    async def until_idle(self, *, timeout_seconds: float = 30.0) -> None:
        """Wait until the relay holds the lock by which it says that it waits for a notification.

        Raises:
            TimeoutError: it never did.
        """
        async with asyncio.timeout(timeout_seconds):
            while not await self.pool.fetchval(_IDLE, _WAKE_LOCK):  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(_LOOK_SECONDS)

    async def wal_position(self) -> int:
        """The end of the write-ahead log, in bytes."""
        return int(await self.pool.fetchval("select (pg_current_wal_insert_lsn() - '0/0')::bigint"))


class Servers:
    """PostgreSQL and Kafka: embedded, Apache Kafka itself, or whatever the environment names."""

    def __init__(self, databases: Databases, kafka: str, *, real_kafka: bool, broker: Broker | None) -> None:
        """For `servers`."""
        self.databases = databases
        self.kafka = kafka
        self.real_kafka = real_kafka
        self._broker = broker

    @asynccontextmanager
    async def fresh(self) -> AsyncIterator[Ground]:
        """A ground of its own for one measurement; the embedded broker is empty and young for each."""
        name = f"bench_{uuid4().hex[:12]}"
        if self._broker is not None:
            await asyncio.to_thread(self._broker.restart)
        url = await asyncio.to_thread(self.databases.create_database, name)
        topic = workload.TOPIC if self._broker is not None else f"{workload.TOPIC}.{name}"
        await self._create_topic(topic)
        try:
            async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool, Ends(self.kafka, topic) as ends:
                await migrate.up(pool)
                await pool.execute(workload.CREATE_MAKERS)
                yield Ground(url, self.kafka, self.real_kafka, topic, pool, ends)
        finally:
            await asyncio.to_thread(self.databases.drop_database, name)
            if self._broker is None:
                await self._with_admin(lambda admin: admin.delete_topics([topic]))

    async def _create_topic(self, topic: str) -> None:
        answer = await self._with_admin(lambda admin: admin.create_topics([NewTopic(topic, workload.PARTITIONS, 1)]))
        for name, code, *message in answer.topic_errors:
            if code != 0:
                raise RuntimeError(f"creating topic {name} failed: {code} {message}")

    async def _with_admin(self, call: Callable[[Any], Any]) -> Any:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.kafka)
        await admin.start()
        try:
            return await call(admin)
        finally:
            await admin.close()


@contextmanager
def running(*, real_kafka: bool, logical: bool) -> Iterator[Servers]:
    """Servers for one run; `logical` is the WAL level that Debezium needs."""
    with ExitStack() as stack:
        url = os.environ.get(embedded.DATABASE_URL)
        settings = {"wal_level": "logical"} if logical else {}
        databases = Databases(url) if url else stack.enter_context(Postgres(settings=settings))
        kafka = os.environ.get(embedded.KAFKA_BOOTSTRAP_SERVERS)
        broker = None
        if not kafka and real_kafka:
            from benchmarks.real_kafka import Kafka

            kafka = stack.enter_context(Kafka()).bootstrap_servers
        elif not kafka:
            broker = stack.enter_context(Broker())
            kafka = broker.bootstrap_servers
        yield Servers(databases, kafka, real_kafka=broker is None, broker=broker)
