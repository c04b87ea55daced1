"""One saga in memory: its steps as they are, or as a test says that they end.

    lab = Lab(place_order)
    lab.on(create_order).returns(order.order_id)
    lab.on(charge).times_out(landed=True)
    lab.signal(Approval(approved=False), after=60)
    outcome = await lab.run(order)
    assert outcome.compensated == ["charge", "reserve_stock", "create_order"]

Time is virtual: a day of waiting takes no time. Steps that nothing is said about run their own functions, with the
lab's `deps`; transactional and remote steps need a database or another service, so a test has to say how they end. What
a test has said about a step holds for its compensation, too: that is noted, and not called.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Generic, cast
from uuid import UUID

from typing_extensions import TypeVar

from saga.definition import Saga
from saga.errors import Failed, SagaError
from saga.outcome import context_of, perform
from saga.remote import Remote
from saga.run import Signal
from saga.starting import first_call
from saga.state import (
    Asked,
    Completed,
    Fact,
    NotHappened,
    PlanRow,
    Refused,
    Uncertain,
    Work,
    step_key,
)
from saga.step import Step, Target
from saga.testing.commands import Message
from saga.testing.faults import Choices
from saga.testing.machine import EPOCH, Machine
from saga.testing.memory import Row

A = TypeVar("A")
R = TypeVar("R")
R2 = TypeVar("R2")

INSTANCE: Final = UUID("00000000-0000-7000-8000-000000000001")
"""The same for every run, so that what derives from it is the same, too."""
_ALWAYS: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class _End:
    """How one attempt ends."""

    kind: str
    output: str = "null"
    reason: str = ""


class Stub(Generic[R]):
    """How a step ends: each attempt as the next thing that was said, the last one for good."""

    def __init__(self, target: Target) -> None:
        """Made by `Lab.on`."""
        self._target: Final = target
        self.ends: Final[list[_End]] = []
        self.failing_undos = 0

    def returns(self, result: R, /) -> None:
        """An attempt completes with this result."""
        self.ends.append(_End("returns", output=self._target.result.encode(result)))

    def rejects(self, reason: str) -> None:
        """An attempt is refused, and has done nothing."""
        self.ends.append(_End("rejects", reason=reason))

    def times_out(self, *, landed: bool) -> None:
        """Nobody hears of an attempt any more; `landed` says whether it had its effect."""
        self.ends.append(_End("landed" if landed else "lost"))

    def compensation_fails(self, *, times: int | None = None) -> None:
        """The compensation fails so many times before it succeeds; without a number, for good."""
        self.failing_undos = _ALWAYS if times is None else times


class Outcome(Generic[R]):
    """How a run ended."""

    def __init__(self, saga: Saga[Any, R], row: Row, log: Sequence[str]) -> None:
        """Made by `Lab.run`."""
        self._saga: Final = saga
        self._row: Final = row
        self.log: Final = tuple(log)
        """What happened, with the virtual time of each."""

    @property
    def state(self) -> str:
        """The state that the instance was left in."""
        return self._row.state

    @property
    def result(self) -> R:
        """What the saga returned.

        Raises:
            Failed: it did not complete.
        """
        if self._row.state != "completed":
            raise Failed(self._row.state, self.reason or "")
        return self._saga.result.decode(self._row.output or "null")

    @property
    def reason(self) -> str | None:
        """Why it failed, was cancelled or is paused."""
        return self._row.paused_reason or self._row.error

    @property
    def compensated(self) -> Sequence[str]:
        """The steps that were undone, in the order of undoing, by the names that the saga's module has for them."""
        done = [row for row in self._row.plan.values() if row.status == "completed"]
        return [self._name(row) for row in sorted(done, key=lambda row: (row.executed_at or EPOCH, row.position))]

    @property
    def blocked_on(self) -> str | None:
        """The step whose compensation keeps failing, and waits for a person."""
        failed = (row for row in self._row.plan.values() if row.status == "failed" and row.required)
        return next((self._name(row) for row in failed), None)

    def _name(self, row: PlanRow) -> str:
        names = cast("Any", self._saga.function).__globals__
        target = self._saga.find(row.name)
        return next((name for name, value in names.items() if value is target and target is not None), row.name)

    def __repr__(self) -> str:
        return f"<{self._saga.name} {self.state}{f': {self.reason}' if self.reason else ''}>"


