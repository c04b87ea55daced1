"""Python's garbage collector, held while a batch is unpacked and decoded, or a page.

A batch of some thousand events is a hundred thousand objects that all live until it is encoded, and then die by their
reference counts. The collector runs after each 700 new ones (its default), looks at every one of them up to three
times and finds nothing: a third of a consumer's CPU, and of a rebuild's. So it rests for a section without an await, of
a bounded number of records, and the objects are gone when it wakes.

A worker of sagas has no such sections: its instances are some ten thousand objects that live for milliseconds, across
many awaits. There the collector runs, but only after `SELDOM` new objects (`seldom`).
"""

import gc
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

SELDOM: Final = 20_000
"""New objects before the collector looks for those that only hold each other."""
P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def held() -> Iterator[None]:
    """No collections within the block; one that somebody switched off stays off."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Seldom:
    """How many want it now, and how it was before the first of them."""

    users = 0
    before = gc.get_threshold()


@contextmanager
def seldom() -> Iterator[None]:
    """Fewer collections within the block, of any length; a threshold that is higher already, or none, stays."""
    if _Seldom.users == 0:
        _Seldom.before = gc.get_threshold()
        if 0 < _Seldom.before[0] < SELDOM:
            gc.set_threshold(SELDOM, *_Seldom.before[1:])
    _Seldom.users += 1
    try:
        yield
    finally:
        _Seldom.users -= 1
        if _Seldom.users == 0 and gc.get_threshold()[0] == SELDOM:  # else somebody else has set it meanwhile
            gc.set_threshold(*_Seldom.before)


def held_in_steps(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Awaitable[T]]:
    """The same coroutine function, without collections between any two of its awaits; with them while it waits."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        return _Steps(function(*args, **kwargs))

    return call


class _Steps(Awaitable[T]):
    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, T]:
        coroutine = self._coroutine
        thrown: BaseException | None = None
        try:
            while True:
                try:
                    with held():
                        waits_for = coroutine.send(None) if thrown is None else coroutine.throw(thrown)
                except StopIteration as end:
                    result: T = end.value
                    return result
                thrown = None
                try:
                    yield waits_for
                except BaseException as error:  # noqa: BLE001 - a cancellation, too, is the coroutine's to answer
                    thrown = error
        finally:
            coroutine.close()
