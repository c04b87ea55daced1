"""Publishing: per partition one unacknowledged batch, in order, until Kafka has it.

A window's rows are dealt to *lanes*, one a (topic, partition). A lane sends one batch and waits for its
acknowledgement before it builds the next; other lanes go on. That is the fail-stop that order needs: after a failed
batch nothing of the partition follows until the same records have been taken.

What a failure does:

* Kafka refuses a batch for what it contains: the lane halves the batch until one record is found, parks that record's
  key (in the database, under the shard's lock), leaves the key's later records of all windows logged by then out, and
  goes on. Later windows come without them, or release them.
* Anything else (a dead broker, an expired batch, a producer fenced or out of sequence): it is not known whether the
  batch was written. The producer is thrown away, another one is made, and the lane goes on at its first unconfirmed
  record. The records carry the same positions, so our consumers drop what arrives twice.
* The lease runs out: nothing more is sent; the successor replays.

A window is done when all of its lanes are. `done_through` is the largest n with all windows up to n done.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from outbox import clock, kafka, retry, wire
from outbox.postgres import Record
from outbox.relay.lease import Lease
from outbox.relay.window import Offsets, Origin, Progress, Window

log = logging.getLogger(__name__)

Entry = tuple[int, Record]
Park = Callable[[Origin, BaseException], Awaitable[int]]
"""Returns the last window from which parking took the key's events."""

_KEYS_REMEMBERED_MAX: Final = 131_072
_BATCH_MAX_RECORDS: Final = 1_000_000
_COMPRESSED_FROM_RECORDS: Final = 32


@dataclass(slots=True)
class _Task:
    """The part of one window that goes to one partition."""

    window: Window
    prefix: bytes
    entries: list[Entry]


@dataclass(slots=True)
class _Lane:
    topic: str
    partition: int
    filling: list[Entry] = field(default_factory=list)
    queue: deque[_Task] = field(default_factory=deque)
    limit: int = _BATCH_MAX_RECORDS
    """Records of the next batch: halved when one is refused, then growing slowly, as congestion control does."""
    runner: asyncio.Task[None] | None = None