@dataclass(slots=True)
class Effects:
    """What the calls of one run did, by the step's key, as a service that counts each key once would have it."""

    done: dict[UUID, str] = field(default_factory=dict)
    undone: dict[UUID, str] = field(default_factory=dict)

    def do(self, key: UUID, path: str) -> None:
        """A step had its effect, once more if it was undone before."""
        self.done[key] = path
        self.undone.pop(key, None)

    def undo(self, key: UUID, path: str) -> None:
        """It was undone."""
        self.undone[key] = path

    def left(self) -> list[str]:
        """Paths of what was done and not undone."""
        return sorted(path for key, path in self.done.items() if key not in self.undone)


class Lab(Generic[A, R]):
    """Runs one saga in memory."""

    def __init__(self, saga: Saga[A, R], *, deps: object = None) -> None:
        """For a saga; `deps` is what its steps find in their context."""
        self._saga: Final = saga
        self._deps: Final = deps
        self._stubs: Final[dict[int, Stub[Any]]] = {}
        self._signals: Final[list[tuple[float, Signal]]] = []
        self._cancels: Final[list[tuple[float, str]]] = []

    def on(self, step: Step[Any, ..., R2] | Remote[Any, R2], /) -> Stub[R2]:
        """Say how a step ends, instead of running it."""
        return cast("Stub[R2]", self._stubs.setdefault(id(step), Stub[Any](step)))

    def signal(self, signal: Signal, *, after: float = 0) -> None:
        """Send a signal so many seconds after the start."""
        self._signals.append((after, signal))

    def cancel(self, reason: str = "cancelled by the test", *, after: float = 0) -> None:
        """Ask for a cancel so many seconds after the start."""
        self._cancels.append((after, reason))

    async def run(self, request: A) -> Outcome[R]:
        """Run it to its end, or to where only a person or another signal could move it.

        Raises:
            Rejected: it rejects the request at once.
            BodyError: its body has a bug that shows at once.
            SagaError: nothing was said about a transactional or a remote step.
        """
        return (await self.attempt(request, Choices(), self._deps)).outcome

    async def explore(self, request: A, *, world: Callable[[], object], depth: int = 2, histories: int = 5_000) -> None:
        """Try everything that can go wrong, once and in pairs, in a new world each time.

        See `saga.testing.explore`: it says what is tried, and what must hold.

        Args:
            request: what the saga is started with.
            world: makes the `deps` that a run's steps act on: services as values, which compare equal when all is the
                same again, and count a call once under its idempotency key.
            depth: how many things go wrong in one history at most.
            histories: how many are tried at most.

        Raises:
            Counterexample: the shortest history after which not everything is as it must be.
        """
        from saga.testing.explore import explore

        await explore(self, request, world, depth=depth, histories=histories)

    async def attempt(self, request: A, choices: Choices, deps: object) -> "Run[R]":
        """For `run` and `explore`: one history."""
        run = Run(self._saga, self._stubs, deps, choices)
        text = self._saga.request.encode(request)
        first = first_call(self._saga, INSTANCE, text, EPOCH)
        machine = run.machine
        machine.serve([self._saga, *(other for other in self._saga.reachable() if isinstance(other, Saga))])
        machine.journal.start(self._saga, INSTANCE, text, EPOCH, intents=first.intents, outbox=first.outbox)
        for after, signal in self._signals:
            machine.signal_at(EPOCH + timedelta(seconds=after), run.sender(signal))
        for after, reason in self._cancels:
            machine.at(EPOCH + timedelta(seconds=after), run.canceller(reason))
        await machine.run()
        return run


