"""What one command comes to: answered from its row, by its handler, or with its failure; or tried again.

The rules stand in `serving`.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from outbox import postgres
from outbox.cache.fold import Fault
from outbox.consumer import handling
from outbox.errors import HandlerFailed
from outbox.postgres import Connection
from outbox.transaction import Transaction
from saga import limits
from saga.envelope import Command, answer_to_do, answer_to_undo, reply, text_of
from saga.errors import Rejected
from saga.participant import Handler, Participant
from saga.state import OutboxRow

log = logging.getLogger(__name__)

SQL: Final = postgres.Statements("saga", "answering.sql")

UNDONE_BEFORE: Final = "undone before it came"
TOO_OLD: Final = f"older than {limits.COMMAND_MAX_AGE_DAYS} days: whether it was undone is not known any more"
FORGOTTEN: Final = "sent too long ago: whether it happened, and what is to be undone, is not known any more"
_MAX_AGE: Final = timedelta(days=limits.COMMAND_MAX_AGE_DAYS)


class NotServedError(Exception):
    """The participant has no handler of this contract."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is stored about one command."""

    outcome: str | None
    output: str | None
    error: str | None
    is_undone: bool
    attempts: int


class Memory:
    """What a process remembers of a participant's commands between batches; all of it can be lost."""

    def __init__(self) -> None:
        """Nothing."""
        self._careful_batches = 0
        self._strikes: dict[tuple[UUID, str], tuple[int, Exception]] = {}

    def is_careful(self) -> bool:
        """Whether the next batch had better take savepoints from the start; counts down."""
        self._careful_batches = max(0, self._careful_batches - 1)
        return self._careful_batches > 0

    def raised(self) -> None:
        """A handler raised in the fast way."""
        self._careful_batches = limits.COMMANDS_CAREFUL_BATCHES

    def strike(self, command: Command, error: Exception) -> None:
        """The handler of a command took its batch with it."""
        count, _ = self._strikes.pop((command.key, command.kind), (0, error))
        self._strikes[command.key, command.kind] = (count + 1, error)
        while len(self._strikes) > limits.COMMANDS_STRUCK_MAX:
            del self._strikes[next(iter(self._strikes))]

    def struck(self, command: Command) -> Exception | None:
        """The error of a command that has done so too often."""
        count, error = self._strikes.get((command.key, command.kind), (0, None))
        return error if count >= limits.COMMAND_STRIKES else None

    def settled(self, command: Command) -> None:
        """It is answered, or parked."""
        self._strikes.pop((command.key, command.kind), None)


