"""The states of the model of a saga: two workers, the calls under way, the services; see `tests.support.saga_model`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from saga import Saga
from saga.state import Completed, Fact, Refused, Uncertain
from saga.testing.machine import EPOCH
from saga.testing.memory import MemoryJournal
from tests.support.saga_automata import Told

NOBODY: Final = 0
"""The epoch of a call whose worker is dead, or has stopped listening."""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A saga, and what may go wrong with it."""

    saga: Saga[Any, Any]
    faults: Mapping[str, int]
    """How often each may happen."""
    together: int = 3
    """How many faults may come together."""
    driven: bool = False
    """Whether its start has run the body to its first call."""
    signal: str | None = None
    """A signal that comes at some time."""
    settle: float = 10.0
    """Seconds after which no call of a dead worker lands any more."""
    deadline: float = 2.0
    """Seconds; where the clock is moved to by the fault `deadline`."""
    fences: bool = False
    """Whether services refuse what they have undone."""
    checks_lease: bool = True
    tombstones: bool = True
    """Whether participants remember an undo that came before its do."""
    journal: type[MemoryJournal] = MemoryJournal


class Heard(NamedTuple):
    """How a call has ended, as its worker hears it."""

    path: str
    how: str
    """`done`, `undone`, `rejected`, `timed out`."""

    @property
    def fact(self) -> Fact:
        match self.how:
            case "rejected":
                return Refused(path=self.path, reason="no")
            case "timed out":
                return Uncertain(path=self.path, error="timed out")
            case _:
                return Completed(path=self.path, output='"done"' if self.how == "done" else "null")

    def told(self, now: float) -> Told:
        return Told("fact", self, now, self.fact)


class Worker(NamedTuple):
    """A process that has the instance, or thinks so; idle ones have no state."""

    node: int
    stage: str
    """What it does: `write`, `answer` (it has one), `look`, `wait`, `late` (it was fenced)."""
    answer: tuple[Any, ...] = ()
    landed: tuple[Heard, ...] = ()
    is_leased: bool = True
    late: tuple[tuple[str, str], ...] = ()
    """Results that it still has to report."""
    owes: bool = False
    """Whether a call of it has landed after it should have settled. That its result is reported is promised only as
    long as it lives."""


class Call(NamedTuple):
    """One attempt that some worker has started."""

    epoch: int
    kind: str
    path: str
    key: str
    until: float
    """Queued: when it may begin. Then: until when it may land, if its worker is dead."""
    stage: str = "queued"
    """`queued` or `begun`. What has landed and is not heard of is as one that lands after its worker was killed."""


class Place(NamedTuple):
    """What a service knows of a step."""

    path: str
    state: str = "no"
    """`no`, `done`, `undone`, `tombstone`."""
    undos: frozenset[str] = frozenset()
    """Keys of compensations; each counts once."""


class State(NamedTuple):
    """All of it."""

    db: int
    now: float = 0.0
    workers: tuple[Worker, ...] = ()
    calls: tuple[Call, ...] = ()
    world: tuple[Place, ...] = ()
    delivered: frozenset[int] = frozenset()
    """Commands that the participant has had."""
    replies: tuple[tuple[str, str, str], ...] = ()
    signals: int = 0
    """That came."""
    faults: tuple[str, ...] = ()


def order_of(worker: Worker) -> tuple[int, str, str]:
    return worker.node, worker.stage, repr(worker)


def in_order(calls: Any) -> tuple[Call, ...]:
    return tuple(sorted(calls))


def seconds_of(at: Any, now: float) -> float:
    return now if at is None else float((at - EPOCH).total_seconds())


def place_of(s: State, path: str) -> Place:
    return next((place for place in s.world if place.path == path), Place(path))


def with_place(s: State, place: Place) -> State:
    others = [one for one in s.world if one.path != place.path]
    return s._replace(world=tuple(sorted((*others, place), key=lambda one: one.path)))
