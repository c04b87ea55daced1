"""What a saga's body is written with, and what it yields to the engine.

A body is an async function that awaits nothing but the methods of its `Run`. Each of them yields one *operation* to
whoever drives the body, who sends the answer back, or throws `Rejected`. Between two operations the body is pure: it
may be run again from its start in any process, and must come by the same way. `now`, `uuid` and `random` are derived
from the journal and the instance's id, not from the machine.

Nothing of a body runs in the event loop: tasks, `asyncio.sleep` and clients of other services belong into steps.
"""

import hashlib
import inspect
from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime
from types import coroutine
from typing import TYPE_CHECKING, Any, Final, cast, overload
from uuid import UUID

from pydantic import BaseModel
from typing_extensions import TypeVar

from outbox import Duration
from saga import limits
from saga.context import seconds
from saga.errors import BodyClosed, BodyError
from saga.step import Call

if TYPE_CHECKING:
    from saga.definition import Saga

A = TypeVar("A")
R = TypeVar("R")
S = TypeVar("S", bound="Signal")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")


class Signal(BaseModel):
    """A message to a running saga; subclass it once for each kind: `class Approval(Signal): approved: bool`."""


@dataclass(slots=True, eq=False)
class Operation:
    """What a body waits for; yielded by `Run`, answered by the engine."""


@dataclass(slots=True, eq=False)
class DoStep(Operation):
    """One step."""

    call: Call[Any]


@dataclass(slots=True, eq=False)
class DoParallel(Operation):
    """Several steps at once; their results as a tuple."""

    calls: tuple[Call[Any], ...]


@dataclass(slots=True, eq=False)
class DoReceive(Operation):
    """A signal, or None once the time is over."""

    signal: type[Signal]
    timeout_seconds: float


@dataclass(slots=True, eq=False)
class DoSleep(Operation):
    """Time."""

    duration_seconds: float


@dataclass(slots=True, eq=False)
class DoLock(Operation):
    """A semantic lock, held until the saga ends."""

    key: str


@dataclass(slots=True, eq=False)
class DoChild(Operation):
    """Another saga, and its result."""

    saga: "Saga[Any, Any]"
    request: Any


@dataclass(slots=True, eq=False)
class DoPivot(Operation):
    """The point after which nothing is undone any more."""


@coroutine
def _ask(operation: Operation) -> Generator[Operation, Any, Any]:
    """Yield an operation to the driver of the body; what that sends back is the answer."""
    return (yield operation)


