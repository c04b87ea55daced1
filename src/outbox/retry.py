"""Which errors go away by waiting, and how long to wait: error classes by SQLSTATE, and the one backoff.

Three answers to an error, decided here and nowhere else:

* *transient*: the server or the way to it is in trouble; the same work, unchanged, may succeed later.
* *data*: this value is refused and always will be; find the guilty one and set it aside.
* anything else is a bug or a wrong set-up: waiting does not mend it, and it is never taken for the other two.
"""

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Final

import tenacity

from outbox import limits, postgres

_TRANSIENT_CLASSES: Final = frozenset({"08", "40", "53", "57", "58"})
"""Connection, transaction rollback, resources, operator intervention, system."""
_TRANSIENT_STATES: Final = frozenset({"55P03"})
"""Lock not available. The rest of class 55 is a wrong set-up."""
_DATA_CLASSES: Final = frozenset({"21", "22", "23"})
"""Cardinality violation (one row twice in a statement), data exception, integrity constraint violation."""
_DATA_STATES: Final = frozenset({"P0001"})
"""Raised by a trigger or function of the user's."""

_INITIAL_SECONDS: Final = 0.05


def is_transient(error: BaseException) -> bool:
    """Whether the same work may succeed later; after a lost connection its effect is unknown."""
    state = postgres.sqlstate(error)
    if state is not None:
        return state[:2] in _TRANSIENT_CLASSES or state in _TRANSIENT_STATES
    return isinstance(error, postgres.CONNECTION_ERRORS) and not isinstance(error, ValueError)


def is_data(error: BaseException) -> bool:
    """Whether a value was refused: by the server, or by the driver before it was sent (a `ValueError`)."""
    state = postgres.sqlstate(error)
    if state is not None:
        return state[:2] in _DATA_CLASSES or state in _DATA_STATES
    return isinstance(error, ValueError)


def backoff(*, initial: float = _INITIAL_SECONDS, maximum: float = limits.BACKOFF_MAX_SECONDS) -> Iterator[float]:
    """Delays without end, doubling from `initial` to `maximum` seconds, with jitter; anew after a success."""
    wait = _wait(initial, maximum)
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    while True:
        yield wait(state)
        state.attempt_number += 1


def attempts(
    *,
    when: Callable[[BaseException], bool] = is_transient,
    initial: float = _INITIAL_SECONDS,
    maximum: float = limits.BACKOFF_MAX_SECONDS,
    stopping: asyncio.Event | None = None,
    within: float = math.inf,
) -> tenacity.AsyncRetrying:
    """Attempts with backoff while `when` says that the error is worth another; others are raised as they are.

        async for attempt in retry.attempts(stopping=self._stopping):
            with attempt:
                await work()

    Once `stopping` is set, pauses end at once and the last error is raised; no attempt begins after `within` seconds.
    """
    stop_signal = asyncio.Event() if stopping is None else stopping

    async def sleep(seconds: float) -> None:
        await pause(seconds, stop_signal)

    return tenacity.AsyncRetrying(
        sleep=sleep,
        wait=_wait(initial, maximum),
        retry=tenacity.retry_if_exception(when),
        stop=lambda state: stop_signal.is_set() or (state.seconds_since_start or 0.0) + state.upcoming_sleep > within,
        reraise=True,
    )


async def pause(seconds: float, stopping: asyncio.Event) -> bool:
    """Wait, or less if `stopping` is set meanwhile; whether it is set."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await stopping.wait()
    return stopping.is_set()


def _wait(initial: float, maximum: float) -> Callable[[tenacity.RetryCallState], float]:
    half, ceiling = initial / 2, maximum / 2
    return tenacity.wait_exponential(half, ceiling) + tenacity.wait_random_exponential(half, ceiling)
