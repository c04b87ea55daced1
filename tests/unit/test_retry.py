"""Error classes, and the one backoff."""

import asyncio
from itertools import islice

import asyncpg
import pytest

from outbox import limits, retry


@pytest.mark.parametrize(
    ("error", "transient", "data"),
    [
        (asyncpg.DeadlockDetectedError(), True, False),
        (asyncpg.SerializationError(), True, False),
        (asyncpg.LockNotAvailableError(), True, False),
        (asyncpg.TooManyConnectionsError(), True, False),
        (asyncpg.AdminShutdownError(), True, False),
        (asyncpg.QueryCanceledError(), True, False),
        (asyncpg.ConnectionDoesNotExistError(), True, False),
        (asyncpg.InterfaceError("connection is closed"), True, False),
        (asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"), True, False),
        (ConnectionResetError(), True, False),
        (TimeoutError(), True, False),
        (asyncpg.CheckViolationError(), False, True),
        (asyncpg.UniqueViolationError(), False, True),
        (asyncpg.NumericValueOutOfRangeError(), False, True),
        (asyncpg.CardinalityViolationError(), False, True),
        (asyncpg.RaiseError(), False, True),
        (asyncpg.exceptions._base.DataError("invalid input for query argument $1"), False, True),
        (ValueError(), False, True),
        (asyncpg.UndefinedTableError(), False, False),
        (asyncpg.InsufficientPrivilegeError(), False, False),
        (asyncpg.ObjectNotInPrerequisiteStateError(), False, False),
        (KeyError(), False, False),
    ],
)
def test_each_error_has_one_class(error: Exception, transient: bool, data: bool) -> None:  # noqa: FBT001
    assert (retry.is_transient(error), retry.is_data(error)) == (transient, data)


def test_backoff_grows_within_its_bounds() -> None:
    delays = list(islice(retry.backoff(initial=0.1, maximum=2.0), 50))
    assert 0.05 <= delays[0] <= 0.15
    assert all(1.0 <= delay <= 2.0 for delay in delays[10:])
    assert max(islice(retry.backoff(), 50)) <= limits.BACKOFF_MAX_SECONDS


async def test_attempts_until_it_works() -> None:
    failures = [TimeoutError(), ConnectionResetError()]
    async for attempt in retry.attempts(initial=0.001):
        with attempt:
            if failures:
                raise failures.pop()
    assert failures == []


async def tries(error: Exception, stopping: asyncio.Event) -> list[int]:
    """How often it is tried, each time a number; ends by setting `stopping`."""
    made: list[int] = []
    async for attempt in retry.attempts(stopping=stopping, initial=60.0, maximum=60.0):
        with attempt:
            made.append(len(made))
            stopping.set()
            raise error
    return made


async def test_other_errors_are_raised_at_once() -> None:
    with pytest.raises(KeyError):
        await tries(KeyError(), asyncio.Event())


async def test_stopping_ends_the_attempts() -> None:
    stopping = asyncio.Event()
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError, match="again"):
            await tries(TimeoutError("again"), stopping)