class Run:
    """One instance, as its body sees it. Every method that is awaited is journalled."""

    __slots__ = ("_closed", "_counter", "_id", "_now", "is_driven")

    def __init__(self, instance_id: UUID, started_at: datetime) -> None:
        """Made by the engine, once for each time that a body is run."""
        self._id: Final = instance_id
        self._now = started_at
        self._counter = 0
        self.is_driven = False
        """For the driver: whether the body is running now, so that it may ask for operations."""
        self._closed = False

    @property
    def id(self) -> UUID:
        """The instance's id."""
        return self._id

    async def __call__(self, call: Call[R], /) -> R:
        """Perform a step, or send a remote command, and return its result.

        Raises:
            Rejected: the step rejected, on every attempt: nothing happened. It may be caught.
        """
        self._check(call)
        answer: R = await _ask(DoStep(call))
        return answer

    @overload
    async def parallel(self, a: Call[T1], b: Call[T2], /) -> tuple[T1, T2]: ...
    @overload
    async def parallel(self, a: Call[T1], b: Call[T2], c: Call[T3], /) -> tuple[T1, T2, T3]: ...
    @overload
    async def parallel(self, a: Call[T1], b: Call[T2], c: Call[T3], d: Call[T4], /) -> tuple[T1, T2, T3, T4]: ...
    @overload
    async def parallel(self, *calls: Call[R]) -> tuple[R, ...]: ...
    async def parallel(self, *calls: Call[Any]) -> tuple[Any, ...]:
        """Perform several steps at once, and return their results in the order of the calls.

        Raises:
            Rejected: one of them rejected, and all have ended; the first one in the order of the calls.
        """
        for call in calls:
            self._check(call)
        if len(calls) > limits.PARALLEL_MAX_BRANCHES:
            raise BodyError(f"parallel: {len(calls)} calls; pass at most {limits.PARALLEL_MAX_BRANCHES} at a time")
        if not calls:
            return ()
        return cast("tuple[Any, ...]", await _ask(DoParallel(calls)))

    async def receive(self, signal: type[S], *, timeout: Duration) -> S | None:
        """The next signal of this class that was sent to the saga, before or from now on; None after the time."""
        given: object = signal
        if not (isinstance(given, type) and issubclass(given, Signal)) or given is Signal:
            raise BodyError(f"receive: {signal!r} is no Signal; pass a subclass of Signal")
        self._require_driven("receive")
        return cast("S | None", await _ask(DoReceive(signal, _time("receive", timeout))))

    async def sleep(self, duration: Duration) -> None:
        """Let time pass, however long; no worker is kept busy by it."""
        self._require_driven("sleep")
        await _ask(DoSleep(_time("sleep", duration)))

    async def lock(self, key: str) -> None:
        """Wait for a lock that sagas share by its key, and hold it until this saga ends, compensations included."""
        given: object = key
        if not isinstance(given, str) or not 1 <= len(key.encode()) <= limits.KEY_MAX_BYTES:
            raise BodyError(f"lock: {key!r} is no key; pass a text of 1 to {limits.KEY_MAX_BYTES} bytes")
        self._require_driven("lock")
        await _ask(DoLock(key))

    async def child(self, saga: "Saga[A, R]", request: A) -> R:
        """Start another saga, and return its result.

        Raises:
            Rejected: the child failed or was cancelled, and what it had done was undone. It may be caught.
        """
        self._require_driven("child")
        return cast("R", await _ask(DoChild(saga, request)))

    async def pivot(self) -> None:
        """Go forward only from here: nothing that happened before is undone any more, not even on a cancel."""
        self._require_driven("pivot")
        await _ask(DoPivot())

    def now(self) -> datetime:
        """The time of the last thing that the journal knows: the same again when the body is run again."""
        return self._now

    def uuid(self) -> UUID:
        """A new UUID; the same again when the body is run again."""
        return UUID(bytes=self._random(16), version=4)

    def random(self) -> float:
        """A number from 0 up to 1; the same again when the body is run again."""
        return (int.from_bytes(self._random(7), "big") >> 3) / (1 << 53)

    def move(self, at: datetime) -> None:
        """For the driver: the journal's next fact is from then."""
        self._now = max(self._now, at)

    def close(self) -> None:
        """For the driver: no operation is possible any more."""
        self._closed = True

    def _random(self, size: int) -> bytes:
        self._counter += 1
        seed = self._id.bytes + self._counter.to_bytes(8, "big")
        return hashlib.blake2b(seed, digest_size=size, person=b"saga.run").digest()

    def _check(self, call: object) -> None:
        self._require_driven("run")
        if not isinstance(call, Call):
            if inspect.iscoroutine(call):
                call.close()  # it is refused, and nobody will await it
            raise BodyError(f"run: {call!r} is no call of a step; write await run(step(...))")

    def _require_driven(self, what: str) -> None:
        if self._closed:
            raise BodyClosed(f"{what}: this body is being closed; nothing is executed in finally blocks")
        if not self.is_driven:
            raise BodyError(f"{what}: called outside the body; use run.parallel for several steps at once")


def _time(what: str, duration: Duration) -> float:
    value = seconds(duration)
    if not 0 <= value < float("inf"):
        raise BodyError(f"{what}: {value} seconds; pass a time from zero that ends")
    return value