class Serving:
    """Commands in one transaction, with their rows."""

    def __init__(self, participant: Participant, memory: "Memory", connection: Connection) -> None:
        """In the transaction of a batch, or of a retry."""
        self._memory = memory
        self._name = participant.name
        self._handlers = participant.handlers
        self._connection = connection
        self._rows: dict[UUID, Row] = {}
        self._now: datetime | None = None

    async def take(self, commands: Sequence[Command]) -> None:
        """Insert or find the commands' rows, and lock them."""
        distinct = {command.key: command for command in commands}
        if not distinct:
            return
        rows = await SQL.take.fetch(
            self._connection,
            self._name,
            list(distinct),
            [command.instance_id for command in distinct.values()],
            [command.path for command in distinct.values()],
            [command.contract for command in distinct.values()],
            [self._undoable_until(command) for command in distinct.values()],
            limits.COMMANDS_KEPT_DAYS,
            limits.COMMANDS_UNDOABLE_DAYS,
        )
        for row in rows:
            self._now = row["now"]
            self._rows[row["key"]] = Row(row["outcome"], row["output"], row["error"], row["is_undone"], row["attempts"])

    # ------------------------------------------------------------------------------------------ two ways

    async def together(self, commands: Sequence[Command]) -> None:
        """All handlers in one unit of work, and all answers in one statement.

        Raises:
            HandlerFailed: one raised, or its answer cannot be sent.
        """
        replies: list[OutboxRow] = []
        try:
            async with handling.unit(self._connection) as tx:
                for command in commands:
                    row, payload = await self._fast(tx, command)
                    self._rows[command.key] = row
                    replies.append(reply(command, payload))
            await self._write({command.key for command in commands}, replies)
        except postgres.PostgresError as error:
            if error.sqlstate != postgres.TOO_LARGE:
                raise
            raise HandlerFailed(f"an answer cannot be sent: {error}") from error
        except HandlerFailed:
            self._memory.raised()
            raise

    async def _fast(self, tx: Transaction, command: Command) -> tuple[Row, str]:
        if self._memory.struck(command) is not None:
            raise HandlerFailed(f"{command.contract}: to be answered with its failure")
        try:
            settled = await self._settle(tx, command)
        except Exception as error:
            if handling.is_transient(self._connection, error):
                self._memory.strike(command, error)
                raise
            raise HandlerFailed(f"{command.contract}: {error!r}") from error
        handling.require_transaction(self._connection)
        return settled

    async def alone(self, command: Command) -> Fault | None:
        """One command in a savepoint, its answer included; why it is to be tried again, if it is.

        Raises:
            PostgresError, OSError, TimeoutError: transient; nothing is known of the batch any more.
        """
        settled: list[Row] = []

        async def settle(tx: Transaction) -> None:
            row, payload = await self._settle(tx, command)
            settled.append(row)
            await self._write({command.key}, [reply(command, payload)], changed={command.key: row})

        error = self._memory.struck(command)
        is_last = error is not None
        if error is None:
            try:
                error = await handling.alone(self._connection, settle)
            except Exception as raised:
                self._memory.strike(command, raised)
                raise
        if error is None:
            self._rows[command.key] = settled[-1]
            self._memory.settled(command)
            return None
        return await self._failed(command, error, is_last=is_last)

    async def _failed(self, command: Command, error: Exception, *, is_last: bool) -> Fault | None:
        row = self._rows[command.key]
        is_refusal = isinstance(error, Rejected)
        attempts = row.attempts + 1
        is_late = command.until is not None and self._now is not None and self._now >= command.until
        is_last = is_last or is_refusal or is_late or attempts >= limits.COMMAND_ATTEMPTS
        replies: list[OutboxRow] = []
        if not is_last:
            row = replace(row, attempts=attempts)
        elif command.kind == "do":
            outcome = "rejected" if is_refusal else "unknown"
            text = error.reason if isinstance(error, Rejected) else text_of(error)
            row = replace(row, outcome=outcome, error=text, attempts=0)
            replies.append(reply(command, answer_to_do(outcome, None, text)))
        else:
            row = replace(row, attempts=0)
            replies.append(reply(command, answer_to_undo(command.round, text_of(error))))
        if is_last and not is_refusal:
            log.error(
                "participant %s: %s %s of %s failed, and that is the answer: %r",
                self._name, command.kind, command.contract, command.instance_id, error, exc_info=error,
            )  # fmt: skip
        await self._write({command.key}, replies, changed={command.key: row})
        self._rows[command.key] = row
        self._memory.settled(command)
        return None if is_last else Fault.of(error)

    # ------------------------------------------------------------------------------------------ what it comes to

    async def _settle(self, tx: Transaction, command: Command) -> tuple[Row, str]:
        """The row afterwards, and the payload of the answer; calls the handler where the row does not say it all."""
        row = self._rows[command.key]
        handler = self._handlers.get(command.contract)
        known = self._known_do(command, row) if command.kind == "do" else self._known_undo(command, row, handler)
        if known is not None:
            return known
        if handler is None:
            raise NotServedError(f"participant {self._name} has no handler of {command.contract}")
        value = handler.contract.command.decode(command.payload.decode())
        async with asyncio.timeout(min(handler.contract.timeout_seconds, limits.COMMAND_TIMEOUT_SECONDS)):
            if command.kind == "do":
                return await self._do(tx, command, handler, value)
            assert handler.undo is not None
            await handling.call(handler.undo(tx, handler.contract.reply.decode(row.output or "null"), value))
        return replace(row, is_undone=True, attempts=0), answer_to_undo(command.round)

    async def _do(
        self, tx: Transaction, command: Command, handler: Handler[Any, Any, Any], value: object
    ) -> tuple[Row, str]:
        output = handler.contract.reply.encode(await handling.call(handler.function(tx, value)))
        handler.contract.reply.decode(output)  # what cannot be read back is a failure here, while it can be undone
        row = replace(self._rows[command.key], outcome="completed", output=output, attempts=0)
        return row, answer_to_do("completed", output, None)

    def _known_do(self, command: Command, row: Row) -> tuple[Row, str] | None:
        if row.outcome is None:
            if not row.is_undone and not self._is_old(command):
                return None
            row = replace(row, outcome="rejected", error=UNDONE_BEFORE if row.is_undone else TOO_OLD, attempts=0)
        assert row.outcome is not None
        return row, answer_to_do(row.outcome, row.output, row.error)

    def _known_undo(self, command: Command, row: Row, handler: Handler[Any, Any, Any] | None) -> tuple[Row, str] | None:
        needs_handler = handler is None or handler.undo is not None
        if not row.is_undone and needs_handler:
            if row.outcome == "completed":
                return None
            if row.outcome is None and self._is_old(command):
                return row, answer_to_undo(command.round, FORGOTTEN)
        return replace(row, is_undone=True), answer_to_undo(command.round)

    def _undoable_until(self, command: Command) -> datetime | None:
        """The end of the saga, where there will be something to undo; its row stays some days longer."""
        handler = self._handlers.get(command.contract)
        return None if handler is not None and handler.undo is None else command.deadline

    def _is_old(self, command: Command) -> bool:
        assert self._now is not None
        return self._now - command.sent > _MAX_AGE

    async def _write(
        self, keys: set[UUID], replies: Sequence[OutboxRow], *, changed: dict[UUID, Row] | None = None
    ) -> None:
        rows = {key: (changed or self._rows)[key] for key in keys}
        if not rows:
            return
        await SQL.answer.execute(
            self._connection,
            self._name,
            list(rows),
            [row.outcome for row in rows.values()],
            [row.output for row in rows.values()],
            [row.error for row in rows.values()],
            [row.is_undone for row in rows.values()],
            [row.attempts for row in rows.values()],
            [message.topic for message in replies],
            [message.key for message in replies],
            [message.event_id for message in replies],
            [message.event_type for message in replies],
            [message.headers for message in replies],
            [message.payload for message in replies],
        )
