"""Handlers of users in the transaction of a batch: several in one unit of work, or one in a savepoint of its own.

What a handler raises is an event's own fault; an error of the server, or of the way to it, is nobody's. Telling them
apart is decided here, for inboxes and whatever else calls handlers.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from outbox import postgres, retry
from outbox.errors import HandlerFailed, TransactionClosed
from outbox.postgres import Connection
from outbox.transaction import Transaction, transaction

SQL: Final = postgres.Statements("outbox", "consumer/handling.sql")

T = TypeVar("T")

_CAUSES_MAX: Final = 10
"""How many wrappings an error is looked through."""


async def alone(connection: Connection, handler: Callable[[Transaction], Awaitable[object]]) -> Exception | None:
    """Call one handler in a savepoint, with its deferred constraints checked and its events inserted; why it failed.

    Raises:
        PostgresError, OSError, TimeoutError: transient; nothing is known of the batch any more.
        TransactionClosed: the handler ended the transaction.
    """
    is_lost = False
    try:
        async with unit(connection) as tx:
            await SQL.begin_event.execute(connection)
            try:
                await call(handler(tx))
                require_transaction(connection)
                await SQL.end_event.execute(connection)
            except Exception as error:
                is_lost = is_transient(connection, error) or await _has_hurt(connection, error)
                raise
    except Exception as error:
        if is_lost or is_transient(connection, error) or not connection.is_in_transaction():
            raise
        return error
    return None


async def call(handling: Awaitable[T]) -> T:
    """Await a handler; a cancellation that nobody asked this task for is an error of the handler's own.

    Raises:
        HandlerFailed: it awaited something that somebody else had cancelled.
    """
    try:
        return await handling
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise HandlerFailed("the handler awaited something that was cancelled") from error


@asynccontextmanager
async def unit(connection: Connection) -> AsyncIterator[Transaction]:
    """A unit of work inside the batch's transaction.

    Raises:
        TransactionClosed: a handler ended the transaction, so that what is left to do has nothing to go back to.
    """
    try:
        async with transaction(connection) as tx:
            yield tx
    except postgres.PostgresError as error:
        require_transaction(connection, error)
        raise


def require_transaction(connection: Connection, error: BaseException | None = None) -> None:
    """After a handler.

    Raises:
        TransactionClosed: it ended the batch's transaction.
    """
    if not postgres.is_lost(connection) and not connection.is_in_transaction():
        raise TransactionClosed(
            "a handler ended the batch's transaction, so that parts of the batch are committed without the rest: leave "
            "COMMIT and ROLLBACK to the consumer, and nest outbox.transaction(tx) instead"
        ) from error


def is_transient(connection: Connection, error: BaseException) -> bool:
    """Whether the database is in trouble: by an SQLSTATE, wherever in the chain of causes, or by a lost connection."""
    if postgres.is_lost(connection):
        return True
    cause: BaseException | None = error
    for _ in range(_CAUSES_MAX):
        if cause is None:
            return False
        if postgres.sqlstate(cause) is not None and retry.is_transient(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


async def _has_hurt(connection: Connection, error: BaseException) -> bool:
    """Whether an error that may be anybody's, such as a TimeoutError, is that of a statement; the transaction knows."""
    if postgres.sqlstate(error) is not None or not retry.is_transient(error):
        return False
    try:
        await SQL.begin_event.execute(connection)
    except postgres.PostgresError:
        return True
    return False