class Run(Generic[R]):
    """One history of one saga."""

    def __init__(self, saga: Saga[Any, R], stubs: dict[int, Stub[Any]], deps: object, choices: Choices) -> None:
        """Made by `Lab.attempt`."""
        self._saga: Final = saga
        self._stubs: Final = stubs
        self.deps: Final = deps
        self.machine: Final = Machine(self._perform, self._handle, choices)
        self.effects: Final = Effects()
        self._attempts: Final[dict[tuple[int, str], int]] = {}

    @property
    def row(self) -> Row:
        """The instance."""
        return self.machine.journal.rows[INSTANCE]

    @property
    def outcome(self) -> Outcome[R]:
        """How it ended."""
        return Outcome(self._saga, self.row, self.machine.log)

    def target(self, path: str) -> Target | None:
        """The step of a path."""
        return self._saga.find(path.rpartition("/")[2].rpartition("#")[0])

    def sender(self, signal: Signal) -> Any:
        """Sends a signal when it is called."""
        payload = signal.model_dump_json()
        tell = self.machine.journal.tell
        return lambda: tell(INSTANCE, "signal", type(signal).__name__, payload, self.machine.now)

    def canceller(self, reason: str) -> Any:
        """Asks for a cancel when it is called."""
        return lambda: self.machine.journal.cancel(INSTANCE, reason)

    async def _perform(self, work: Work) -> Fact:
        assert work.target is not None, work
        stub = self._stubs.get(id(work.target))
        if stub is not None:
            return self._stubbed(stub, work)
        if work.target.kind == "transactional":
            raise SagaError(
                f"{work.name} is transactional, and there is no database here: say how it ends, "
                f"lab.on({work.name}).returns(...)"
            )
        fact = await perform(work, context_of(work, self.deps))
        if isinstance(fact, Completed):
            self._note(work)
        return fact

    def _note(self, work: Work) -> None:
        if work.kind in ("undo", "undo_transactional"):
            self.effects.undo(step_key(work.instance_id, work.path), work.path)
        elif work.kind != "probe":
            self.effects.do(work.key, work.path)

    def _stubbed(self, stub: Stub[Any], work: Work) -> Fact:
        if work.kind in ("undo", "undo_transactional"):
            if self._count(stub, "undo") <= stub.failing_undos:
                return Uncertain(path=work.path, error="the compensation fails, as the test says")
            self._note(work)
            return Completed(path=work.path)
        if work.kind == "probe":
            return self._probed(stub, work)
        end = self._next_end(stub, work.path, work.name)
        if end.kind in ("returns", "landed"):
            self._note(work)
        match end.kind:
            case "returns":
                return Completed(path=work.path, output=end.output)
            case "rejects":
                return Refused(path=work.path, reason=end.reason)
            case _:
                return Uncertain(path=work.path, error="timed out, as the test says")

    def _probed(self, stub: Stub[Any], work: Work) -> Fact:
        if work.key not in self.effects.done:
            return NotHappened(path=work.path)
        known = next((end for end in stub.ends if end.kind == "returns"), None)
        if known is None:
            return Uncertain(path=work.path, error="the test does not say what it returned")
        return Completed(path=work.path, output=known.output)

    async def _handle(self, message: Message, _output: str | None) -> Fact:
        target = self._saga.find(message.name)
        stub = self._stubs.get(id(target))
        if stub is None:
            raise SagaError(
                f"{message.name} is remote, and there is no participant here: say how it ends, lab.on(...).returns(...)"
            )
        key = step_key(message.instance_id, message.path)
        if message.command == "undo":
            if self._count(stub, "undo") <= stub.failing_undos:
                return Uncertain(path=message.path, error="the compensation fails, as the test says")
            self.effects.undo(key, message.path)
            return Completed(path=message.path)
        end = self._next_end(stub, message.path, message.name)
        if end.kind in ("returns", "landed"):
            self.effects.do(key, message.path)
        match end.kind:
            case "returns":
                return Completed(path=message.path, output=json.dumps(json.loads(end.output)))
            case "rejects":
                return Refused(path=message.path, reason=end.reason)
            case "landed":
                return Asked(path=message.path)
            case _:
                return Uncertain(path=message.path, error="lost, as the test says")

    def _next_end(self, stub: Stub[Any], path: str, name: str) -> _End:
        if not stub.ends:
            raise SagaError(f"nothing is said about how {name} ends: lab.on({name}).returns(...)")
        return stub.ends[min(self._count(stub, path), len(stub.ends)) - 1]

    def _count(self, stub: Stub[Any], what: str) -> int:
        count = self._attempts.get((id(stub), what), 0) + 1
        self._attempts[id(stub), what] = count
        return count
