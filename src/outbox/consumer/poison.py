"""One cache's part of a batch: fold, merge, and set aside the keys whose events cannot be applied.

    steps of each key -> fold -> merge (all keys, one statement) -> resolve and park
                                   | a value is refused (SQLSTATE 21, 22, 23, P0001)
                                   v
                         the batch again, carefully: halves under savepoints, down to one key;
                         that key event by event, the first refused one begins its queue

Guarantees:

* All of it happens in the batch's transaction: an event is applied, or parked, or the whole batch is not there. A crash
  at any line leaves the state before the batch.
* A poison event parks its own key and nobody else's. Its later patches queue behind it in order; the next full row or
  `DELETE` takes effect, and what waited is deleted, because that row says all there is to say (ADR 0010).
* A key is parked per cache, so what one cache cannot apply another one can.
* The park is bounded: past the bound the batch fails with `ParkingFull`, and nothing of it is applied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from outbox import clock, limits, retry
from outbox.cache import Cache, Patch, handlers, memory
from outbox.cache.fold import ROW_MISSING, Effect, Fault, Folded, Step, fold, newest_log_only
from outbox.cache.merge import Change, Kind, Merge
from outbox.consumer import parking, retries
from outbox.consumer.parking import BEHIND, Queue
from outbox.consumer.record import Arrival, Record, decode, record_key
from outbox.consumer.record import arrival as read_headers
from outbox.consumer.target import Replayed, Tally
from outbox.errors import EmitError
from outbox.postgres import Connection


class Target:
    """A cache as a consumer feeds it: its live table, or the spare one of a new generation."""

    def __init__(self, cache: Cache[Any], merge: Merge, parker: str) -> None:
        """With the merge prepared for one of its tables; keys that cannot be applied there are parked by `parker`."""
        self.name: Final = parker
        self.topic: Final = cache.topic
        self.merge: Final = merge
        self._cache = cache
        self._is_remembered = cache.memory_max_rows is not None and parker == cache.table  # nobody reads a spare one
        self._handlers = cache.handlers

    def work(self, arrivals: Sequence[Arrival], partition: int) -> "Work":
        """Decode and fold a batch; pure, outside of any transaction."""
        steps, tally = self.steps(arrivals, partition)
        return Work.of(self, partition, [arrival.record for arrival in arrivals], steps, tally)

    def steps(self, arrivals: Sequence[Arrival], partition: int) -> tuple[dict[str, list[Step]], Tally]:
        """What a batch does to each key, and what it does nothing to."""
        steps: dict[str, list[Step]] = {}
        unknown = dropped = 0
        adapter = self._cache.shape.adapter(self._cache.key)
        several_logs = len({arrival.position.log_id for arrival in arrivals if arrival.position}) > 1
        for arrival in arrivals:
            handler = self._handlers.get(arrival.event_type) if arrival.event_type is not None else None
            if handler is None:
                unknown += 1
                continue
            if arrival.is_replay and not self._cache.replays:
                dropped += 1
                continue
            effect: Effect
            event = decode(arrival, handler.event_class)
            if isinstance(event, Fault):
                key, effect = record_key(arrival, partition, adapter), event
            else:
                try:
                    key = handlers.event_key(handler, event)
                except EmitError as error:
                    key, effect = record_key(arrival, partition, adapter), Fault.of(error)
                else:
                    effect = handlers.call(handler, self._cache.shape, event, key)
            step = Step(effect, arrival.position, arrival)
            if key in steps:
                steps[key].append(step)
            else:
                steps[key] = [step]
        if several_logs:
            steps = {key: newest_log_only(of_key) for key, of_key in steps.items()}
        return steps, Tally(unknown=unknown, dropped=dropped)

    async def replay(
        self, connection: Connection, key: str, arrivals: Sequence[Arrival], partition: int, *, until: float
    ) -> Replayed:
        """See `target.Target`. A full row that succeeds makes everything before it irrelevant, as in a batch."""
        steps, tally = self.steps(arrivals, partition)
        strangers = list(steps.keys() - {key})  # of events that could not be read when they were parked
        if strangers and await parking.SQL.waiting.fetch(connection, self.name, self.topic, strangers):
            return Replayed(0, BEHIND)
        if len(steps) > 1:
            for number, arrival in enumerate(arrivals):
                alone = await self.replay(connection, key, [arrival], partition, until=until)
                if alone.fault is not None:
                    return Replayed(number, alone.fault)
            return Replayed(len(arrivals))
        records = [arrival.record for arrival in arrivals]
        work = Work.of(self, partition, records, steps, tally)
        attempt = _Attempt(work, connection)
        await attempt.bisect(work.changes)
        await self.tell(connection, work.changes)
        for queue in attempt.queues:  # one at most: there is one key
            first = queue.steps[0].source.record
            return Replayed(next(n for n, record in enumerate(records) if record is first), queue.fault)
        return Replayed(len(arrivals))

    async def tell(self, connection: Connection, changes: Sequence[Change]) -> None:
        """Let processes that remember rows of the table forget these, once the transaction commits."""
        if self._is_remembered and changes:
            await memory.notify(connection, self.merge.table.oid, [change.key for change in changes])


@dataclass(slots=True)
class Work:
    """What a batch does to one cache.

    Steps are not kept, but for keys that wait: thousands of decoded events would burden the garbage collector until the
    batch is over. The few batches that need them again decode their records again; handlers are pure.
    """

    target: Target
    partition: int
    records: Sequence[Record]
    count: int
    """Events with a handler."""
    tally: Tally
    changes: list[Change] = field(default_factory=list)
    queues: list[Queue] = field(default_factory=list)
    _kept: dict[str, list[Step]] = field(default_factory=dict)
    _again: dict[str, list[Step]] | None = None

    @classmethod
    def of(
        cls, target: Target, partition: int, records: Sequence[Record], steps: dict[str, list[Step]], tally: Tally
    ) -> "Work":
        """Fold and encode each key's steps."""
        work = cls(target, partition, records, sum(map(len, steps.values())), tally)
        for key, of_key in steps.items():
            folded = work._encoded(key, of_key)
            if folded.queue:
                assert folded.fault is not None
                work.queues.append(Queue(key, folded.fault, folded.queue))
        return work

    @property
    def keeps_plans(self) -> bool:
        """Full rows alone: see `merge_rows`."""
        return all(change.kind is Kind.ROW for change in self.changes)

    def steps_of(self, key: str) -> list[Step]:
        """All steps of a key, in order."""
        if key in self._kept:
            return self._kept[key]
        if self._again is None:
            self._again, _ = self.target.steps([read_headers(record) for record in self.records], self.partition)
        return self._again[key]

    def _encoded(self, key: str, steps: list[Step]) -> Folded:
        """Fold and encode one key; a value without a JSON form is the fault of the event that brought it."""
        while True:
            folded = fold(steps)
            if folded.last is None:
                return folded
            try:
                self.changes.append(self.target.merge.change(key, folded, self.partition))
            except ValueError as error:
                folded.last.effect = Fault.of(error)
                self._kept[key] = steps
            else:
                return folded

    async def run(self, connection: Connection, *, waiting: bool, careful: bool) -> Tally:
        """Merge, resolve and park, in the batch's transaction.

        Args:
            connection: with the partition's row locked.
            waiting: whether the cache has any parked key in the topic.
            careful: find the guilty keys of a batch that was refused as a whole.
        """
        attempt = _Attempt(self, connection)
        if waiting and self.changes:
            await attempt.look_behind()
        if careful:
            await attempt.bisect(attempt.changes)
        elif attempt.changes:
            attempt.settle(attempt.changes, await self.target.merge(connection, attempt.changes))
        await self.target.tell(connection, attempt.changes)
        return await attempt.finish()


