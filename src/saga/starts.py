"""Starts on a pool, grouped like checkpoints: while one group is being committed, the next one gathers.

Where a worker of this process serves the saga, on the same pool, it gets the new instance with the start: leased to it
in the same statement, it runs at once, and nobody has to claim it. Only here: a start in a caller's transaction is
`pending`, because its lease could be older than its commit, and its owner dead before anybody sees it.

* The reply is lost: the same starts are sent again, for the same owner, whether their callers still wait or not. Their
  ids are new, so one that `exists` under its own id is one that the first copy has inserted.
* The process is killed after the commit: the instance is pending, or an orphan of this process, and found as such.
* Somebody else is starting under the same key and has not committed: the group gives way after a moment, and is split
  until the one that has to wait is alone, on a connection of its own.
"""

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Final, Protocol
from uuid import UUID

from outbox import postgres, retry
from outbox.postgres import Connection, Pool
from saga import limits
from saga.journal import Start, start

SQL: Final = postgres.Statements("saga", "starts.sql")


class Taker(Protocol):
    """A worker of this process."""

    @property
    def worker_id(self) -> UUID:
        """Its id."""

    def takes(self, starts: Sequence[Start]) -> bool:
        """Whether it serves all of them, and has room."""

    def begin(self, new: Start) -> None:
        """Run one that was leased to it."""

    def runs(self, instance_id: UUID) -> bool:
        """Whether it has the instance now, and will tell its end."""


@dataclass(slots=True, eq=False)
class _Entry:
    start: Start
    answer: "asyncio.Future[tuple[UUID, str]]"
    taker: Taker | None = None
    """To whom it is leased, from when it was sent first."""

    @property
    def name_and_key(self) -> tuple[str, str]:
        return self.start.saga.name, self.start.key


class Starts:
    """The starts of this process on one pool."""

    def __init__(self, pool: Pool) -> None:
        """For `starts_of`."""
        self._pool = pool
        self._queue: deque[_Entry] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_busy = False
        self._takers: list[Taker] = []
        self.sent: Final[set[UUID]] = set()
        """Instances that may have been started, while nobody knows."""

    def add(self, taker: Taker) -> None:
        """A worker of this process may have some of them at once."""
        self._takers.append(taker)

    def remove(self, taker: Taker) -> None:
        """Not any more."""
        self._takers.remove(taker)
        self._forget()

    def runs(self, instance_id: UUID) -> bool:
        """Whether a worker of this process has the instance now."""
        return any(taker.runs(instance_id) for taker in self._takers)

    def _forget(self) -> None:
        if not self._is_busy and not self._takers:
            _STARTS.pop(self._pool, None)

    def submit(self, new: Start) -> "asyncio.Future[tuple[UUID, str]]":
        """Start an instance; the id under its key, and what became of it, as `journal.start` says it."""
        answer: asyncio.Future[tuple[UUID, str]] = asyncio.get_running_loop().create_future()
        self._queue.append(_Entry(new, answer))
        if not self._is_busy:
            self._is_busy = True
            self._spawn(self._run())
        return answer

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="starts of sagas")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self) -> None:
        group: list[_Entry] = []
        try:
            while self._queue:
                async for attempt in retry.attempts(within=limits.START_TRY_SECONDS):
                    with attempt:
                        async with postgres.acquire(self._pool) as connection:
                            await SQL.limit_lock_waits.execute(connection, f"{limits.START_LOCK_SECONDS:g}s")
                            while group := [e for e in group if e.start.id in self.sent] or self._next_group():
                                await self._start(connection, group)
        except Exception as error:  # noqa: BLE001 - told to those who wait
            for entry in (*group, *self._queue):
                self._fail(entry, error)
            self._queue.clear()
        finally:
            self._is_busy = False
            self._forget()

    def _next_group(self) -> list[_Entry]:
        group: dict[tuple[str, str], _Entry] = {}
        while self._queue and len(group) < limits.GROUP_MAX_INSTANCES and self._queue[0].name_and_key not in group:
            entry = self._queue.popleft()
            group[entry.name_and_key] = entry
        new = [entry.start for entry in group.values()]
        taker = next((taker for taker in self._takers if taker.takes(new)), None)
        for entry in group.values():
            entry.taker = taker
            self.sent.add(entry.start.id)
        return list(group.values())

    async def _start(self, connection: Connection, group: Sequence[_Entry]) -> None:
        taker = group[0].taker
        owner = taker.worker_id if taker is not None else None
        try:
            answers = await start(connection, [entry.start for entry in group], owner=owner)
        except Exception as error:
            is_locked = postgres.sqlstate(error) == postgres.LOCKED
            if not is_locked and retry.is_transient(error):
                raise
            if len(group) > 1:
                half = len(group) // 2
                await self._start(connection, group[:half])
                await self._start(connection, group[half:])
            elif is_locked:
                self.sent.discard(group[0].start.id)
                self._spawn(self._start_alone(group[0]))
            else:
                self._fail(group[0], error)
            return
        for entry, (found, answer) in zip(group, answers, strict=True):
            if taker is not None and found == entry.start.id:  # else it was there before
                taker.begin(entry.start)
            self._settle(entry, (found, answer))

    async def _start_alone(self, entry: _Entry) -> None:
        try:
            [answer] = await start(self._pool, [entry.start])
        except Exception as error:  # noqa: BLE001 - told to the one who waits
            self._fail(entry, error)
        else:
            self._settle(entry, answer)

    def _settle(self, entry: _Entry, answer: tuple[UUID, str]) -> None:
        self.sent.discard(entry.start.id)
        if not entry.answer.done():
            entry.answer.set_result(answer)

    def _fail(self, entry: _Entry, error: Exception) -> None:
        self.sent.discard(entry.start.id)
        if not entry.answer.done():
            entry.answer.set_exception(error)


_STARTS: Final[dict[Pool, Starts]] = {}
"""Only pools with starts under way, or with a worker of this process."""


def starts_of(pool: Pool) -> Starts:
    """What this process starts on a pool."""
    return _STARTS.setdefault(pool, Starts(pool))


def runs_here(pool: Pool, instance_id: UUID) -> bool:
    """Whether a worker of this process, on this pool, has the instance now."""
    return pool in _STARTS and _STARTS[pool].runs(instance_id)
