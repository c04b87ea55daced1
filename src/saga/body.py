"""One run of a saga's body, driven by hand.

The body is a coroutine, and nobody but this module drives it: `send` gives it the answer of the operation that it waits
for, and it runs, without interruption, to its next operation or its end. It sees no event loop meanwhile: whatever it
awaits or starts that is not an operation of its own `Run` breaks it (`Broke`), instead of happening at a time that no
journal knows.

Closing: a body that is to be undone is closed like any coroutine, so its `finally` blocks run. `run(...)` in them
raises `BodyClosed` and executes nothing.
"""

import asyncio
import hashlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeAlias, cast
from uuid import UUID

from saga import limits
from saga.codec import DIGEST_BYTES
from saga.definition import Saga
from saga.errors import BodyError, Rejected, SagaError
from saga.outcome import brief
from saga.run import DoChild, DoLock, DoParallel, DoPivot, DoReceive, DoSleep, DoStep, Operation, Run
from saga.state import Kind
from saga.step import Call, Target


@dataclass(slots=True, kw_only=True)
class Slot:
    """One thing that the body waits for: what its row in the journal must look like."""

    path: str
    """Branch, name and occurrence: `charge#1`, `parallel#1[0]/charge#1`."""
    name: str
    kind: Kind
    digest: bytes
    call: Call[Any] | None = None
    operation: Operation
    text: str = "null"
    """Its input in journal form."""

    @property
    def target(self) -> Target:
        """The step or contract of the call."""
        assert self.call is not None, f"{self.path} is no call"
        return self.call.target


@dataclass(slots=True)
class At:
    """The body waits for an operation: for all of the slots, if that is a parallel."""

    operation: Operation
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True)
class Returned:
    """The body ended."""

    value: Any


@dataclass(frozen=True, slots=True)
class Raised:
    """The body ended with a declared business failure."""

    reason: str


@dataclass(frozen=True, slots=True)
class Broke:
    """The body has a bug."""

    problem: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The body was closed."""


Position: TypeAlias = At | Returned | Raised | Broke | Closed


class Body:
    """A body that runs to its next operation whenever it is answered."""

    def __init__(self, saga: Saga[Any, Any], instance_id: UUID, request: Any, started_at: datetime) -> None:
        """Run it to its first operation."""
        self.run: Final = Run(instance_id, started_at)
        self._saga: Final = saga
        self._counts: dict[str, int] = {}
        self._operations = 0
        self._coroutine: Final = cast("Any", saga.function(self.run, request))
        self.position: Position = Closed()
        self._drive(self._coroutine.send, None)

    def answer(self, value: Any, at: datetime) -> None:
        """Give it the result of its operation, which the journal says was there at `at`."""
        self.run.move(at)
        self._drive(self._coroutine.send, value)

    def reject(self, reason: str, at: datetime) -> None:
        """Raise `Rejected` where it waits; it may catch that."""
        self.run.move(at)
        self._drive(self._coroutine.throw, Rejected(reason))

    def close(self) -> None:
        """End it where it stands; nothing of it runs any more but its `finally` blocks."""
        self.run.close()
        if isinstance(self.position, At | Broke):
            with _no_event_loop():
                for _ in range(limits.CLOSE_MAX_TRIES):
                    try:
                        self._coroutine.close()
                    except (KeyboardInterrupt, SystemExit):
                        raise
                    except BaseException:  # noqa: BLE001, S112 - a finally block's own error changes nothing here
                        continue
                    break
        if isinstance(self.position, At):
            self.position = Closed()

    def _drive(self, resume: Callable[[Any], Any], value: object) -> None:
        loop = asyncio._get_running_loop()  # noqa: SLF001 - as in `_no_event_loop`, which costs more
        try:
            try:
                asyncio._set_running_loop(None)  # noqa: SLF001
                self.run.is_driven = True
                yielded = resume(value)
            finally:
                self.run.is_driven = False
                asyncio._set_running_loop(loop)  # noqa: SLF001
            self.position = self._read(yielded)
        except StopIteration as end:
            self.position = Returned(end.value)
        except Rejected as rejection:
            self.position = Raised(rejection.reason)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - a body is the user's code; its bug pauses its instance only
            self.position = Broke(str(error) if isinstance(error, SagaError) else brief(error))

    def _read(self, yielded: object) -> At:
        """The operation that was yielded, as slots.

        Raises:
            SagaError: it is none of ours, or its input cannot be journalled.
        """
        if not isinstance(yielded, Operation):
            raise BodyError(
                f"the body awaits {yielded!r}, which is no operation of its run; do that in a step, and await that"
            )
        self._operations += 1
        if self._operations > limits.BODY_MAX_OPERATIONS:
            raise BodyError(
                f"the body has more than {limits.BODY_MAX_OPERATIONS} operations; start child sagas instead"
            )
        if isinstance(yielded, DoParallel):
            prefix = self._path("parallel")
            return At(
                yielded,
                tuple(
                    self._of_call(f"{prefix}[{n}]/{call.target.name}#1", call, yielded)
                    for n, call in enumerate(yielded.calls)
                ),
            )
        if isinstance(yielded, DoStep):
            call = yielded.call
            return At(yielded, (self._of_call(self._path(call.target.name), call, yielded),))
        return At(yielded, (self._of(yielded),))

    def _of(self, operation: Operation) -> Slot:
        match operation:
            case DoReceive(signal=signal):
                name = signal.__name__
                return Slot(path=self._path(name), name=name, kind="receive", digest=b"", operation=operation)
            case DoSleep():
                digest = _digest(repr(operation.duration_seconds))
                return Slot(path=self._path("sleep"), name="sleep", kind="sleep", digest=digest, operation=operation)
            case DoLock(key=key):
                return Slot(path=self._path("lock"), name="lock", kind="lock", digest=_digest(key), operation=operation)
            case DoChild(saga=child, request=request):
                text, digest = child.request.recognise(request)
                path = self._path(child.name)
                return Slot(path=path, name=child.name, kind="child", digest=digest, operation=operation, text=text)
            case DoPivot():
                return Slot(path=self._path("pivot"), name="pivot", kind="pivot", digest=b"", operation=operation)
            case _:
                raise AssertionError(f"unknown operation {operation!r}")

    def _of_call(self, path: str, call: Call[Any], operation: Operation) -> Slot:
        target = call.target
        self._saga.learn(target)
        text, digest = target.arguments.recognise(call.values)
        return Slot(
            path=path, name=target.name, kind=target.kind, digest=digest, call=call, operation=operation, text=text
        )

    def _path(self, name: str) -> str:
        self._counts[name] = count = self._counts.get(name, 0) + 1
        return f"{name}#{count}"


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


@contextmanager
def _no_event_loop() -> Generator[None]:
    """Hide the running event loop: a task or a timeout started by a body would act on whoever drives it."""
    loop = asyncio._get_running_loop()  # noqa: SLF001 - asyncio offers this to event loops, and we stand in for one
    asyncio._set_running_loop(None)  # noqa: SLF001
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)  # noqa: SLF001