class _Attempt:
    """One try at a `Work`; keeps what this try found out, so that the next begins afresh."""

    def __init__(self, work: Work, connection: Connection) -> None:
        self._work = work
        self._connection = connection
        self._merge = work.target.merge
        self._behind: set[str] = set()
        self._resolved: list[Change] = []
        self._retried = 0
        self._queues: dict[str, Queue] = {queue.key: queue for queue in work.queues}
        self.changes = work.changes

    async def look_behind(self) -> None:
        """Patches of a key that waits queue behind it; only a full row or DELETE may pass."""
        target = self._work.target
        found = await parking.SQL.waiting.fetch(
            self._connection, target.name, target.topic, [change.key for change in self.changes]
        )
        self._behind = {record["key"] for record in found}
        await self._try_those_due({record["key"] for record in found if record["due"]})
        if not self._behind:
            return
        self.changes = []
        for change in self._work.changes:
            if change.key in self._behind and change.kind is Kind.PATCH:
                self._queues[change.key] = Queue(change.key, BEHIND, self._work.steps_of(change.key))
            else:
                self.changes.append(change)

    async def _try_those_due(self, keys: set[str]) -> None:
        """What waits for a key goes first, if its time has come and a patch comes behind it."""
        patched = [change.key for change in self._work.changes if change.kind is Kind.PATCH and change.key in keys]
        until = clock.monotonic() + limits.RETRY_TURN_SECONDS
        for key in patched[: limits.RETRY_MAX_KEYS]:
            if self._retried and clock.monotonic() > until:
                return
            retried = await retries.retry(self._connection, self._work.target, self._work.partition, key, until)
            self._retried += retried.events
            if retried.is_free:
                self._behind.remove(key)

    @property
    def queues(self) -> list[Queue]:
        """What has to wait, as far as this try has found out."""
        return list(self._queues.values())

    def settle(self, changes: Sequence[Change], missing: Sequence[str]) -> None:
        """These changes were merged, but for patches of missing rows."""
        absent = set(missing)
        for change in changes:
            if change.key in absent:
                self._queues[change.key] = Queue(change.key, ROW_MISSING, self._work.steps_of(change.key))
            elif change.key in self._behind:
                self._resolved.append(change)

    async def bisect(self, changes: Sequence[Change]) -> None:
        """Merge what can be merged; halve what is refused, down to single keys."""
        if not changes:
            return
        try:
            async with self._connection.transaction():
                missing = await self._merge(self._connection, changes)
        except Exception as error:
            if not retry.is_data(error):
                raise
        else:
            self.settle(changes, missing)
            return
        if len(changes) == 1:
            await self._one_by_one(changes[0].key)
            return
        half = len(changes) // 2
        await self.bisect(changes[:half])
        await self.bisect(changes[half:])

    async def _one_by_one(self, key: str) -> None:
        """Apply a refused key event by event; from the first refused one on they queue, up to a full row."""
        queue: list[Step] = []
        fault = BEHIND
        blocked = key in self._behind
        for step in self._work.steps_of(key):
            found: Fault | None = None
            if isinstance(step.effect, Fault):
                found = step.effect
            elif blocked and isinstance(step.effect, Patch):
                found = fault
            else:
                found = await self._apply_alone(key, step)
            if found is not None:
                fault = fault if queue else found
                queue.append(step)
                blocked = True
            elif not isinstance(step.effect, Patch):
                queue.clear()
                blocked = False
        self._queues.pop(key, None)
        if queue:
            self._queues[key] = Queue(key, fault, queue)

    async def _apply_alone(self, key: str, step: Step) -> Fault | None:
        try:
            change = self._merge.change(key, fold([step]), self._work.partition)
            async with self._connection.transaction():
                missing = await self._merge(self._connection, [change])
        except Exception as error:
            if not retry.is_data(error):
                raise
            return Fault.of(error)
        if missing:
            return ROW_MISSING
        if key in self._behind and change.kind is not Kind.PATCH:
            self._resolved.append(change)
        return None

    async def finish(self) -> Tally:
        """Resolve, then park; in this order, because a key may be resolved and parked again by one batch."""
        target = self._work.target
        tally = replace(self._work.tally, retried=self._retried)
        if self._resolved:
            tally.resolved = await parking.resolve(self._connection, target.name, target.topic, self._resolved)
        if queues := self.queues:
            tally.parked = await parking.park(self._connection, target.name, target.topic, self._work.partition, queues)
        tally.applied = self._work.count - tally.parked
        return tally
