"""What a step, its compensation and its probe are given, and how often a step is tried."""

from datetime import timedelta
from typing import Final, Generic

from typing_extensions import TypeVar

from outbox import Duration
from saga import limits
from saga.errors import SagaDeclarationError

D = TypeVar("D", default=None)


class Unknown:
    """What a compensation receives in place of a result that nobody saw: the step may have happened, or not."""

    __slots__ = ("_idempotency_key",)

    def __init__(self, idempotency_key: str) -> None:
        """Made by the worker."""
        self._idempotency_key = idempotency_key

    @property
    def idempotency_key(self) -> str:
        """The key under which the step called, on every attempt: it names what to undo."""
        return self._idempotency_key

    def __repr__(self) -> str:
        return f"Unknown({self._idempotency_key!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Unknown) and other.idempotency_key == self.idempotency_key

    def __hash__(self) -> int:
        return hash(self._idempotency_key)


class NotDone:
    """A probe's answer: the step did not happen, and will not."""

    def __repr__(self) -> str:
        return "NotDone()"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NotDone)

    def __hash__(self) -> int:
        return hash(NotDone)


class Retry:
    """How often a step is tried in all, and how long to wait between two attempts: doubling, with jitter."""

    __slots__ = ("attempts", "initial", "maximum")

    def __init__(
        self,
        attempts: int,
        initial: Duration = limits.RETRY_INITIAL_SECONDS,
        maximum: Duration = limits.RETRY_MAXIMUM_SECONDS,
    ) -> None:
        """For `attempts` attempts; the first pause is about `initial`, none is longer than `maximum`.

        Raises:
            SagaDeclarationError: there is no attempt, or a pause is negative.
        """
        self.attempts: Final = attempts
        self.initial: Final = seconds(initial)
        self.maximum: Final = seconds(maximum)
        if attempts < 1:
            raise SagaDeclarationError("retry", f"allows {attempts} attempts", "allow at least one")
        if self.initial < 0 or self.maximum < self.initial:
            raise SagaDeclarationError("retry", "has pauses that cannot be", "let 0 <= initial <= maximum")

    def delay(self, failed: int, chance: float) -> float:
        """Seconds to wait after `failed` failed attempts; `chance` between 0 and 1 is the jitter."""
        ceiling = min(self.maximum, self.initial * 2.0 ** min(failed - 1, 60))
        return ceiling * (0.5 + chance / 2)

    def __repr__(self) -> str:
        return f"Retry(attempts={self.attempts}, initial={self.initial}, maximum={self.maximum})"


class StepContext(Generic[D]):
    """What a step knows about the attempt that it is."""

    __slots__ = ("_attempt", "_deps", "_idempotency_key")

    def __init__(self, *, deps: D, idempotency_key: str, attempt: int) -> None:
        """Made by the worker; tests of a step's function make their own."""
        self._deps = deps
        self._idempotency_key = idempotency_key
        self._attempt = attempt

    @property
    def deps(self) -> D:
        """What the worker was given as `deps`: clients, settings."""
        return self._deps

    @property
    def idempotency_key(self) -> str:
        """The same on every attempt, also after a crash; pass it to the service that is called."""
        return self._idempotency_key

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1. A lower bound: attempts of a process that crashed may not all count."""
        return self._attempt


def seconds(duration: Duration) -> float:
    """A duration in seconds."""
    return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)


def positive(field: str, duration: Duration | None, default: float) -> float:
    """A duration in seconds, or the default where none is given.

    Raises:
        SagaDeclarationError: it is not above zero.
    """
    if duration is None:
        return default
    value = seconds(duration)
    if not 0 < value < float("inf"):
        raise SagaDeclarationError(field, f"is {value} seconds", "give a time above zero that ends")
    return value


def not_negative(duration: Duration) -> float:
    """A duration in seconds.

    Raises:
        SagaDeclarationError: it is below zero.
    """
    value = seconds(duration)
    if not 0 <= value < float("inf"):
        raise SagaDeclarationError("settle", f"is {value} seconds", "give a time from zero that ends")
    return value
