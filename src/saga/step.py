"""Steps: what a saga does, and how each is undone.

    @step(retry=Retry(attempts=5, initial=0.2), timeout=10)
    async def charge(ctx: StepContext, order: PlaceOrder) -> Charge: ...

    @charge.compensation
    async def refund(ctx: StepContext, done: Charge | Unknown, order: PlaceOrder) -> None: ...

Calling a step only describes the call; `run(charge(order))` performs it. Outside a saga, `charge.function` is the
function as it was written.
"""

import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Concatenate, Final, Generic, Literal, ParamSpec, TypeAlias, overload

from typing_extensions import TypeVar

from outbox import Duration, Transaction
from saga import limits
from saga.codec import Arguments, Value, hints_of, name_of
from saga.context import NotDone, Retry, StepContext, Unknown, not_negative, positive
from saga.errors import SagaDeclarationError

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
X = TypeVar("X")
D = TypeVar("D", default=None)
Tx = TypeVar("Tx", bound=Transaction)

StepKind: TypeAlias = Literal["step", "transactional", "remote"]

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]*")


class Call(Generic[R_co]):
    """One call of a step or remote contract, described and not performed; `run(...)` performs it."""

    __slots__ = ("target", "values")

    def __init__(self, target: "Target", values: dict[str, Any]) -> None:
        """Made by calling a `Step` or a `Remote`."""
        self.target = target
        self.values = values

    def __repr__(self) -> str:
        return f"<call of {self.target.name}: pass it to run(...)>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compensation:
    """How a step is undone."""

    function: Callable[..., Awaitable[None]]
    required: bool
    retry: Retry
    timeout_seconds: float


class Target:
    """What can be called in a saga: the parts of a step and of a remote contract that the engine needs."""

    def __init__(self, *, name: str, kind: StepKind, arguments: Any, result: "Value[Any]") -> None:
        """For subclasses."""
        self.name: Final = name
        self.kind: Final[StepKind] = kind
        self.arguments: Final = arguments
        """Binds, encodes and recognises inputs: an `Arguments`, or a remote's like it."""
        self.result: Final = result
        self.undo: Compensation | None = None
        self.ask: Callable[..., Awaitable[Any]] | None = None
        self.retry = Retry(limits.STEP_ATTEMPTS)
        self.timeout_seconds = limits.STEP_TIMEOUT_SECONDS
        self.irreversible = False
        self.at_most_once = False
        self.fences = False
        self.settle_seconds = 0.0
        """How long after an unknown attempt its effect may still appear."""

    def __repr__(self) -> str:
        return f"<{self.kind} {self.name}>"


