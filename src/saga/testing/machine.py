"""A worker, a database, participants and time, all in one process and under control.

It drives `saga.decider.Execution` exactly as a worker does, over `MemoryJournal`. Nothing happens by itself: there is
one list of calls under way, one clock that only moves when nothing else can, and every place where something could go
wrong asks `Choices` first.
"""

import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias
from uuid import UUID

from saga.decider import Execution
from saga.definition import Saga
from saga.state import (
    ENDED,
    Asked,
    Checkpoint,
    Completed,
    Decision,
    Fact,
    Granted,
    NotHappened,
    Refused,
    Uncertain,
    Unwritable,
    Work,
)
from saga.testing import faults
from saga.testing.commands import Handle, Handled, Message, message_of
from saga.testing.faults import Choices, Turn
from saga.testing.memory import MemoryJournal

EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)
LEASE_SECONDS: Final = 5.0
_MAX_TURNS: Final = 20_000

Perform: TypeAlias = Callable[[Work], Awaitable[Fact]]
"""Performs one attempt of a step, a probe or a compensation, and says what became of it."""


@dataclass(slots=True, kw_only=True)
class _Flight:
    instance_id: UUID
    execution: Execution
    work: Work
    is_zombie: bool = False


@dataclass(slots=True)
class Machine:
    """Runs instances until nothing moves any more."""

    perform: Perform
    handle: Handle
    choices: Choices = field(default_factory=Choices)
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    now: datetime = EPOCH
    log: list[str] = field(default_factory=list)
    """What happened, in words."""
    checkpoints: list[Checkpoint] = field(default_factory=list)
    _sagas: dict[tuple[str, int], Saga[Any, Any]] = field(default_factory=dict)
    _executions: dict[UUID, Execution] = field(default_factory=dict)
    _flights: list[_Flight] = field(default_factory=list)
    _later: list[tuple[datetime, Callable[[], None]]] = field(default_factory=list)
    _signals: list[Callable[[], None]] = field(default_factory=list)
    """Those of `_later` that send a signal, in order."""
    _failing: set[str] = field(default_factory=set)
    """Steps whose compensation fails for good."""
    _delivered: int = 0
    _handled: dict[tuple[UUID, str], Handled] = field(default_factory=dict)
    _visits: dict[str, int] = field(default_factory=dict)

    # -------------------------------------------------------------------------------------------- set-up

    def serve(self, sagas: Iterable[Saga[Any, Any]]) -> None:
        """Sagas that this worker knows."""
        self._sagas.update({(saga.name, saga.version): saga for saga in sagas})

    def at(self, moment: datetime, action: Callable[[], None]) -> None:
        """Do something at a time."""
        self._later.append((moment, action))

    def signal_at(self, moment: datetime, send: Callable[[], None]) -> None:
        """Send a signal at a time, or sooner: in a history in which it races a write."""
        self.at(moment, send)
        order = {id(action): at for at, action in self._later}
        self._signals = sorted([*self._signals, send], key=lambda one: order[id(one)])

    # -------------------------------------------------------------------------------------------- running

    async def run(self) -> None:
        """Until nothing moves any more: everything has ended, is paused, or waits for what will not come."""
        for _ in range(_MAX_TURNS):
            if not (await self._claim() or await self._deliver() or await self._land() or self._wait()):
                return
        raise AssertionError(f"nothing ends after {_MAX_TURNS} turns: {self.log[-20:]}")

    async def _claim(self) -> bool:
        for row in list(self.journal.rows.values()):
            saga = self._sagas.get((row.name, row.version))
            if saga is None:
                continue
            claimed = self.journal.claim(row.id, "worker")
            if claimed is not None:
                execution = Execution(saga, claimed)
                self._executions[row.id] = execution
                await self._follow(row.id, execution, execution.begin(self.now))
                return True
        return False

    async def _land(self) -> bool:
        """Let one call end: the first that may."""
        for flight in self._flights:
            if flight.work.not_before is None or flight.work.not_before <= self.now or flight.is_zombie:
                self._flights.remove(flight)
                await self._attempt(flight)
                return True
        return False

    def _wait(self) -> bool:
        """Move the clock to the next thing that happens by time."""
        moments = [moment for moment, _ in self._later]
        moments += [flight.work.not_before for flight in self._flights if flight.work.not_before is not None]
        moments += [row.wake_at for row in self.journal.rows.values() if row.wake_at is not None]
        if not moments:
            return False
        self.now = max(self.now, min(moments))
        due = [item for item in self._later if item[0] <= self.now]
        self._later = [item for item in self._later if item[0] > self.now]
        for _, action in due:
            if action in self._signals:
                self._signals.remove(action)
            action()
        self.journal.due(self.now)
        return True

    # -------------------------------------------------------------------------------------------- decisions

    async def _follow(self, instance_id: UUID, execution: Execution, decision: Decision) -> None:
        """Do what a decision says, and what follows from it, until there is something to wait for."""
        while True:
            self._flights += [
                _Flight(instance_id=instance_id, execution=execution, work=work) for work in decision.start
            ]
            for late in decision.late:
                self.journal.record_late(instance_id, execution.epoch, late)
            self._chores(instance_id, decision)
            if decision.checkpoint is not None:
                next_decision = self._write(execution, decision.checkpoint)
                if next_decision is None:
                    return
                decision = next_decision
            elif decision.look:
                decision = execution.mail(self.journal.look(instance_id), self.now)
            else:
                return

    def _write(self, execution: Execution, checkpoint: Checkpoint) -> Decision | None:
        turn = self._choose(f"write {checkpoint.state}", faults.WRITE_RACED if self._signals else faults.WRITE)
        if turn == "crash before":
            self._crash()
            return None
        if turn == "cancel":
            self.journal.cancel(checkpoint.id, "cancelled by a test")
        if turn == "signal":
            send = self._signals.pop(0)
            self._later = [item for item in self._later if item[1] is not send]
            send()
        answer = self.journal.write(checkpoint)
        self.checkpoints.append(checkpoint)
        self._say(f"checkpoint {checkpoint.no + 1} ({checkpoint.state}): {answer.kind}")
        if turn == "crash after":
            self._crash()
            return None
        if turn == "answer lost":
            answer = self.journal.write(checkpoint)
        return execution.answered(answer, self.now)

    def _chores(self, instance_id: UUID, decision: Decision) -> None:
        if "release_locks" in decision.chores:
            self.journal.release_locks(instance_id, self.now)
        if "tell_parent" in decision.chores:
            self.journal.tell_parent(instance_id, self.now)

    def _crash(self) -> None:
        """The worker is gone; another one takes over when its lease is over. Calls under way are forgotten."""
        self._say("the worker crashes")
        self._flights = [flight for flight in self._flights if flight.is_zombie]
        self._executions.clear()

        def take_over() -> None:
            for row in self.journal.rows.values():
                self.journal.take_over(row.id)
                if row.state in ENDED:
                    self.journal.release_locks(row.id, self.now)
                    self.journal.tell_parent(row.id, self.now)

        self.at(self.now + timedelta(seconds=LEASE_SECONDS), take_over)

    # -------------------------------------------------------------------------------------------- calls

    async def _attempt(self, flight: _Flight) -> None:
        work = flight.work
        if work.kind == "lock":
            assert work.lock_key is not None
            held = self.journal.acquire(flight.instance_id, work.lock_key, work.path)
            await self._tell(flight, Granted(path=work.path) if held else Asked(path=work.path))
        elif work.kind == "undo_child":
            assert work.child_id is not None
            done = self.journal.undo_child(work.child_id)
            await self._tell(flight, Completed(path=work.path) if done else Asked(path=work.path))
        elif work.kind in ("undo", "undo_transactional") and work.path in self._failing:
            await self._tell(flight, Uncertain(path=work.path, error="fails for good by a test"))
        elif work.kind in ("transactional", "undo_transactional"):
            await self._transact(flight)
        else:
            await self._call(flight)

    async def _call(self, flight: _Flight) -> None:
        work = flight.work
        if flight.is_zombie:
            await self._land_late(flight)
            return
        turns = faults.UNDO if work.kind == "undo" else faults.DO if work.kind == "step" else ()
        turn = self._choose(f"{work.kind} {work.path}", turns)
        if turn == "rejects":
            await self._tell(flight, Refused(path=work.path, reason="rejected by a test"))
        elif turn in ("fails", "fails for good", "times out"):
            if turn == "fails for good":
                self._failing.add(work.path)
            await self._tell(flight, Uncertain(path=work.path, error=f"{turn} by a test"))
        elif turn == "crash before":
            self._crash()
        elif turn == "lands late":
            flight.is_zombie = True
            self.at(self.now + timedelta(seconds=LEASE_SECONDS + 1), lambda: self._flights.append(flight))
            self._crash()
        else:
            fact = await self._perform(work)
            if turn == "crash after":
                self._crash()
            elif turn == "times out, landed":
                await self._tell(flight, Uncertain(path=work.path, error="timed out by a test"))
            else:
                await self._tell(flight, fact)

    async def _land_late(self, flight: _Flight) -> None:
        """A call of a worker that is gone, which nobody could stop, has its effect only now."""
        fact = await self._perform(flight.work)
        late = flight.execution.late(fact)
        if late is not None:
            self._say(f"late result of {flight.work.path}")
            self.journal.record_late(flight.instance_id, flight.execution.epoch, late)

    async def _transact(self, flight: _Flight) -> None:
        """A step in the checkpoint's own transaction: both or neither."""
        work, execution = flight.work, flight.execution
        turns = faults.TRANSACTION if work.kind == "transactional" else faults.UNDO_TRANSACTION
        turn = self._choose(f"{work.kind} {work.path}", turns)
        if turn == "fails for good":
            self._failing.add(work.path)
            await self._tell(flight, Uncertain(path=work.path, error="fails for good by a test"))
            return
        if turn == "rejects" and work.kind == "transactional":
            await self._tell(flight, Refused(path=work.path, reason="rejected by a test"))
            return
        if turn == "crash before":
            self._crash()
            return
        before = self.journal.rows[flight.instance_id]
        if before.epoch != execution.epoch:
            return
        fact = await self._perform(work)
        decision = execution.fact(fact, self.now)
        if decision.checkpoint is None or not isinstance(fact, Completed):
            await self._follow(flight.instance_id, execution, decision)
            return
        answer = self.journal.write(decision.checkpoint)
        self.checkpoints.append(decision.checkpoint)
        self._say(f"{work.path} committed: {answer.kind}")
        if turn == "crash after":
            self._crash()
            return
        if turn == "answer lost":
            answer = self.journal.write(decision.checkpoint)
        await self._follow(flight.instance_id, execution, execution.answered(answer, self.now))

    async def _perform(self, work: Work) -> Fact:
        fact = await self.perform(work)
        self._say(f"{work.kind} {work.path}: {_words(fact)}")
        return fact

    async def _tell(self, flight: _Flight, fact: Fact) -> None:
        if self._executions.get(flight.instance_id) is flight.execution:
            if isinstance(fact, Uncertain | Refused):
                self._say(f"{flight.work.kind} {flight.work.path}: {_words(fact)}")
            await self._follow(flight.instance_id, flight.execution, flight.execution.fact(fact, self.now))

    # -------------------------------------------------------------------------------------------- participants

    async def _deliver(self) -> bool:
        if self._delivered == len(self.journal.outbox):
            return False
        row = self.journal.outbox[self._delivered]
        self._delivered += 1
        message = message_of(row)
        if message is None:
            return True
        is_undo = message.command == "undo"
        turns = faults.UNDO_COMMAND if is_undo and message.path not in self._failing else faults.COMMAND
        turn = self._choose(f"{message.command} command {message.path}", turns)
        if turn == "fails for good":
            self._failing.add(message.path)
        await self._receive(message, turn)
        if turn == "reply twice":
            await self._receive(message, None)
        return True

    async def _receive(self, message: Message, turn: Turn | None) -> None:
        """The participant's rules: once, in order, undo before do leaves a tombstone, a stored reply is sent again."""
        known = self._handled.get((message.instance_id, message.path))
        reply: dict[str, Any]
        if message.command == "do":
            known = known or await self._do(message, turn)
            if known is None:
                return
            reply, kind = known.reply, "reply"
        else:
            reply, kind = await self._undo(message, known), "undone"
        delay = timedelta(days=1) if turn == "reply late" else timedelta(0)
        tell = lambda: self.journal.tell(message.instance_id, kind, message.path, json.dumps(reply), self.now)  # noqa: E731
        self.at(self.now + delay, tell)

    async def _do(self, message: Message, turn: Turn | None) -> Handled | None:
        fact: Fact = Refused(path=message.path, reason="rejected by a test")
        if turn != "rejects":
            fact = await self.handle(message, None)
        self._say(f"command {message.path}: {_words(fact)}")
        if isinstance(fact, Completed):
            handled = Handled(reply={"outcome": "completed", "output": json.loads(fact.output)}, is_done=True)
        elif isinstance(fact, Refused):
            handled = Handled(reply={"outcome": "rejected", "error": fact.reason}, is_done=False)
        elif isinstance(fact, Unwritable):  # poison: nothing happened, and that is the answer after its retries
            handled = Handled(reply={"outcome": "unknown", "error": _words(fact)}, is_done=False)
        else:
            landed = Handled(reply={"outcome": "completed", "output": None}, is_done=True)
            if isinstance(fact, Asked):
                self._handled[message.instance_id, message.path] = landed
            return None  # the reply is lost, or the command itself
        self._handled[message.instance_id, message.path] = handled
        return handled

    async def _undo(self, message: Message, known: Handled | None) -> dict[str, Any]:
        if known is None:
            tombstone = {"outcome": "rejected", "error": "undone before it came"}
            self._handled[message.instance_id, message.path] = Handled(reply=tombstone, is_done=False)
        elif known.is_done and message.path in self._failing:
            return {"round": message.round, "error": "fails for good by a test", "answers": str(message.id)}
        elif known.is_done:
            fact = await self.handle(message, json.dumps(known.reply["output"]))
            self._say(f"undo command {message.path}: {_words(fact)}")
            if not isinstance(fact, Completed):
                return {"round": message.round, "error": _words(fact), "answers": str(message.id)}
            known.is_done = False
        return {"round": message.round}

    # -------------------------------------------------------------------------------------------- small things

    def _choose(self, site: str, turns: tuple[Turn, ...]) -> Turn | None:
        self._visits[site] = self._visits.get(site, 0) + 1
        name = f"{site} ({self._visits[site]})"
        turn = self.choices.at(name, turns) if turns else None
        if turn is not None:
            self._say(f"** {name}: {turn}")
        return turn

    def _say(self, words: str) -> None:
        self.log.append(f"{(self.now - EPOCH).total_seconds():10.1f}s  {words}")


def _words(fact: Fact) -> str:
    match fact:
        case Completed(output=output):
            return f"completed {output}"
        case Refused(reason=reason):
            return f"rejected: {reason}"
        case Uncertain(error=error):
            return f"unknown: {error}"
        case Unwritable(problem=problem):
            return f"cannot be written: {problem}"
        case NotHappened():
            return "did not happen"
        case _:
            return type(fact).__name__
