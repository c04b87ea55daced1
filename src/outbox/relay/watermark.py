"""Watermarks: the relay's word that everything committed before a moment is in Kafka.

    due -> moment (a statement of its own) -> read -> ... -> all of it done -> what is parked -> sent -> due again
                                               |              ^
                                               +- windows ----+

A consumer that has no lag may still be stale: the relay may stand still. So each shard says about once a second how far
it got, on a small compacted topic of its own, and a consumer that has applied the offsets which a watermark lists has
everything that had committed by its `as_of`.

Guarantees:

* The moment lies before the snapshot of the read that follows it, so that read, or the backlog that it turns into,
  finds everything committed before. Sent is a watermark only when all windows up to what was found are done.
* What is parked is looked up after that. A parked key is named by its hash; one released meanwhile holds the watermark
  back until the window that released it is done as well. Above the bound of hashes no watermark is sent.
* The offsets are those of every partition that this shard was ever published to, by earlier tenures too: they begin
  with what `outbox.shards` remembers, which was persisted together with what was done.
* Publishing never waits for a watermark. It has a producer of its own; what goes wrong is logged, and the next one is
  tried when it is due. A zombie's late watermark says what was true.

A crash at any line loses a watermark and nothing else: the successor's first one says more.
"""

import asyncio
import json
import logging
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from outbox import clock, kafka, kafka_admin, limits, postgres
from outbox.postgres import Connection
from outbox.relay.lease import Lease
from outbox.relay.publish import Publisher
from outbox.settings import Settings

log = logging.getLogger(__name__)
SQL: Final = postgres.Statements("outbox", "relay/watermark.sql")

_STOP_SECONDS: Final = 1.0


@dataclass(slots=True)
class _Pending:
    """A moment that waits until what had committed by then is done.

    Attributes:
        as_of: of the database's clock.
        oldest_xid: every transaction below it was over.
        shard_count: of the log.
        through: the window that has to be done; None until the read that follows the moment has ended.
    """

    as_of: datetime
    oldest_xid: int
    shard_count: int
    through: int | None = None


class Watermarks:
    """The watermarks of one tenure of one shard."""

    def __init__(self, servers: str, settings: Settings, lease: Lease) -> None:
        """Published to `servers` under the given lease; connects on first use."""
        self._servers = servers
        self._settings = settings
        self._lease = lease
        self._producer = kafka.Producer(servers, settings, idempotent=False)
        self._topic_exists = False
        self._pending: _Pending | None = None
        self._due_at = 0.0
        self._sending: asyncio.Task[None] | None = None
        self._failing = False
        self._over_bound = False

    @property
    def until_due(self) -> float:
        """Seconds until there is something to do. What is pending waits for windows; those in flight are polled."""
        if self._is_busy:
            return self._settings.watermark_seconds
        return max(self._due_at - clock.monotonic(), 0.0)

    @property
    def _is_busy(self) -> bool:
        return self._pending is not None or (self._sending is not None and not self._sending.done())

    async def moment(self, connection: Connection, log_id: str) -> None:
        """Before a read: take the moment, where a watermark is due and none is on its way."""
        if self._is_busy or clock.monotonic() < self._due_at:
            return
        self._due_at = clock.monotonic() + self._settings.watermark_seconds
        row = await SQL.moment.fetchrow(connection, self._lease.shard, self._lease.epoch, log_id)
        if row is not None:
            self._pending = _Pending(row["as_of"], row["oldest_xid"], row["shard_count"])

    def found_through(self, window_no: int) -> None:
        """After the read, and the whole of the backlog that it may have become: the last window logged."""
        if self._pending is not None and self._pending.through is None:
            self._pending.through = window_no

    async def send_if_done(self, connection: Connection, log_id: str, publisher: Publisher) -> None:
        """Send what is pending, if all of it is done; returns before Kafka has it."""
        pending = self._pending
        if pending is None or pending.through is None or publisher.done_through < pending.through:
            return
        row = await SQL.parked.fetchrow(connection, self._lease.shard, pending.through, limits.WATERMARK_MAX_PARKED)
        assert row is not None
        if (row["released"] or 0) > publisher.done_through:
            pending.through = row["released"]
            return
        self._pending = None
        if self._is_over_bound(len(row["hashes"])):
            return
        body = json.dumps({
            "as_of": pending.as_of.isoformat(),
            "oldest_xid": pending.oldest_xid,
            "shard": self._lease.shard,
            "shard_count": pending.shard_count,
            "next_offsets": publisher.offsets,
            "parked": row["hashes"],
        })  # fmt: skip
        key = f"{log_id}/{self._lease.shard}"
        self._sending = asyncio.create_task(self._send(key.encode(), body.encode()), name=f"watermark of {key}")

    def _is_over_bound(self, parked: int) -> bool:
        is_over, was_over = parked > limits.WATERMARK_MAX_PARKED, self._over_bound
        self._over_bound = is_over
        if is_over and not was_over:
            log.error(
                "shard %s: more than %s keys are parked, so caches stay as fresh as they are; "
                "see: outbox parked list --parker relay",
                self._lease.shard,
                limits.WATERMARK_MAX_PARKED,
            )
        return is_over

    async def _send(self, key: bytes, body: bytes) -> None:
        """One watermark, once; the next one says more than a second try of this would."""
        topic = self._settings.watermark_topic
        generation = self._producer.generation
        try:
            async with asyncio.timeout(self._settings.publish_timeout_seconds):
                if not self._topic_exists:
                    await kafka_admin.create_compacted(self._servers, topic)
                    self._topic_exists = True
                await self._producer.start()
                generation = self._producer.generation
                batch = self._producer.batch(is_compressed=False)
                batch.append(timestamp=None, key=key, value=body, headers=[])
                if clock.monotonic() >= self._lease.deadline:
                    return
                await self._producer.send(batch, topic, 0)
        except (kafka.KafkaError, OSError, TimeoutError) as error:
            if not self._failing:
                log.warning(
                    "watermarks cannot be written to topic %s, so caches will not know how fresh they are: %r; "
                    "create it (1 partition, cleanup.policy=compact), or let the relay do so and write to it",
                    topic,
                    error,
                )
            self._failing = True
            self._topic_exists = False
            await self._producer.discard(generation)
        else:
            if self._failing:
                log.info("watermarks are written to topic %s again", topic)
            self._failing = False

    async def stop(self) -> None:
        """What is on its way may arrive, if it is quick: a connection that is cancelled while it is made leaks."""
        if self._sending is not None:
            await asyncio.wait({self._sending}, timeout=_STOP_SECONDS)
            self._sending.cancel()
            await asyncio.gather(self._sending, return_exceptions=True)
        await self._producer.stop()
