"""One claimed instance: `Execution` decides, this carries it out.

    claimed -> begin -> [ start work | write a checkpoint | look at the mail | wait for what is under way ] -> released

A crash at any line loses nothing that was decided, because nothing decided has an effect before its checkpoint is
answered: an external call begins only after the checkpoint that holds its intent, and only while the worker's lease is
held by its own clock. After a crash the next claim finds the intents, and decides what they mean.

*Leaving.* Once the worker stops, or its lease is past, nothing new begins: calls under way may end, their results are
written as long as nobody else has the instance, and it is let go.

*Fenced.* Another worker has it: what is under way still ends, and each result is kept as a late one, which opens its
compensation again.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

from outbox import clock, crash_sites, postgres, retry
from outbox.postgres import Connection, Pool
from saga import journal, limits, transactional, writer
from saga.decider import Execution
from saga.journal import Start
from saga.lease import Heartbeat, LeaseLostError
from saga.outcome import context_of, perform
from saga.results import Standing, told_end
from saga.state import (
    ENDED,
    Answer,
    Asked,
    Checkpoint,
    Claimed,
    Completed,
    Decision,
    Fact,
    Granted,
    Late,
    Mailbox,
    Uncertain,
    Work,
)
from saga.transactional import Prepared
from saga.writer import ValueRefusedError, Writer

log = logging.getLogger(__name__)
SQL: Final = postgres.Statements("saga", "runner.sql")
T = TypeVar("T")

CALL: Final = crash_sites.register("saga.runner.call")
"""Every call of a step, a probe or a compensation outside a transaction: before it begins, after it has ended."""
_CALLS: Final = frozenset({"step", "probe", "undo"})


def now() -> datetime:
    """The wall clock: it is journalled, and a body sees it."""
    return datetime.fromtimestamp(clock.wall(), UTC)


@dataclass(slots=True, kw_only=True)
class _Aborted(Fact):
    """The work was never begun, because the worker is leaving; the decider is not told."""


@dataclass(slots=True, kw_only=True)
class _Broken(Fact):
    """Not the user's code but ours raised."""

    error: Exception


@dataclass(slots=True)
class Surroundings:
    """What all instances of one worker share."""

    pool: Pool
    writer: Writer
    deps: object
    stopping: asyncio.Event
    transactions: asyncio.Semaphore
    timer_set: Callable[[float], None]
    """Called with the seconds until a timer that was written goes off."""