class Publisher:
    """Publishes the windows of one tenure of one shard."""

    def __init__(
        self, producer: kafka.Producer, lease: Lease, source: str, park: Park, missing_topic_seconds: float
    ) -> None:
        """For one lease; `park` parks a key in the database."""
        self._missing_topic_seconds = missing_topic_seconds
        self._producer = producer
        self._lease = lease
        self._source = source
        self._park = park
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._lane_of_key: dict[str, dict[str, _Lane]] = {}
        self._type_headers: dict[tuple[str, int], list[wire.Header]] = {}
        self._parked: dict[tuple[str, str], int] = {}
        """Topic and key to the last window from which parking has the key's records."""
        self._open: dict[int, int] = {}
        """Window number to lanes that are not through with it."""
        self._last = 0
        self._next_offsets: Offsets = {}
        self.offsets: Offsets = {}
        """The next offset of every partition ever published to, by earlier tenures too."""
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._interrupted = False
        self.published = 0

    # -------------------------------------------------------------------------------------------- progress

    def begin(self, done_through: int, offsets: Offsets) -> None:
        """Go on after the windows that earlier tenures finished, and the offsets that they reached."""
        self._last = done_through
        self.offsets = {topic: dict(by_partition) for topic, by_partition in offsets.items()}

    @property
    def done_through(self) -> int:
        """The largest n with all windows up to n done."""
        return min(self._open, default=self._last + 1) - 1

    @property
    def in_flight(self) -> int:
        """Windows submitted and not done."""
        return len(self._open)

    def take_progress(self) -> Progress:
        """What is done, and the next offsets that changed since the last call; to be persisted together."""
        changed, self._next_offsets = self._next_offsets, {}
        return Progress(self.done_through, changed)

    def found(self, ends: Offsets) -> None:
        """Take in where partitions end; what was acknowledged since, or is known to reach further, stays."""
        for topic, by_partition in ends.items():
            known = self.offsets.setdefault(topic, {})
            for partition, end in by_partition.items():
                known[partition] = max(end, known.get(partition, end))
            changed = self._next_offsets.get(topic, {})
            self._next_offsets[topic] = {partition: known[partition] for partition in by_partition} | changed

    def interrupt(self) -> None:
        """Let `room` return at once from now on: the relay is asked to stop."""
        self._interrupted = True
        self._changed.set()

    async def room(self, windows: int) -> None:
        """Wait until fewer than `windows` are in flight, or until interrupted.

        Raises:
            ShardUnavailable: the lease ran out. Database errors of parking come out here as well.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            if self.in_flight < windows or self._interrupted:
                return
            self._changed.clear()
            await self._changed.wait()

    async def drained(self) -> None:
        """Wait until nothing is in flight; raises what `room` raises."""
        self._interrupted = False
        await self.room(1)

    # ---------------------------------------------------------------------------------------------- dealing

    def submit(self, window: Window, counts: dict[str, int]) -> None:
        """Hand a logged window over; every topic in it is pinned in `counts`, the others were parked."""
        assert window.number == self._last + 1, "windows come in order and without gaps"
        touched: list[_Lane] = []
        for entry in window.entries:
            topic, key = entry[1]["topic"], entry[1]["key"]
            by_key = self._lane_of_key.get(topic)
            lane = by_key.get(key) if by_key is not None else None
            if lane is None:
                lane = self._lane(topic, key, counts[topic])
            if not lane.filling:
                touched.append(lane)
            lane.filling.append(entry)
        self._last = window.number
        self._open[window.number] = len(touched)
        prefix = wire.position_prefix(window.log_id, self._lease.shard, window.number)
        for lane in touched:
            lane.queue.append(_Task(window, prefix, lane.filling))
            lane.filling = []
            if lane.runner is None:
                lane.runner = asyncio.create_task(self._run(lane), name=f"lane {lane.topic}/{lane.partition}")
        if not touched:
            self._finish(window.number, 0)

    def _lane(self, topic: str, key: str, partition_count: int) -> _Lane:
        partition = kafka.partition_hash(key) % partition_count
        lane = self._lanes.get((topic, partition))
        if lane is None:
            lane = self._lanes[topic, partition] = _Lane(topic, partition)
        by_key = self._lane_of_key.setdefault(topic, {})
        if len(by_key) >= _KEYS_REMEMBERED_MAX:
            by_key.clear()
        by_key[key] = lane
        return lane

    def _finish(self, number: int, lanes: int) -> None:
        self._open[number] -= lanes
        if not self._open[number]:
            del self._open[number]
        self._changed.set()

    # ---------------------------------------------------------------------------------------------- sending

    async def _run(self, lane: _Lane) -> None:
        try:
            while lane.queue:
                await self._publish(lane, lane.queue[0])
                task = lane.queue.popleft()
                self._finish(task.window.number, 1)
        except Exception as error:  # noqa: BLE001 - it ends the tenure: room() raises it
            self._failure = self._failure or error
            self._changed.set()
        finally:
            lane.runner = None

    async def _publish(self, lane: _Lane, task: _Task) -> None:
        """All records of one task, in order; returns when Kafka has the last."""
        at, following = 0, 0
        pauses: Iterator[float] | None = None
        missing_since: float | None = None
        while at < len(task.entries):
            self._lease.check()
            generation = self._producer.generation
            try:
                await self._producer.start()
                generation = self._producer.generation
                batch, following = self._build(task, at, lane.limit)
                if batch.record_count():
                    offset = await self._producer.send(batch, lane.topic, lane.partition)
                    end = offset + batch.record_count()
                    self._next_offsets.setdefault(lane.topic, {})[lane.partition] = end
                    self.offsets.setdefault(lane.topic, {})[lane.partition] = end
                    self.published += batch.record_count()
                lane.limit = min(lane.limit + lane.limit // 8 + 1, _BATCH_MAX_RECORDS)
                at, pauses, missing_since = following, None, None
            except kafka.UNPUBLISHABLE as error:
                lane.limit = await self._narrow(task, at, following, error)
            except (kafka.KafkaError, OSError, TimeoutError) as error:
                if isinstance(error, kafka.UnknownTopicOrPartitionError | kafka.TopicAuthorizationFailedError):
                    missing_since = missing_since or clock.monotonic()
                    if clock.monotonic() - missing_since > self._missing_topic_seconds:
                        await self._park_all(task, at, error)
                log.warning("partition %s/%s: %r; another producer goes on", lane.topic, lane.partition, error)
                await self._producer.discard(generation)
                pauses = pauses or retry.backoff()
                await asyncio.sleep(next(pauses))

    async def _narrow(self, task: _Task, at: int, following: int, error: BaseException) -> int:
        """After a refused batch: half of it next time, or its only record's key is parked."""
        live = [entry for entry in task.entries[at:following] if not self._is_parked(entry, task.window.number)]
        if len(live) > 1:
            return max(1, (following - at) // 2)
        ordinal, row = live[0]
        await self.park(task.window.number, ordinal, row, error)
        return 1

    async def _park_all(self, task: _Task, at: int, error: BaseException) -> None:
        for entry in task.entries[at:]:
            if not self._is_parked(entry, task.window.number):
                await self.park(task.window.number, *entry, error)

    async def park(self, window_no: int, ordinal: int, row: Record, error: BaseException) -> None:
        """Park a record's key; its later records of all windows are left out from now on."""
        self._lease.check()
        topic, key = row["topic"], row["key"]
        log.error("parked key %r of topic %s: event %s cannot be published: %r", key, topic, row["event_id"], error)
        last_window = await self._park(Origin(window_no, ordinal, topic, key), error)
        if len(self._parked) >= _KEYS_REMEMBERED_MAX:
            done = self.done_through
            self._parked = {place: through for place, through in self._parked.items() if through > done}
        self._parked[topic, key] = last_window

    def _is_parked(self, entry: Entry, window_no: int) -> bool:
        return self._parked.get((entry[1]["topic"], entry[1]["key"]), 0) >= window_no

    def _build(self, task: _Task, at: int, limit: int) -> tuple[kafka.Batch, int]:
        """A batch of the entries from `at` on, at most `limit`; the index after its last entry comes back with it."""
        end = min(at + limit, len(task.entries))
        batch = self._producer.batch(is_compressed=end - at >= _COMPRESSED_FROM_RECORDS)
        entries, prefix, number = task.entries, task.prefix, task.window.number
        append, parked, kinds = batch.append, self._parked, self._type_headers
        for index in range(at, end):
            ordinal, row = entries[index]
            position, transaction_id, topic, key, event_id, event_type, version, users, payload, created_at, _ = row
            kind = event_type, version
            headers = kinds.get(kind)
            if headers is None:
                headers = kinds[kind] = wire.type_headers(self._source, *kind)
            if parked and parked.get((topic, key), 0) >= number:
                continue
            headers = [
                *headers,
                ("ce_id", event_id.encode()),
                (wire.POSITION_HEADER, b"%b%d/%d/%d" % (prefix, ordinal, position, transaction_id)),
            ]
            if users is not None:
                headers += [(name, text.encode()) for name, text in json.loads(users).items()]
            if append(timestamp=created_at, key=key.encode(), value=payload, headers=headers) is None:
                return batch, index  # full; an empty batch takes any record
        return batch, end

    async def stop(self) -> None:
        """Abandon what is in flight; a successor replays it."""
        runners = [lane.runner for lane in self._lanes.values() if lane.runner is not None]
        for runner in runners:
            runner.cancel()
        await asyncio.gather(*runners, return_exceptions=True)
