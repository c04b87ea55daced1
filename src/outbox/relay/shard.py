"""One shard, from taking its lease to losing it.

A *tenure* is: take the lease, run the restore guard, replay what was logged and not done, then read, log, publish.
Any error ends the tenure, and the next one starts from the database's state; nothing is carried over in memory. What
a crash does at each step:

* before the window is logged: nothing was published; the rows are read again, perhaps in a larger window;
* after it is logged, before or while it is published: the same window is replayed, at most `windows_in_flight` of them;
* after it is published, before `done_through` says so: the same.

`done_through` and the next offsets travel in the transaction that logs a later window, or alone after a second.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from outbox import clock, errors, kafka, limits, postgres
from outbox.postgres import Connection, Pool, Record
from outbox.relay import release, restore, window
from outbox.relay.lease import Lease
from outbox.relay.publish import Publisher
from outbox.relay.release import Flags
from outbox.relay.topics import Topics
from outbox.relay.wakeup import Wakeup
from outbox.relay.watermark import Watermarks
from outbox.relay.window import Bounds, Origin, Progress, Span, Window
from outbox.settings import Settings

log = logging.getLogger(__name__)

_PERSIST_AFTER_SECONDS: Final = 1.0
_MISSING_TOPIC_PAUSE_SECONDS: Final = 0.5
_STOP_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all shards of one relay share."""

    pool: Pool
    servers: str
    settings: Settings
    owner: UUID
    stopping: asyncio.Event


