"""A step in the transaction of its own checkpoint: both or neither, so exactly once.

    BEGIN (READ COMMITTED) -> the step's function -> the checkpoint, waiting for the instance's row -> COMMIT

The checkpoint is the last statement: the row that everybody else needs for signals and cancels is locked only from
there to the commit, and what the step emitted rides in it, so events are written while the step's row locks are held.

* Crash, lost connection or error before COMMIT: nothing happened, neither the step nor the checkpoint.
* A conflict (40001, 40P01, 55P03) or a lost connection before COMMIT: the step is performed again.
* The reply to COMMIT is lost: epoch and number of the checkpoint are read from the instance's row, which the server
  process of the lost connection has locked until it is through. They say whether it was committed.
* Somebody else has the instance (`fenced`), or there is news that has to be looked at first (`changed`): rolled back.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

from outbox import postgres, retry
from outbox.postgres import Connection, Pool
from outbox.transaction import Buffer, Emission, Transaction
from saga import journal, limits
from saga.outcome import brief, perform
from saga.state import Answer, Checkpoint, Completed, Fact, OutboxRow, Uncertain, Work
from saga.writer import limit_lock_waits

SQL: Final = postgres.Statements("saga", "transactional.sql")


class ConflictError(Exception):
    """The transaction is known to be rolled back, by PostgreSQL or because the way to it was lost."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(brief(error))
        self.may_succeed: Final = _may_succeed(error)
        """Whether the same work may succeed later."""
        self.is_of_row: Final = postgres.sqlstate(error) == postgres.LOCKED
        """Whether somebody else had the instance's row for too long: however often, that is not the step's fault."""


class _EndedOtherwiseError(Exception):
    """The step has ended without anything to commit."""


@dataclass(slots=True, eq=False)
class Prepared:
    """A step that has done its work in a transaction that is still open, until somebody says what becomes of it."""

    fact: Completed
    connection: Connection
    verdict: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """A result commits, an exception rolls back."""
    ended: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """What became of it."""

    def roll_back(self, why: BaseException | None = None) -> None:
        """Let go of it."""
        if not self.verdict.done():
            self.verdict.set_exception(why or _EndedOtherwiseError())

    async def give_up(self, why: BaseException | None = None) -> None:
        """Let go of it, and wait until it is rolled back."""
        self.roll_back(why)
        await asyncio.wait([self.ended])


async def perform_in_transaction(pool: Pool, work: Work, offer: Callable[[Prepared], None]) -> Fact | None:
    """Perform one attempt, with further ones where PostgreSQL asks for them.

    Args:
        pool: of the saga's database.
        work: of kind `transactional` or `undo_transactional`.
        offer: given the open transaction once the step has completed in it; its `verdict` ends it.

    Returns:
        What became of the step where there is nothing to commit; None after `offer`.
    """
    pauses = retry.backoff(maximum=limits.LOCKED_WAIT_SECONDS)
    failed = 0
    while True:
        try:
            return await _perform_once(pool, work, offer)
        except Exception as error:  # noqa: BLE001 - whatever is no conflict is the attempt's end
            failed += 1
            if not _may_succeed(error) or failed == limits.TRANSACTIONAL_ATTEMPTS:
                return Uncertain(path=work.path, error=brief(error))
            await asyncio.sleep(next(pauses))


async def _perform_once(pool: Pool, work: Work, offer: Callable[[Prepared], None]) -> Fact | None:
    fact: Fact | None = None
    prepared: Prepared | None = None
    try:
        async with postgres.acquire(pool) as connection, postgres.transact(connection, isolation="read_committed"):
            fact, emitted = await _in_open_transaction(connection, work)
            if not isinstance(fact, Completed):
                raise _EndedOtherwiseError  # noqa: TRY301 - what rolls back is an exception
            fact = replace(fact, outbox=tuple(map(_message, emitted)))
            prepared = Prepared(fact=fact, connection=connection)
            offer(prepared)
            await prepared.verdict
    except _EndedOtherwiseError:
        if prepared is None:
            return fact
        prepared.ended.set_result(None)
    except BaseException as error:
        if prepared is None:
            raise
        prepared.ended.set_exception(error)
        prepared.ended.exception()  # whoever waits for it is told; that nobody does, at a cancellation, is no news
    else:
        prepared.ended.set_result(None)
    return None


async def _in_open_transaction(connection: Connection, work: Work) -> tuple[Fact, list[Emission]]:
    buffer = Buffer()
    unit = Transaction(connection, buffer)
    stop_observing = postgres.on_savepoints(connection, buffer.observe)
    try:
        async with asyncio.timeout(work.timeout_seconds):
            fact = await perform(work, unit, passing_on=_may_succeed)
        unit.seal()
        await asyncio.sleep(0)  # lets queued observations and emissions reach the buffer
        return fact, buffer.drain()
    finally:
        stop_observing()


async def commit(pool: Pool, prepared: Prepared, checkpoint: Checkpoint) -> Answer:
    """Write the checkpoint in the step's transaction, and commit; where it does not apply, roll back.

    Raises:
        ConflictError: rolled back, for no reason of the instance's; the step did not happen.
    """
    try:
        await limit_lock_waits(prepared.connection)
        [written] = await journal.write(prepared.connection, [checkpoint], wait=True)
    except Exception as error:
        await prepared.give_up(error)
        raise ConflictError(error) from error
    answer = written.answer
    assert answer is not None, "one that waits is never told that the row is locked"
    if answer.kind not in ("applied", "news") or written.again:
        await prepared.give_up()
        return answer
    prepared.verdict.set_result(None)
    try:
        await prepared.ended
    except Exception as error:
        fate = await _fate(pool, checkpoint)
        if fate is None:
            raise ConflictError(error) from error
        return fate
    return answer


async def _fate(pool: Pool, checkpoint: Checkpoint) -> Answer | None:
    """What became of a checkpoint whose COMMIT was not answered; None: rolled back."""
    async for attempt in retry.attempts():
        with attempt:
            row = await SQL.fate.fetchrow(pool, checkpoint.id)
            assert row is not None, f"instance {checkpoint.id} is gone while a worker has it"
            if row["checkpoint_no"] == checkpoint.no and row["lease_epoch"] == checkpoint.epoch:
                return None
            if row["lease_epoch"] != checkpoint.epoch:
                return Answer(kind="fenced")
            is_news = row["news_no"] == checkpoint.no + 1
            return Answer(
                kind="news" if is_news else "applied", wakeups=row["wakeups"], cancel_reason=row["cancel_reason"]
            )
    raise AssertionError("attempts end by a return or an error")


def _message(emission: Emission) -> OutboxRow:
    return OutboxRow(
        topic=emission.topic,
        key=emission.key,
        event_id=emission.event_id,
        event_type=emission.event_type,
        schema_version=emission.schema_version,
        headers=emission.headers,
        payload=emission.payload,
        is_next=False,
    )


def _may_succeed(error: BaseException) -> bool:
    """Whether PostgreSQL, not the step, is why it failed: in the error itself, or in the one that it was made of."""
    seen: BaseException | None = error
    while seen is not None:
        if retry.is_transient(seen):
            return True
        seen = seen.__cause__
    return False
