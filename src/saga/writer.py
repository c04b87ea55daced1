"""Group commit: checkpoints of many instances in one statement and one commit, without waiting for company.

While one group is on its way the next one gathers; an idle writer sends a single checkpoint at once. So the delay is
that of the commit before, and the more there is to do the fewer commits each needs.

What can go wrong, and what follows:

* *A row is locked* by somebody (an open cancel, a long transaction that sends a signal): the others are written, that
  one is sent again alone and waits, on another connection. It never holds up a group.
* *The reply is lost*: nobody knows whether the group was committed. The same bytes are sent again before anything else
  is decided; the rows say what became of them. A first copy that is still being committed has the rows locked, so the
  second one waits for it alone.
* *A value is refused*, by PostgreSQL or by the driver: nothing of the group is written. Its halves are sent, and
  theirs, until the guilty one is alone; its `submit` raises `ValueRefusedError`, the others are written.
* *The server is away*: the group is sent again with backoff until it answers. An instance that somebody took over
  meanwhile is fenced by its row, not by time.
* *The process is killed*: before the commit nothing of the group is there, after it all of it.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from outbox import postgres, retry
from outbox.postgres import Connection, Pool
from saga import journal, limits
from saga.state import Answer, Checkpoint

log = logging.getLogger(__name__)
SQL: Final = postgres.Statements("saga", "writer.sql")


class ValueRefusedError(Exception):
    """PostgreSQL or its driver refuses a value of this one checkpoint, and always will."""


@dataclass(slots=True, eq=False)
class _Entry:
    checkpoint: Checkpoint
    size_bytes: int
    answer: "asyncio.Future[Answer]"

    def give(self, answer: Answer) -> None:
        if not self.answer.done():
            self.answer.set_result(answer)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Writer:
    """Writes the checkpoints of one worker."""

    def __init__(self, pool: Pool) -> None:
        """Nothing is written before `run`."""
        self._pool = pool
        self._queue: deque[_Entry] = deque()
        self._arrived = asyncio.Event()
        self._lone = asyncio.Semaphore(limits.LOCKED_AT_ONCE)
        self._waiting: set[asyncio.Task[None]] = set()
        self._locked: set[_Entry] = set()
        self.groups = 0
        """Statements that were answered; for measurements."""
        self.checkpoints = 0
        """What they wrote."""

    @property
    def alone(self) -> int:
        """Checkpoints that wait for rows that somebody else has."""
        return len(self._locked)

    def submit(self, checkpoint: Checkpoint) -> "asyncio.Future[Answer]":
        """Write a checkpoint, sooner or later; at most one of an instance at a time.

        Returns:
            Its answer, or a `ValueRefusedError`: a value of it cannot be written, and nothing was.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._queue.append(_Entry(checkpoint, _size(checkpoint), answer))
        self._arrived.set()
        return answer

    async def run(self) -> None:
        """Write what is submitted, for ever; when cancelled, what has no answer gets none."""
        pauses = retry.backoff(maximum=limits.LOCKED_WAIT_SECONDS)
        group: list[_Entry] = []
        try:
            while True:
                try:
                    async with postgres.acquire(self._pool) as connection:
                        while True:
                            group = [entry for entry in group if self._is_unsent(entry)] or self._next_group()
                            if group:
                                await self._write(connection, group)
                                pauses = retry.backoff(maximum=limits.LOCKED_WAIT_SECONDS)
                            else:
                                await self._arrived.wait()
                except (postgres.PostgresError, *postgres.CONNECTION_ERRORS) as error:
                    if not retry.is_transient(error) or is_cancelled():
                        raise
                    log.warning("checkpoints: %r; sending the same ones again", error)
                    await asyncio.sleep(next(pauses))
        finally:
            for task in self._waiting:
                task.cancel()
            for entry in (*group, *self._queue, *self._locked):
                entry.answer.cancel()

    def _next_group(self) -> list[_Entry]:
        """What is sent next: half of what waits, where that is much, so that both sides have something to do.

        If all went at once, the server would have nothing to do while their instances are decided, and this process
        nothing while the server writes, and so on for ever, because all are answered at once.
        """
        group: list[_Entry] = []
        size_bytes = 0
        most = max(limits.GROUP_SPLIT_INSTANCES, len(self._queue) // 2)
        while self._queue and len(group) < min(most, limits.GROUP_MAX_INSTANCES):
            size_bytes += self._queue[0].size_bytes
            if group and size_bytes > limits.GROUP_MAX_BYTES:
                break
            entry = self._queue.popleft()
            if not entry.answer.done():  # its instance was given up meanwhile
                group.append(entry)
        if not self._queue:
            self._arrived.clear()
        return group

    async def _write(self, connection: Connection, group: Sequence[_Entry]) -> None:
        try:
            written = await journal.write(connection, [entry.checkpoint for entry in group])
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(group) == 1:
                group[0].fail(ValueRefusedError(str(error)))
            else:
                await self._halve(connection, group)
            return
        self.groups += 1
        entries = {entry.checkpoint.id: entry for entry in group}
        for row in written:
            if row.answer is not None:
                self.checkpoints += 1
                entries[row.id].give(row.answer)
            else:
                self._locked.add(entries[row.id])
                task = asyncio.create_task(self._write_alone(entries[row.id]), name=f"locked instance {row.id}")
                self._waiting.add(task)
                task.add_done_callback(self._waiting.discard)

    def _is_unsent(self, entry: _Entry) -> bool:
        """Whether it has to be sent with its group again: one that is locked goes its own way, and holds up nobody."""
        return not entry.answer.done() and entry not in self._locked

    async def _halve(self, connection: Connection, group: Sequence[_Entry]) -> None:
        """Find who is guilty; the others are written."""
        half = len(group) // 2
        await self._write(connection, group[:half])
        await self._write(connection, group[half:])

    async def _write_alone(self, entry: _Entry) -> None:
        """Wait for the row, some time at a time, so that a few that are locked for long do not keep out others."""
        entry.answer.add_done_callback(lambda _: self._locked.discard(entry))
        pauses = retry.backoff(maximum=limits.LOCKED_WAIT_SECONDS)
        while not entry.answer.done():
            try:
                async with self._lone:
                    answer = await _write_waiting(self._pool, entry.checkpoint)
            except Exception as error:  # noqa: BLE001 - told to the one who waits
                if retry.is_transient(error):
                    log.info("instance %s is locked by somebody else: %r; trying again", entry.checkpoint.id, error)
                    await asyncio.sleep(next(pauses))
                    continue
                entry.fail(ValueRefusedError(str(error)) if is_refusal(error) else error)
            else:
                entry.give(answer)


async def _write_waiting(pool: Pool, checkpoint: Checkpoint) -> Answer:
    async with postgres.acquire(pool) as connection, postgres.transact(connection):
        await limit_lock_waits(connection)
        [written] = await journal.write(connection, [checkpoint], wait=True)
    assert written.answer is not None, "one that waits is never told that the row is locked"
    return written.answer


async def limit_lock_waits(connection: Connection) -> None:
    """Let the open transaction wait for a lock for a bounded time only."""
    await SQL.limit_lock_waits.execute(connection, f"{limits.LOCKED_WAIT_SECONDS:g}s")


async def pause(pool: Pool, refused: Checkpoint, reason: str) -> None:
    """Pause the one instance whose checkpoint cannot be written; nothing happens if it is somebody else's by now."""
    text = f"the journal refuses a value: {reason}".replace("\x00", "\\x00")[: limits.REASON_MAX_CHARACTERS]
    await SQL.pause.execute(pool, refused.id, refused.epoch, refused.no, text)


def is_cancelled() -> bool:
    """Whether the running task was told to end: an error of closing something may have taken the place of that."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def is_refusal(error: BaseException) -> bool:
    """Whether a value was refused, by the server, the driver or the outbox."""
    return retry.is_data(error) or postgres.sqlstate(error) == postgres.TOO_LARGE


def _size(checkpoint: Checkpoint) -> int:
    """About how many bytes go over the wire."""
    size_bytes = 200 + len(checkpoint.output or "")
    for row in checkpoint.rows:
        size_bytes += len(row.input or "") + len(row.output or "")
    for message in checkpoint.outbox:
        size_bytes += len(message.payload)
    for intent in (*checkpoint.open, *checkpoint.next):
        size_bytes += len(intent.input)
    for child in checkpoint.children:
        size_bytes += len(child.request)
    for planned in (*checkpoint.plan, *checkpoint.plan_next):
        size_bytes += 400 + len(planned.data or "")
    return size_bytes