class Runner:
    """Drives one instance to its release."""

    def __init__(
        self, around: Surroundings, heartbeat: Heartbeat, name: str, instance_id: UUID, execution: Execution
    ) -> None:
        """For one that was claimed under `heartbeat`'s id, or leased to it with its start.

        Args:
            around: what all instances of the worker share.
            heartbeat: its lease.
            name: of the saga.
            instance_id: the instance.
            execution: as the claim or the start handed it over.
        """
        self._around = around
        self._heartbeat = heartbeat
        self._id: Final = instance_id
        self._name: Final = name
        self._execution = execution
        self._is_begun = False
        self._flights: dict[str, asyncio.Task[None]] = {}
        self._landed: deque[Fact | Prepared] = deque()
        self._has_landed = asyncio.Event()
        self._inline: Work | None = None
        """The only work under way, performed where the instance is driven: it needs no task of its own."""
        self._conflicts: dict[str, int] = {}
        """How often the transaction of a path was rolled back by PostgreSQL."""
        self._pauses: Iterator[float] | None = None

    @classmethod
    def of_start(cls, around: Surroundings, heartbeat: Heartbeat, new: Start) -> "Runner":
        """For one that was leased with its start: the body has run to its first call already, if that was one."""
        if new.first.execution is not None:
            runner = cls(around, heartbeat, new.saga.name, new.id, new.first.execution)
            runner._is_begun = True
            return runner
        claimed = Claimed(
            id=new.id,
            epoch=1,
            checkpoint_no=0,
            fresh=True,
            state="running",
            started_at=new.started_at,
            deadline_at=new.deadline_at,
            request=new.request,
            intents=new.first.intents,
            mailbox=Mailbox(wakeups=0),
        )
        return cls(around, heartbeat, new.saga.name, new.id, Execution(new.saga, claimed))

    # -------------------------------------------------------------------------------------------- life

    @property
    def instance_id(self) -> UUID:
        """What it drives."""
        return self._id

    @property
    def _leaving(self) -> bool:
        return self._around.stopping.is_set() or not self._heartbeat.is_held

    async def run(self) -> None:
        """Until the instance is released, or let go because the worker leaves.

        A bug of ours, in the decider or here, gives the instance back as a crash would: it is tried again by whoever
        claims it next, and paused when that does not help.
        """
        try:
            await self._drive()
        except ValueRefusedError as refusal:
            log.error("%s %s is paused: the journal refuses a value: %s", self._name, self._id, refusal)  # noqa: TRY400
        except Exception as error:
            log.exception("%s %s cannot go on; it is given back", self._name, self._id)
            await self._give_back(error)
        finally:
            for task in self._flights.values():
                task.cancel()
            if self._flights:
                await asyncio.wait(self._flights.values(), timeout=limits.CUT_OFF_SECONDS)

    async def _drive(self) -> None:
        if self._is_begun:  # and the start has written what it asked for
            decision = self._execution.answered(Answer(kind="applied"), now())
        else:
            decision = self._execution.begin(now())
        while not decision.released:
            self._start(decision)
            if decision.checkpoint is not None:
                decision = await self._write(decision.checkpoint)
            elif decision.look:
                decision = await self._look()
            elif self._inline is not None or self._flights or self._landed:
                decision = await self._next()
            else:
                return  # leaving: nothing is under way, and nothing was begun
        await self._released(decision)

    # -------------------------------------------------------------------------------------------- the journal

    async def _write(self, checkpoint: Checkpoint) -> Decision:
        try:
            answer = await self._around.writer.submit(checkpoint)
        except ValueRefusedError as refusal:
            reason = str(refusal)
            await self._patiently(lambda: writer.pause(self._around.pool, checkpoint, reason))
            raise
        self._take_landed()
        if answer.kind == "applied" and not checkpoint.held:
            self._let_go(checkpoint)
        return self._execution.answered(answer, now())

    def _let_go(self, checkpoint: Checkpoint) -> None:
        """Tell those in this process who wait for the instance, or for its timer."""
        if checkpoint.state == "completed":
            standing = Standing(id=self._id, state=checkpoint.state, output=checkpoint.output, error=None)
            told_end(self._around.pool, self._id, standing)
        elif checkpoint.state in ENDED:
            told_end(self._around.pool, self._id, None)
        elif checkpoint.wake_at is not None:
            self._around.timer_set((checkpoint.wake_at - now()).total_seconds())

    async def _look(self) -> Decision:
        mailbox = await self._patiently(lambda: journal.look(self._around.pool, self._id))
        self._take_landed()
        return self._execution.mail(mailbox, now())

    async def _released(self, decision: Decision) -> None:
        """What is left to do once the instance is not ours any more; a sweep repeats the chores after a crash."""
        pool, epoch = self._around.pool, self._execution.epoch
        if "release_locks" in decision.chores:
            await self._patiently(lambda: journal.SQL.release_locks.execute(pool, self._id))
        if "tell_parent" in decision.chores:
            await self._patiently(lambda: journal.SQL.tell_parent.execute(pool, self._id))
        late = list(decision.late)
        while late or self._flights or self._landed:
            for result in late:
                await self._patiently(partial(journal.record_late, pool, self._id, epoch, result))
                log.warning("%s %s was lost to another worker; %s ended late", self._name, self._id, result.path)
            landed = await self._land_late() if self._flights or self._landed else None
            late = [landed] if landed is not None else []

    async def _land_late(self) -> Late | None:
        landed = await self._next_landed()
        if isinstance(landed, Prepared):
            landed.roll_back()
            self._flights.pop(landed.fact.path, None)
            return None
        self._flights.pop(landed.path, None)
        return self._execution.late(landed)

    async def _give_back(self, error: Exception) -> None:
        reason = f"a worker could not go on with it, time after time: {error!r}"[: limits.REASON_MAX_CHARACTERS]
        epoch = self._execution.epoch
        await self._patiently(lambda: give_back(self._around.pool, self._id, epoch, reason))

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask again while the database is in trouble; once the worker stops, no more."""
        async for attempt in retry.attempts(stopping=self._around.stopping):
            with attempt:
                return await ask()
        raise AssertionError("attempts end by a return or an error")

    # -------------------------------------------------------------------------------------------- work

    def _start(self, decision: Decision) -> None:
        """Begin the work of a decision, unless the worker is leaving."""
        if not decision.start or self._leaving:
            return
        is_free = not (decision.checkpoint or decision.look or self._flights or self._landed)
        if is_free and len(decision.start) == 1 and decision.start[0].kind in _CALLS:
            self._inline = decision.start[0]
            return
        for work in decision.start:
            self._flights[work.path] = asyncio.create_task(self._fly(work), name=f"{self._name} {work.path}")

    async def _next(self) -> Decision:
        """Wait for what ends next, and decide what follows."""
        if self._inline is not None:
            work, self._inline = self._inline, None
            fact = await self._perform(work)
            assert fact is not None, "a call ends with a fact"
            return self._tell(fact)
        landed = await self._next_landed()
        return await self._finish(landed) if isinstance(landed, Prepared) else self._tell(landed)

    def _land(self, landed: Fact | Prepared) -> None:
        self._landed.append(landed)
        self._has_landed.set()

    async def _next_landed(self) -> Fact | Prepared:
        while not self._landed:
            self._has_landed.clear()
            await self._has_landed.wait()
        return self._landed.popleft()

    def _tell(self, fact: Fact) -> Decision:
        self._flights.pop(fact.path, None)
        if isinstance(fact, _Broken):
            raise fact.error
        return Decision() if isinstance(fact, _Aborted) else self._execution.fact(fact, now())

    def _take_landed(self) -> None:
        """Tell what has ended while a checkpoint or a look was under way: it joins the next checkpoint."""
        if not self._landed:
            return
        kept: list[Prepared] = []
        while self._landed:
            landed = self._landed.popleft()
            if isinstance(landed, Prepared):
                kept.append(landed)  # its checkpoint is one of its own
            else:
                self._tell(landed)
        self._landed.extend(kept)

    async def _fly(self, work: Work) -> None:
        fact: Fact | None
        try:
            fact = await self._perform(work)
        except Exception as error:  # noqa: BLE001 - raised again where the instance is driven
            fact = _Broken(path=work.path, error=error)
        if fact is not None:
            self._land(fact)

    async def _perform(self, work: Work) -> Fact | None:
        if work.not_before is not None:
            await retry.pause((work.not_before - now()).total_seconds(), self._around.stopping)
        if self._around.stopping.is_set():
            return _Aborted(path=work.path)
        try:
            if work.kind not in _CALLS:
                return await self._begin(work)
            if crash_sites.hook is not None:
                await crash_sites.visit(CALL, "before")
            self._heartbeat.check()
            fact = await perform(work, context_of(work, self._around.deps))
            if crash_sites.hook is not None:
                await crash_sites.visit(CALL, "after")
        except LeaseLostError as lost:
            log.warning("%s %s: %s; %s is not begun", self._name, self._id, lost, work.path)
            return _Aborted(path=work.path)
        return fact

    async def _begin(self, work: Work) -> Fact | None:
        """Begin what is no call of a function outside a transaction."""
        pool, path = self._around.pool, work.path
        self._heartbeat.check()
        if work.kind == "lock":
            ask = journal.SQL.acquire
            answer = await self._patiently(
                lambda: ask.fetchval(pool, self._id, self._execution.epoch, work.lock_key, path)
            )
            return Granted(path=path) if answer == "granted" else Asked(path=path)
        if work.kind == "undo_child":
            answer = await self._patiently(lambda: journal.SQL.undo_child.fetchval(pool, work.child_id))
            return Completed(path=path) if answer == "undone" else Asked(path=path)
        async with self._around.transactions:
            return await transactional.perform_in_transaction(pool, work, self._land)

    async def _finish(self, prepared: Prepared) -> Decision:
        """Write the checkpoint of a transactional step on its own connection, and commit both."""
        path = prepared.fact.path
        decision = self._execution.fact(prepared.fact, now())
        checkpoint = decision.checkpoint
        if checkpoint is None or not checkpoint.tells_of(path):
            # As where its result cannot be read back: committed, it would be done without the journal, and done again.
            self._flights.pop(path, None)
            await prepared.give_up()
            return decision
        self._start(replace(decision, start=tuple(work for work in decision.start if work.path != path)))
        try:
            answer = await transactional.commit(self._around.pool, prepared, checkpoint)
        except transactional.ConflictError as conflict:
            self._flights.pop(path, None)
            return await self._conflicted(path, conflict)
        self._flights.pop(path, None)
        if answer.kind == "changed":
            return self._execution.withdraw(path, now(), changed=True)
        if answer.kind == "applied" and not checkpoint.held:
            self._let_go(checkpoint)
        return self._execution.answered(answer, now())

    async def _conflicted(self, path: str, conflict: transactional.ConflictError) -> Decision:
        """Try it again; or say that it failed, if the step is still what is decided."""
        count = self._conflicts[path] = self._conflicts.get(path, 0) + (not conflict.is_of_row)
        may_succeed = conflict.may_succeed and count < limits.TRANSACTIONAL_ATTEMPTS
        if may_succeed:
            log.info("%s %s: %s is tried again: %s", self._name, self._id, path, conflict)
            self._pauses = self._pauses or retry.backoff(maximum=limits.LOCKED_WAIT_SECONDS)
            await retry.pause(next(self._pauses), self._around.stopping)
        decision = self._execution.withdraw(path, now())
        if may_succeed or path not in {work.path for work in decision.start}:
            return decision
        return self._execution.fact(Uncertain(path=path, error=str(conflict)), now())


async def give_back(db: Pool | Connection, instance_id: UUID, epoch: int, reason: str) -> None:
    """Let others go on with an instance, as if its worker had been lost; nothing, where it has been let go already.

    Args:
        db: a pool or a connection.
        instance_id: the instance.
        epoch: under which it was leased.
        reason: why it pauses, where that has happened too often without progress.
    """
    await SQL.give_back.execute(db, instance_id, epoch, reason)