class Shard:
    """The relay's work on one shard."""

    def __init__(self, number: int, around: Surroundings) -> None:
        """For shard `number`, until `around.stopping` is set."""
        self._number = number
        self._around = around

    async def tenure(self) -> bool:
        """Serve the shard once; False at once when somebody else holds it, True after SIGTERM.

        Raises:
            ShardUnavailable: the lease was lost.
            RestoreDetected: the guard refuses.
            PostgresError, KafkaError, OSError, TimeoutError: a server failed; the next tenure starts from its state.
        """
        around = self._around
        async with postgres.acquire(around.pool) as connection:
            await restore.refuse_standby(connection)
            lease = await Lease.take(connection, self._number, around.owner, around.settings.lease_seconds)
            if lease is None:
                return False
            log.info("shard %s: lease taken, epoch %s", self._number, lease.epoch)
            keeping = asyncio.create_task(lease.keep(around.pool), name=f"lease of shard {self._number}")
            serving = asyncio.create_task(self._serve(connection, lease), name=f"shard {self._number}")
            try:
                await asyncio.wait({keeping, serving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (keeping, serving):
                    task.cancel()
                ended = await asyncio.gather(keeping, serving, return_exceptions=True)
            for outcome in (ended[1], ended[0]):
                if isinstance(outcome, BaseException) and not isinstance(outcome, asyncio.CancelledError):
                    postgres.drop(
                        connection
                    )  # its locks and its LISTEN end with it, and nobody waits for a dead server
                    await self._give_up(lease)
                    raise outcome
            await lease.release(connection)
        return True

    async def _give_up(self, lease: Lease) -> None:
        """After an error: let whoever is better off have the shard, without waiting for the lease to run out."""
        with contextlib.suppress(postgres.PostgresError, *postgres.CONNECTION_ERRORS):
            async with asyncio.timeout(lease.seconds / 3), postgres.acquire(self._around.pool) as connection:
                await lease.release(connection)

    async def _serve(self, connection: Connection, lease: Lease) -> None:
        await window.SQL.prepare_session.execute(connection)
        producer = kafka.Producer(self._around.servers, self._around.settings)
        try:
            await _Tenure(self._around, connection, lease, producer).serve()
        finally:
            await producer.stop()


class _Tenure:
    """State that lives as long as one lease."""

    def __init__(self, around: Surroundings, connection: Connection, lease: Lease, producer: kafka.Producer) -> None:
        self._settings = around.settings
        self._pool = around.pool
        self._servers = around.servers
        self._stopping = around.stopping
        self._connection = connection
        self._lease = lease
        self._producer = producer
        self._topics = Topics(self._pool, self._servers, producer)
        self._watermarks = Watermarks(around.servers, around.settings, lease)
        self._wakeup = Wakeup(connection, lease.shard, self._settings)
        self._flags = Flags(connection, lease.shard, self._wakeup)
        self._bounds = Bounds(self._settings.window_max_events, self._settings.window_max_bytes)
        self._persisted_through = 0
        self._persist_at: float | None = None

    async def serve(self) -> None:
        """Guard, replay, then go on until the relay stops."""
        await self._topics.load()
        resume = await window.load(self._connection, self._lease.shard)
        ends = await restore.guard(self._connection, self._servers, self._topics.counts, resume.next_offsets)
        source = self._settings.source or resume.source
        self._publisher = Publisher(
            self._producer, self._lease, source, self._park, self._settings.missing_topic_seconds
        )
        self._publisher.begin(resume.done_through, resume.next_offsets)
        self._publisher.found(ends)
        self._persisted_through, self._number = resume.done_through, resume.last_window
        self._log_id, self._cursor = resume.log_id, resume.cursor
        waker = asyncio.create_task(self._wake_when_stopping())
        comparing = asyncio.create_task(self._topics.keep_comparing(), name=f"topics of shard {self._lease.shard}")
        try:
            await self._wakeup.listen()
            await self._replay()
            if resume.rest is not None:
                await self._page(resume.rest)
            while not self._stopping.is_set():
                await self._step()
            await self._drain()
            await self._wakeup.close()
        finally:
            for task in (waker, comparing):
                task.cancel()
            await asyncio.wait({waker, comparing}, timeout=_STOP_SECONDS)
            await self._watermarks.stop()
            await self._publisher.stop()

    async def _drain(self) -> None:
        """Finish what is in flight, or abandon it to the successor's replay, and persist what is done."""
        try:
            async with asyncio.timeout(self._settings.drain_timeout_seconds / 2):
                await self._publisher.drained()
        except TimeoutError:
            log.warning(
                "shard %s: Kafka has not acknowledged in time: abandoning the windows in flight", self._lease.shard
            )
        await self._persist()

    async def _wake_when_stopping(self) -> None:
        await self._stopping.wait()
        self._publisher.interrupt()
        self._wakeup.wake()

    async def _replay(self) -> None:
        async for unfinished in window.unfinished(self._connection, self._lease.shard, self._persisted_through):
            log.info("shard %s: replaying window %s", self._lease.shard, unfinished.number)
            await self._submit(unfinished)

    async def _step(self) -> None:
        """Read once; log and publish what there is, or wait."""
        await self._publisher.room(self._settings.windows_in_flight)
        if self._stopping.is_set() or await self._release():
            return
        await self._watermarks.send_if_done(self._connection, self._log_id, self._publisher)
        await self._watermarks.moment(self._connection, self._log_id)
        found = await window.read(self._connection, self._lease.shard, self._cursor, self._bounds)
        if found is None:
            self._watermarks.found_through(self._number)
            await self._watermarks.send_if_done(self._connection, self._log_id, self._publisher)
            await self._persist_if_due()
            await self._wakeup.found_nothing(min(self._until_persist(), self._watermarks.until_due))
            return
        await self._wakeup.found()
        if isinstance(found, window.TooLarge):
            await self._page(None)
            if not self._stopping.is_set():  # else it may have broken off
                self._watermarks.found_through(self._number)
            return
        span, rows = found
        await self._log(span, rows)
        self._watermarks.found_through(self._number)
        if len(rows) < self._bounds.max_events // 4:
            await self._wakeup.pace()

    async def _page(self, rest: Span | None) -> None:
        """Backlog mode, to its end; a snapshot that grew old is given up for one that goes on behind it."""
        while not self._stopping.is_set():
            rest = await self._page_one_snapshot(rest)
            if rest is None:
                return
            await self._publisher.room(self._settings.windows_in_flight)
            while not self._stopping.is_set() and await self._release():
                await self._publisher.room(self._settings.windows_in_flight)

    async def _page_one_snapshot(self, rest: Span | None) -> Span | None:
        """A window a page; what is left comes back when the snapshot is too old, keys are due or the relay stops."""
        until = clock.monotonic() + limits.BACKLOG_MAX_SECONDS
        async with (
            window.backlog(self._pool, self._lease.shard, self._cursor, rest) as backlog,
            aclosing(backlog.pages(self._bounds)) as pages,
        ):
            left = backlog.span
            async for span, rows in pages:
                try:
                    async with asyncio.timeout(max(until - clock.monotonic(), 0.0)):
                        await self._publisher.room(self._settings.windows_in_flight)
                except TimeoutError:
                    return left
                if self._stopping.is_set() or clock.monotonic() >= until or await self._flags.due():
                    return left
                await self._log(span, rows)
                if span.through is None:
                    return None
                left = replace(left, after=span.through)
        raise AssertionError("the last page of a backlog has no end")

    async def _log(self, span: Span, rows: Sequence[Record]) -> None:
        self._lease.check()
        progress = self._publisher.take_progress()
        diverted = await window.log(self._connection, self._lease, self._number + 1, span, progress)
        await self._logged(progress)
        if span.through is None:
            self._cursor = span.s2
        entries = list(enumerate(rows, 1))
        if diverted:
            entries = [entry for entry in entries if entry[1]["position"] not in diverted]
        await self._submit(Window(self._number, self._log_id, entries))

    async def _release(self) -> bool:
        """Publish events of parked keys that are to be tried again, as a window of its own; whether there were any."""
        if not await self._flags.due():
            return False
        self._lease.check()
        progress = self._publisher.take_progress()
        bounds = self._bounds
        count = await release.log_window(self._connection, self._lease, self._number + 1, bounds, progress)
        self._flags.look_again()
        if not count:
            self._persisted(progress)
            return False
        await self._logged(progress)
        log.info("shard %s: window %s releases %d parked events", self._lease.shard, self._number, count)
        entries = await window.released(self._connection, self._lease.shard, self._number)
        await self._submit(Window(self._number, self._log_id, entries))
        return True

    async def _logged(self, progress: Progress) -> None:
        """One more window is in the log."""
        self._number += 1
        self._persisted(progress)
        if self._number % limits.WINDOWS_KEPT == 0:
            await window.forget(self._connection, self._lease.shard)

    async def _submit(self, logged: Window) -> None:
        """Publish a logged window; keys of topics that stay missing are parked first."""
        missing = {row["topic"] for _, row in logged.entries} - self._topics.counts.keys()
        entries = logged.entries
        if missing:
            await self._pin(missing)
            missing -= self._topics.counts.keys()
            parked = set()
            for ordinal, row in entries:
                place = row["topic"], row["key"]
                if row["topic"] in missing and place not in parked:
                    parked.add(place)
                    await self._publisher.park(logged.number, ordinal, row, _missing(row["topic"]))
            entries = [(ordinal, row) for ordinal, row in entries if row["topic"] not in missing]
        self._publisher.submit(Window(logged.number, logged.log_id, entries), self._topics.counts)

    async def _pin(self, names: set[str]) -> None:
        """Wait for topics that Kafka does not have yet, up to the bound; look through those that are new to the log."""
        for topic in names - self._topics.counts.keys():
            await self._producer.start()
            while (count := await self._topics.pin(topic)) is None and not self._stopping.is_set():
                if self._topics.missing_seconds(topic) > self._settings.missing_topic_seconds:
                    break
                log.warning("topic %s does not exist: waiting for it", topic)
                await asyncio.sleep(_MISSING_TOPIC_PAUSE_SECONDS)
                self._lease.check()
            if count is not None:
                self._publisher.found(await restore.guard(self._connection, self._servers, {topic: count}, {}))

    async def _park(self, origin: Origin, error: BaseException) -> int:
        async with postgres.acquire(self._pool) as connection:
            return await window.park(connection, self._lease, origin, error)

    # -------------------------------------------------------------------------------------------- done_through

    def _persisted(self, progress: Progress) -> None:
        self._persisted_through, self._persist_at = progress.done_through, None

    async def _persist_if_due(self) -> None:
        if self._publisher.done_through > self._persisted_through:
            now = clock.monotonic()
            if self._persist_at is None:
                self._persist_at = now + _PERSIST_AFTER_SECONDS
            elif now >= self._persist_at:
                await self._persist()

    def _until_persist(self) -> float:
        if self._publisher.in_flight:
            return self._settings.poll_max_seconds
        if self._persist_at is None:
            return self._settings.safety_poll_seconds
        return max(self._persist_at - clock.monotonic(), 0.0)

    async def _persist(self) -> None:
        progress = self._publisher.take_progress()
        await window.log_done(self._connection, self._lease, progress)
        self._persisted(progress)


def _missing(topic: str) -> errors.OutboxError:
    return errors.TopicMissing(f"Kafka has no topic {topic}: create it, or let the relay write to it")