class Step(Target, Generic[X, P, R]):
    """A step; made by `step`."""

    def __init__(self, function: Callable[Concatenate[X, P], Awaitable[R]], options: "Options") -> None:
        """For `step`.

        Raises:
            SagaDeclarationError: the function cannot be one.
        """
        name = check_name("step", getattr(function, "__name__", "step"))
        check_async(function)
        hints = hints_of(function)
        if "return" not in hints:
            raise SagaDeclarationError(name, "has no return annotation", "annotate what it returns, None included")
        if not inspect.signature(function).parameters:
            raise SagaDeclarationError(name, "has no parameter", f"let its first one be {options.first_parameter}")
        super().__init__(
            name=name,
            kind="transactional" if options.transactional else "step",
            arguments=Arguments(function),
            result=Value(hints["return"], f"result of {name}"),
        )
        self._function = function
        self.retry = options.retry
        self.timeout_seconds = options.timeout_seconds
        self.irreversible = options.irreversible
        self.at_most_once = options.at_most_once
        self.fences = options.fences
        self.settle_seconds = options.settle_seconds

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """Describe a call; `run(...)` performs it."""
        return Call(self, self.arguments.bind(args, kwargs))

    @property
    def function(self) -> Callable[Concatenate[X, P], Awaitable[R]]:
        """The function as it was written, to call it directly in a test."""
        return self._function

    @overload
    def compensation(
        self, fn: Callable[Concatenate[X, R | Unknown, P], Awaitable[None]], /
    ) -> Callable[Concatenate[X, R | Unknown, P], Awaitable[None]]: ...
    @overload
    def compensation(
        self, *, required: bool = True, retry: Retry = ..., timeout: Duration = ...
    ) -> Callable[
        [Callable[Concatenate[X, R | Unknown, P], Awaitable[None]]],
        Callable[Concatenate[X, R | Unknown, P], Awaitable[None]],
    ]: ...
    def compensation(
        self,
        fn: Callable[..., Awaitable[None]] | None = None,
        *,
        required: bool = True,
        retry: Retry | None = None,
        timeout: Duration | None = None,
    ) -> Any:
        """Register how the step is undone: called with its result, or `Unknown`, and the same arguments.

        It may be called more than once, and for a step that never happened; under its idempotency key it must count
        once.

        Args:
            fn: the compensation, where the decorator is written without brackets.
            required: whether the saga waits for a person where the compensation keeps failing; else it goes on.
            retry: how often it is tried before that.
            timeout: of one attempt.

        Raises:
            SagaDeclarationError: the step has one already, is irreversible, or the function does not fit.
        """

        def register(function: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
            self._check_second(function, "compensation", self.undo, extra=2)
            self.undo = Compensation(
                function=function,
                required=required,
                retry=retry or Retry(limits.COMPENSATION_ATTEMPTS),
                timeout_seconds=positive("timeout", timeout, limits.STEP_TIMEOUT_SECONDS),
            )
            return function

        return register if fn is None else register(fn)

    def probe(
        self, fn: Callable[Concatenate[X, P], Awaitable[R | NotDone]], /
    ) -> Callable[Concatenate[X, P], Awaitable[R | NotDone]]:
        """Register how to ask whether the step happened: its result, or `NotDone()`.

        Asked where the outcome is unknown, and only once the effect can no longer appear (`settle`).

        Raises:
            SagaDeclarationError: the step has one already, is transactional, or the function does not fit.
        """
        if self.kind == "transactional":
            raise SagaDeclarationError(f"{self.name}.probe", "asks what is known", "its outcome is never unknown")
        self._check_second(fn, "probe", self.ask, extra=1)
        self.ask = fn
        return fn

    def _check_second(self, function: Callable[..., Any], what: str, present: object, *, extra: int) -> None:
        field = f"{self.name}.{what}"
        if present is not None:
            raise SagaDeclarationError(field, "is registered twice", "keep one of the two")
        if self.irreversible and what == "compensation":
            raise SagaDeclarationError(field, "undoes what is irreversible", "drop irreversible=True, or this function")
        check_async(function)
        try:
            positional, keyword = self.arguments.unbind(dict.fromkeys(self.arguments.names))
            inspect.signature(function).bind(*[None] * extra, *positional, **keyword)
        except TypeError as error:
            raise SagaDeclarationError(
                field, f"{name_of(function)} cannot take the step's arguments ({error})", "let it take the same ones"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `step` was told."""

    transactional: bool = False
    at_most_once: bool = False
    retry: Retry
    timeout_seconds: float
    irreversible: bool = False
    fences: bool = False
    settle_seconds: float

    @property
    def first_parameter(self) -> str:
        """What the function takes first, for messages."""
        return "tx: Transaction" if self.transactional else "ctx: StepContext"


@overload
def step(fn: Callable[Concatenate[StepContext[D], P], Awaitable[R]], /) -> Step[StepContext[D], P, R]: ...
@overload
def step(*, transactional: Literal[True]) -> Callable[[Callable[Concatenate[Tx, P], Awaitable[R]]], Step[Tx, P, R]]: ...
@overload
def step(
    *, at_most_once: Literal[True], timeout: Duration = ..., irreversible: bool = False
) -> Callable[[Callable[Concatenate[StepContext[D], P], Awaitable[R]]], Step[StepContext[D], P, R]]: ...
@overload
def step(
    *,
    timeout: Duration = ...,
    retry: Retry = ...,
    irreversible: bool = False,
    fences: bool = False,
    settle: Duration = ...,
) -> Callable[[Callable[Concatenate[StepContext[D], P], Awaitable[R]]], Step[StepContext[D], P, R]]: ...
def step(
    fn: Callable[..., Awaitable[Any]] | None = None,
    /,
    *,
    transactional: bool = False,
    at_most_once: bool = False,
    timeout: Duration | None = None,
    retry: Retry | None = None,
    irreversible: bool = False,
    fences: bool = False,
    settle: Duration | None = None,
) -> Any:
    """Declare a step: an async function whose first parameter is its context.

    Args:
        fn: the function, where the decorator is written without brackets.
        transactional: the first parameter is a `Transaction` on the saga's own database; what is written in it commits
            together with the step, exactly once.
        at_most_once: never tried a second time, not even after a crash or a resume; excludes `retry`.
        timeout: of one attempt.
        retry: how often it is tried, and the pauses; 5 times by default.
        irreversible: it has no compensation, and that is meant.
        fences: its service refuses a do that arrives after its undo, so an unknown outcome can be undone at once.
        settle: how long after an unknown attempt its effect may still appear; an undo waits for that.

    Raises:
        SagaDeclarationError: options exclude each other, or the function cannot be a step.
    """
    if at_most_once and retry is not None:
        raise SagaDeclarationError("retry", "is of no use at most once", "drop retry, or at_most_once=True")
    if transactional and (timeout is not None or retry is not None or at_most_once or fences or settle is not None):
        raise SagaDeclarationError("transactional", "is exactly once", "drop the other options")
    timeout_seconds = positive("timeout", timeout, limits.STEP_TIMEOUT_SECONDS)
    options = Options(
        transactional=transactional,
        at_most_once=at_most_once,
        retry=Retry(1) if at_most_once else retry or Retry(limits.STEP_ATTEMPTS),
        timeout_seconds=timeout_seconds,
        irreversible=irreversible,
        fences=fences,
        settle_seconds=timeout_seconds + limits.LEASE_MARGIN_SECONDS if settle is None else not_negative(settle),
    )

    def declare(function: Callable[..., Awaitable[Any]]) -> Step[Any, Any, Any]:
        return Step(function, options)

    return declare if fn is None else declare(fn)


def check_name(what: str, name: str) -> str:
    """The name, if journals and topics can carry it.

    Raises:
        SagaDeclarationError: they cannot.
    """
    if not _NAME.fullmatch(name) or len(name) > limits.NAME_MAX_BYTES:
        raise SagaDeclarationError(
            f"{what} {name!r}", "is no name", f"use 1 to {limits.NAME_MAX_BYTES} of a-z A-Z 0-9 _ . : -, a letter first"
        )
    return name


def check_async(function: Callable[..., Any]) -> None:
    """Refuse what cannot be awaited.

    Raises:
        SagaDeclarationError: the function is not `async def`.
    """
    if not inspect.iscoroutinefunction(function):
        raise SagaDeclarationError(name_of(function), "is no coroutine function", "write async def")
