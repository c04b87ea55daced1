"""One attempt, and what its end means.

| the attempt                                   | fact                                                                |
|-----------------------------------------------|---------------------------------------------------------------------|
| returned a value that the journal can hold    | `Completed`                                                         |
| raised `Rejected`                             | `Refused`: it did nothing; clean only if every attempt says so      |
| returned a value that the journal cannot hold | `Unwritable`: it happened, and the step has a bug                   |
| timed out, lost a connection, raised anything | `Uncertain`: it may have happened                                   |
| was cancelled by somebody else than us        | likewise                                                            |

A compensation that raises anything, `Rejected` included, is `Uncertain`: it is tried again. Cancellation of the attempt
itself is passed on: it is the worker that stops, and the intent in the journal says what that means.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import coroutine
from typing import Any, TypeVar, cast

from saga.context import NotDone, StepContext, Unknown
from saga.errors import PayloadError, Rejected, storable
from saga.state import Completed, Fact, NotHappened, Refused, Uncertain, Unwritable, Work
from saga.step import Target

T = TypeVar("T")


async def perform(
    work: Work, context: object, *, passing_on: Callable[[BaseException], bool] = lambda _error: False
) -> Fact:
    """Perform one attempt of a step, a probe or a compensation.

    Args:
        work: of a kind that calls a function: not `lock`, nor `undo_child`.
        context: the function's first argument: a `StepContext` (see `context_of`), or the open `Transaction`.
        passing_on: errors of which it says yes are raised as they are.
    """
    target = cast("Target", work.target)
    try:
        if work.kind in {"undo", "undo_transactional"}:
            return await _undo(work, target, context)
        if work.kind == "probe":
            return await _probe(work, target, context)
        return await _do(work, target, context)
    except Exception as error:
        if passing_on(error):
            raise
        if isinstance(error, TimeoutError) and not str(error):
            return Uncertain(path=work.path, error=f"timed out after {work.timeout_seconds:g} s")
        return Uncertain(path=work.path, error=brief(error))


def context_of(work: Work, deps: object) -> StepContext[Any]:
    """The context of an attempt that runs outside a transaction."""
    return StepContext(deps=deps, idempotency_key=str(work.key), attempt=work.attempt)


def brief(error: BaseException) -> str:
    """An error in one line that the journal can hold."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return storable(text)


async def _do(work: Work, target: Target, context: object) -> Fact:
    args, kwargs = target.arguments.unbind(work.values)
    try:
        if work.kind == "transactional":
            result = await _called(cast("Any", target).function(context, *args, **kwargs))
        else:
            call = _called(cast("Any", target).function(context, *args, **kwargs))
            result = await _within(work.timeout_seconds, call)
    except Rejected as rejection:
        return Refused(path=work.path, reason=rejection.reason)
    return _completed(work, target, result)


async def _probe(work: Work, target: Target, context: object) -> Fact:
    found = await _ask(work, target, context)
    return NotHappened(path=work.path) if isinstance(found, NotDone) else _completed(work, target, found)


async def _undo(work: Work, target: Target, context: object) -> Fact:
    assert target.undo is not None, f"{target.name} is in the plan without a compensation"
    args, kwargs = target.arguments.unbind(work.values)
    done = work.done
    if work.ask_first:
        done = await _found(work, target, context)
        if isinstance(done, NotDone):
            return Completed(path=work.path)
    if work.kind == "undo_transactional":
        await _called(target.undo.function(context, done, *args, **kwargs))
    else:
        await _within(work.timeout_seconds, _called(target.undo.function(context, done, *args, **kwargs)))
    return Completed(path=work.path)


async def _found(work: Work, target: Target, context: object) -> Any:
    """What a probe finds of an unknown step; one that cannot answer leaves it `Unknown`, which every undo takes.

    It asks under the step's own key, not under that of the compensation.
    """
    assert isinstance(work.done, Unknown)
    assert isinstance(context, StepContext)
    own: StepContext[Any] = StepContext(
        deps=context.deps, idempotency_key=work.done.idempotency_key, attempt=context.attempt
    )
    try:
        return await _ask(work, target, own)
    except Exception:  # noqa: BLE001 - a probe is the user's code, and must not keep a compensation from happening
        return work.done


async def _ask(work: Work, target: Target, context: object) -> Any:
    assert target.ask is not None, f"{target.name} has no probe"
    args, kwargs = target.arguments.unbind(work.values)
    return await _within(target.timeout_seconds, _called(target.ask(context, *args, **kwargs)))


async def _within(seconds: float, call: Coroutine[Any, Any, Any]) -> Any:
    """What a call returns within a time; one that waits for nothing needs no timer, which would cost more than it."""
    until = asyncio.get_running_loop().time() + seconds
    try:
        waits_for = call.send(None)
    except StopIteration as end:
        return end.value
    async with asyncio.timeout_at(until):
        return await _rest(call, waits_for)


@coroutine
def _rest(call: Coroutine[Any, Any, Any], waits_for: object) -> Generator[object, Any, Any]:
    """Go on with a coroutine that has begun already, and waits for something."""
    try:
        while True:
            try:
                sent = yield waits_for
            except GeneratorExit:
                call.close()
                raise
            except BaseException as error:  # noqa: BLE001 - a cancellation, too, is the coroutine's to answer
                waits_for = call.throw(error)
            else:
                waits_for = call.send(sent)
    except StopIteration as end:
        return end.value


async def _called(calling: Awaitable[T]) -> T:
    """Await a function of the user's. Whatever it ends with is an `Exception`, unless the worker itself stops.

    Raises:
        _StrayError: it awaited something that somebody else had cancelled, or raised what is no `Exception`.
    """
    try:
        return await calling
    except (Exception, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise _StrayError("it awaited something that was cancelled") from error
    except BaseException as error:
        raise _StrayError(brief(error)) from error


class _StrayError(Exception):
    """What a function of the user's must not raise, as an error like others."""


def _completed(work: Work, target: Target, result: object) -> Fact:
    try:
        output = target.result.encode(result)
    except PayloadError as error:
        return Unwritable(path=work.path, problem=str(error))
    return Completed(path=work.path, output=output)
