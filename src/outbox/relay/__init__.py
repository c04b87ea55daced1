"""The relay: publishes committed events to Kafka, in order, without loss.

    take the lease -> restore guard -> replay -> read a window -> log it -> publish it -> done
         ^                                            ^                              |
         |  any error, a lost connection, SIGTERM     +------------------------------+
         +------------------------------------------------------------------------- ...

Guarantees:

* Every committed event reaches Kafka: a window is what became visible between two snapshots, and the next one starts
  where the last logged one ended (`window`).
* Per key, first occurrences arrive in causal order: rows are ordered by position, a partition has one unacknowledged
  batch, and nothing follows a failed one (`publish`).
* Duplicates come only from a failure, at most `windows_in_flight` x `window_max_events` a failure and shard, and they
  carry the positions of the first delivery.
* A zombie cannot log what its successor has not (`lease`), and a restored database publishes nothing until somebody
  says so (`restore`).
* A key that cannot be published is parked; the others go on (`publish`, `parking`). It comes back in order (`release`).
"""

import asyncio
import logging
from uuid import uuid4

from outbox import kafka, limits, postgres, retry
from outbox.errors import RestoreDetected, ShardUnavailable
from outbox.loop import Loop
from outbox.postgres import Pool
from outbox.relay import topics
from outbox.relay.lease import shards
from outbox.relay.shard import Shard, Surroundings
from outbox.settings import Settings
from outbox.upkeep import migrate
from outbox.upkeep.topics import Use, report

log = logging.getLogger(__name__)

__all__ = ["Relay"]


class Relay(Loop):
    """Relays every shard that it can lease; further relays stand by and take over.

        async with asyncpg.create_pool(dsn) as pool, Relay(pool, "kafka:9092") as relay:
            await relay.run()

    Needs up to four connections of the pool a shard, one of them held.
    """

    def __init__(self, db: Pool, kafka: str, *, settings: Settings | None = None) -> None:
        """A relay for the log in `db`, to the Kafka brokers named in `kafka`.

        Args:
            db: a pool on the service's database; direct, not through a transaction pooler, or see `Settings.wakeup`.
            kafka: bootstrap servers.
            settings: from the environment (`SAGABOX_*`) where not given.
        """
        self._settings = settings or Settings()
        super().__init__(drain_timeout_seconds=self._settings.drain_timeout_seconds)
        self._around = Surroundings(
            pool=db, servers=kafka, settings=self._settings, owner=uuid4(), stopping=self._stopping
        )

    async def _main(self) -> None:
        """Serve all shards until told to stop.

        Raises:
            NotMigrated: the database lacks the log.
            RestoreDetected: a shard's guard refused; an operator has to decide.
        """
        numbers: list[int] = []
        async for attempt in retry.attempts(stopping=self._stopping):
            with attempt:
                await migrate.check(self._around.pool)
                numbers = await shards(self._around.pool)
        checking = asyncio.create_task(self._check_topics(), name="settings of topics")
        try:
            async with asyncio.TaskGroup() as group:
                for number in numbers:
                    group.create_task(self._keep_serving(number), name=f"relay of shard {number}")
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        finally:
            checking.cancel()
            await asyncio.wait({checking})

    async def _check_topics(self) -> None:
        """Say once what is unsafe about the topics that were published to; nothing waits for it."""
        try:
            rows = await topics.SQL.known.fetch(self._around.pool)
        except (postgres.PostgresError, *postgres.CONNECTION_ERRORS) as error:
            log.info("the settings of topics are not checked: %r", error)
            return
        limit = limits.RECORD_MAX_BYTES
        uses = {row["topic"]: Use(is_published=True, emit_max_bytes=row["max_message_bytes"] or limit) for row in rows}
        if uses:
            await report(self._around.servers, uses)

    async def _keep_serving(self, number: int) -> None:
        shard = Shard(number, self._around)
        pauses = retry.backoff(maximum=self._settings.lease_seconds)
        while not self._stopping.is_set():
            try:
                if await shard.tenure():
                    return
                await retry.pause(self._settings.lease_seconds / 8, self._stopping)  # standing by
                pauses = retry.backoff(maximum=self._settings.lease_seconds)
            except RestoreDetected:
                raise
            except ShardUnavailable as error:
                log.warning("%s", error)
            except (kafka.KafkaError, postgres.PostgresError, *postgres.CONNECTION_ERRORS) as error:
                if postgres.sqlstate(error) == postgres.RESTORED:
                    raise RestoreDetected(str(error)) from error
                if postgres.sqlstate(error) == postgres.PARKING_FULL:
                    log.critical("%s; the shard stands still: see `outbox parked list`, then retry or discard", error)
                else:
                    log.warning("shard %s: %r; starting again from the log", number, error)
                await retry.pause(next(pauses), self._stopping)
