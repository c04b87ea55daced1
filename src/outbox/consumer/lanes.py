"""Lanes: what becomes of each partition that the group assigns to this process.

    assigned -> claiming ----------------------------> running <-> (batch by batch)
                 ^   |  a check fails                     |
                 |<--+--> recreated | needs_rebuild       |  fenced, an error, an offset that went back
                 |        (paused, an alarm, a person)    v
                 +------------------------------------ waiting (paused; backoff up to 30 s)

    any state -> revoked

Guarantees:

* A partition is fetched only while its lane is running: it is paused before the assignment callback returns, and
  resumed after the claim has said where to begin. Kafka's committed offset is never read.
* Nothing is kept in memory across an error. The next claim asks the database where it stands and the records are
  fetched again, so a lost reply, a lost partition and a lost connection have one and the same remedy. Polling goes on
  meanwhile, so this process stays in the group, and the other partitions go on.
* A former owner that claims late only costs a claim: its batch, or ours, finds the epoch moved, claims again if the
  partition is still assigned, and goes on where the other stopped.
* A batch that was fetched before a pause is not applied after it: its end has to agree with the fetch position, and
  the claim under which it was fetched has to be the present one. So the batches behind one that failed are dropped.
* A partition whose batch takes long does not keep the others from theirs: those that wait behind it are dropped, and
  read again when it is over.
* That a partition stands still is stored, so that `outbox status` shows it and its caches count as stale. It goes on
  when `outbox cache rebuild` has set it free.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final

from outbox import clock, crash_sites, kafka, limits, retry
from outbox.consumer.apply import Engine, Outcome, Partition
from outbox.consumer.lane import ALARMS, RESTARTING, Lane, ReadOne, Source, State, abandon
from outbox.consumer.record import Record, event_id
from outbox.errors import ParkingFull
from outbox.kafka import TopicPartition

log = logging.getLogger(__name__)

_SITES: Final = {name: crash_sites.register(f"consumer.kafka.{name}") for name in ("ends", "last", "commit")}


class Lanes:
    """All lanes of one consumer."""

    def __init__(self, engine: Engine, source: Source, read_one: ReadOne, *, revoke_seconds: float) -> None:
        """Feeding `engine` from `source`; a revocation waits `revoke_seconds` for open batches."""
        self._engine = engine
        self._revoke_seconds = revoke_seconds
        self._source = source
        self._read_one = read_one
        self._lanes: dict[TopicPartition, Lane] = {}
        self._stopping = asyncio.Event()
        self._open: set[asyncio.Task[None]] = set()
        """Batches begun."""
        self.totals = Outcome()
        """Of all batches since the start."""
        self.failures = 0
        """Batches, claims and retries that raised, and advisory commits that failed."""

    @property
    def states(self) -> dict[TopicPartition, State]:
        """The assigned partitions and how they are."""
        return {at: lane.state for at, lane in self._lanes.items()}

    # ------------------------------------------------------------------------------------ assignment

    def assigned(self, partitions: Iterable[TopicPartition]) -> None:
        """Pause first, claim in the background: no heartbeat is sent while the callback runs."""
        partitions = list(partitions)
        self._source.pause(*partitions)
        for at in partitions:
            if (former := self._lanes.get(at)) is not None:  # assigned again without a word of its loss
                abandon(former)
            lane = self._lanes[at] = Lane(at)
            lane.task = asyncio.create_task(self._claim_until_running(lane), name=f"claim of {at.topic}/{at.partition}")

    async def revoked(self, partitions: Iterable[TopicPartition]) -> None:
        """Begin no batch any more; wait, but not for long, for those that are open. The epoch fences what remains."""
        lanes = [lane for at in partitions if (lane := self._lanes.pop(at, None))]
        for lane in lanes:
            abandon(lane)
        try:
            async with asyncio.timeout(self._revoke_seconds):
                for lane in lanes:
                    async with lane.batch:
                        pass
        except TimeoutError:
            log.warning("partitions were taken away while batches were open; their commits will be fenced")

    async def close(self) -> None:
        """Let go of everything, as at a revocation."""
        self._stopping.set()
        await self.revoked(list(self._lanes))
        for task in self._open:
            task.cancel()

    # ----------------------------------------------------------------------------------------- batches

    async def take(self, records: Iterable["kafka.ConsumerRecord"]) -> None:
        """Begin to apply what one poll returned; returns when there is room for another. Never raises.

        So PostgreSQL works on one partition while the next one is fetched and decoded. Batches of one partition
        follow one another.
        """
        self._begin(records)
        while len(self._open) >= limits.BATCHES_IN_FLIGHT:
            patience = limits.SLOW_BATCH_SECONDS
            ended, _ = await asyncio.wait(self._open, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not ended:
                self._set_aside()

    async def deliver(self, records: Iterable["kafka.ConsumerRecord"]) -> None:
        """Apply what one poll returned, partitions side by side. Never raises: what fails is fetched again."""
        if begun := self._begin(records):
            await asyncio.wait(begun)

    def _begin(self, records: Iterable["kafka.ConsumerRecord"]) -> list[asyncio.Task[None]]:
        begun = []
        for at, batch in _by_partition(records):
            if (lane := self._lanes.get(at)) is None:
                continue
            task = asyncio.create_task(self._feed(lane, lane.partition, batch), name=f"batch of {at}")
            self._open.add(task)
            lane.open.append(task)
            task.add_done_callback(partial(self._ended, lane))
            begun.append(task)
        return begun

    def _ended(self, lane: Lane, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        lane.open.remove(task)
        if lane.is_aside and not lane.open and lane.state is State.RUNNING and lane.at in self._source.assignment():
            assert lane.partition is not None
            lane.is_aside = False
            self._source.seek(lane.at, lane.partition.next_offset)
            self._source.resume(lane.at)

    def _set_aside(self) -> None:
        """Nothing ended for long: what waits behind a slow batch gives its place to other partitions."""
        for lane in self._lanes.values():
            if len(lane.open) > 1 and lane.state is State.RUNNING:
                log.info("%s: its batch takes long; it is read on when that is over", lane.at)
                lane.is_aside = True
                self._source.pause(lane.at)
                for task in lane.open[1:]:
                    task.cancel()

    async def _feed(self, lane: Lane, partition: Partition | None, records: Sequence[Record]) -> None:
        at = lane.at
        async with lane.batch:  # in the order of the polls: the lock is fair
            if lane.state is not State.RUNNING or partition is None or lane.partition is not partition:
                return  # among others: fetched before a claim, behind a batch that failed
            try:
                if await self._source.position(at) <= records[-1].offset:
                    return  # fetched before the last seek
                if records[0].offset != partition.next_offset and await self._broken(lane, records[0].offset):
                    return
                outcome = await self._apply(lane, partition, records)
            except Exception as error:  # noqa: BLE001 - whatever it was, the records are read again; nothing may reach FastStream
                if isinstance(error, ParkingFull):
                    await self._make_room(lane, partition)
                self._stumble(lane, error)
                return
            except asyncio.CancelledError as error:  # of a lane that goes on, or its records would pass for a gap
                self._stumble(lane, error)
                raise
            if outcome.fenced:
                self._stumble(lane, None)
            else:
                lane.pauses = retry.backoff()

    async def _apply(self, lane: Lane, partition: Partition, records: Sequence[Record]) -> Outcome:
        """A portion at a time, as long as the partition is ours; the outcome of the last one."""
        outcome = Outcome()
        for portion in lane.pace.portions(records):
            with lane.pace.timed(len(portion)):
                outcome = await self._engine.apply(partition, portion)
            self.totals += outcome
            if outcome.fenced or lane.state is not State.RUNNING:
                break
        return outcome

    async def _broken(self, lane: Lane, first_offset: int) -> bool:
        """Whether a jump of offsets is anything but a gap that compaction or a transaction marker left."""
        assert lane.partition is not None
        if first_offset < lane.partition.next_offset:
            log.error("%s: offsets went back from %d to %d", lane.at, lane.partition.next_offset, first_offset)
            self._stumble(lane, None)
            return True
        begin = await self._source.beginning_offsets([lane.at])
        if begin[lane.at] <= lane.partition.next_offset:
            return False
        self._source.pause(lane.at)
        lane.state = State.CLAIMING
        lane.task = asyncio.create_task(
            self._claim_until_running(lane), name=f"claim of {lane.at.topic}/{lane.at.partition}"
        )
        return True

    def _stumble(self, lane: Lane, error: BaseException | None) -> None:
        """Pause, wait, claim again."""
        if lane.state is State.REVOKED or lane.at not in self._source.assignment():
            return
        self._source.pause(lane.at)
        lane.state = State.WAITING
        delay = next(lane.pauses)
        if error is None:
            log.warning("%s: the stored position is not ours any more; claiming again", lane.at)
        else:
            self._complain(lane, error, delay)
        lane.task = asyncio.create_task(
            self._claim_until_running(lane, delay), name=f"claim of {lane.at.topic}/{lane.at.partition}"
        )

    def _complain(self, lane: Lane, error: BaseException, delay: float) -> None:
        self.failures += 1
        if isinstance(error, ParkingFull):
            log.error("%s stands still: %s", lane.at, error)
        elif retry.is_transient(error) or isinstance(error, kafka.KafkaError):
            log.warning("%s: %r; again in %.2f s", lane.at, error, delay)
        else:
            log.critical("%s stands still, and waiting may not mend it: %r", lane.at, error, exc_info=error)

    # ------------------------------------------------------------------------------------------ claims

    async def _claim_until_running(self, lane: Lane, delay: float = 0.0) -> None:
        while not (await retry.pause(delay, self._stopping) if delay else self._stopping.is_set()):
            lane.state = State.CLAIMING
            try:
                state = await self._claim(lane)
            except Exception as error:  # noqa: BLE001 - whatever it was, the partition stays paused and is tried again
                lane.state = State.WAITING
                delay = next(lane.pauses)
                self._complain(lane, error, delay)
                continue
            if lane.state is State.REVOKED:
                return
            if state is not State.RUNNING:
                await self._stand_still(lane, state)
                continue
            # No await from here on: a fetch can only be of the position just sought.
            assert lane.partition is not None
            self._source.seek(lane.at, lane.partition.next_offset)
            lane.state = State.RUNNING
            lane.is_aside = False
            self._source.resume(lane.at)
            return

    async def _claim(self, lane: Lane) -> State:
        """Claim, compare what is stored with what Kafka has, and store what came of it."""
        at = lane.at
        await crash_sites.visit(_SITES["ends"], "before")
        begin = (await self._source.beginning_offsets([at]))[at]
        end = (await self._source.end_offsets([at]))[at]
        await crash_sites.visit(_SITES["ends"], "after")
        partition = lane.partition = await self._engine.claim(at.topic, at.partition, begin)
        if partition.state == RESTARTING:
            await self._engine.restart(partition, begin)
            return State.RUNNING
        state = await self._compare(at, partition, begin, end)
        if partition.state != state.value:
            await self._engine.set_state(partition, state.value)
        return state

    async def _compare(self, at: TopicPartition, partition: Partition, begin: int, end: int) -> State:
        if partition.next_offset < begin:
            return State.NEEDS_REBUILD
        last: Record | None = None
        if partition.last_event_id is not None and partition.next_offset > begin:
            await crash_sites.visit(_SITES["last"], "before")
            try:
                async with asyncio.timeout(limits.LAST_RECORD_TIMEOUT_SECONDS):
                    last = await self._read_one(at, partition.next_offset - 1)
            except TimeoutError:
                if partition.next_offset <= end:
                    raise
            await crash_sites.visit(_SITES["last"], "after")
            if last is not None and event_id(last) != partition.last_event_id:
                return State.RECREATED
        # The record outweighs the end: the embedded broker understates it while the last batch has several records.
        return State.RECREATED if partition.next_offset > end and last is None else State.RUNNING

    async def _stand_still(self, lane: Lane, state: State) -> None:
        """Until a person has set the partition free, or has made it forget where it stood."""
        assert lane.partition is not None
        lane.state = state
        log.critical("%s stands still at offset %d: %s", lane.at, lane.partition.next_offset, ALARMS[state])
        while not await retry.pause(limits.HALTED_LOOK_SECONDS, self._stopping):
            try:
                stored = await self._engine.stored_state(lane.at.topic, lane.at.partition)
            except Exception as error:  # noqa: BLE001 - the partition stands still anyway; look again
                self._complain(lane, error, limits.HALTED_LOOK_SECONDS)
                continue
            if stored in {None, RESTARTING}:
                return

    # ---------------------------------------------------------------------------------------- parked keys

    async def keep_retrying(self, stopping: asyncio.Event) -> None:
        """Try parked keys of this process's partitions when their time has come."""
        while not await retry.pause(limits.PARKED_LOOK_SECONDS, stopping):
            await self.retry_parked()

    async def retry_parked(self) -> None:
        """Look once, and try what is due. Never raises: it is looked again soon."""
        running = [(at.topic, at.partition) for at, lane in self._lanes.items() if lane.state is State.RUNNING]
        if not running:
            return
        try:
            due = await self._engine.due(running)
        except Exception as error:  # noqa: BLE001 - whatever it was, parked keys wait, and nothing else has to
            self._complain_of_retry("parked keys were not looked for", error)
            return
        trying = [self._retry(TopicPartition(topic, number)) for topic, number in due]
        await asyncio.gather(*trying, return_exceptions=True)  # a handler may have cancelled its own task

    async def _retry(self, at: TopicPartition) -> None:
        lane = self._lanes.get(at)
        if lane is None:
            return
        async with lane.batch:
            if lane.state is not State.RUNNING or lane.partition is None:
                return
            try:
                outcome = await self._engine.retry(lane.partition)
            except Exception as error:  # noqa: BLE001 - it was rolled back, or happened: either way the next look tells
                self._complain_of_retry(f"{at}: parked keys were not tried", error)
                return
            self.totals += outcome
            if outcome.fenced:
                self._stumble(lane, None)

    async def _make_room(self, lane: Lane, partition: Partition) -> None:
        """The park is full, so the lane is about to wait, and nobody tries what is parked then: try what is due now."""
        try:
            retried = True
            while retried and lane.state is State.RUNNING:
                outcome = await self._engine.retry(partition)
                self.totals += outcome
                retried = outcome.retried > 0
        except Exception as error:  # noqa: BLE001 - as in `_retry`; the lane claims again anyway
            self._complain_of_retry(f"{lane.at}: parked keys were not tried", error)

    def _complain_of_retry(self, what: str, error: Exception) -> None:
        self.failures += 1
        level = logging.WARNING if retry.is_transient(error) else logging.ERROR
        log.log(level, "%s: %r; again in %.0f s", what, error, limits.PARKED_LOOK_SECONDS)

    # ------------------------------------------------------------------------------------ advisory commit

    async def keep_committing(self, stopping: asyncio.Event) -> None:
        """Tell Kafka how far we are, for lag tools; nothing depends on it."""
        while not await retry.pause(limits.COMMIT_EVERY_SECONDS, stopping):
            await self.commit()

    async def commit(self) -> None:
        """Tell Kafka now."""
        moved = {
            at: lane.partition.next_offset
            for at, lane in self._lanes.items()
            if lane.state is State.RUNNING and lane.partition and lane.partition.next_offset != lane.committed
        }
        if not moved:
            return
        started = clock.monotonic()
        try:
            await crash_sites.visit(_SITES["commit"], "before")
            async with asyncio.timeout(limits.COMMIT_EVERY_SECONDS):
                await self._source.commit(moved)
            await crash_sites.visit(_SITES["commit"], "after")
        except (kafka.KafkaError, OSError, TimeoutError) as error:
            self.failures += 1
            log.info("advisory commit of offsets failed after %.1f s: %r", clock.monotonic() - started, error)
            return
        for at, offset in moved.items():
            if lane := self._lanes.get(at):
                lane.committed = offset


def _by_partition(
    records: Iterable["kafka.ConsumerRecord"],
) -> Iterable[tuple[TopicPartition, list["kafka.ConsumerRecord"]]]:
    """A poll's records, which come partition after partition."""
    batches: dict[TopicPartition, list[kafka.ConsumerRecord]] = {}
    at, batch = TopicPartition("", -1), list[kafka.ConsumerRecord]()
    for record in records:
        if record.partition != at.partition or record.topic != at.topic:
            at = TopicPartition(record.topic, record.partition)
            batch = batches.setdefault(at, [])
        batch.append(record)
    return batches.items()
