"""Waiting for ends on a pool: one statement asks for everybody who waits, and a worker of this process tells at once.

Each waiter is looked for after a short pause, and then more and more rarely, so a thousand waiters cost a few
statements a second and the first look is quick. What a worker of the same process brings to its end, on the same pool,
needs no statement: the end that was just committed is handed over. What it has now is looked for only rarely, for the
case that it loses it.
"""

import asyncio
import heapq
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from outbox import clock, postgres, retry
from outbox.postgres import Connection, Pool
from saga import limits
from saga.starts import runs_here
from saga.state import ENDED

log = logging.getLogger(__name__)
SQL: Final = postgres.Statements("saga", "results.sql")


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where an instance stands."""

    id: UUID
    state: str
    output: str | None
    error: str | None
    paused_reason: str | None = None


class _Waiter:
    """One who waits for one instance."""

    def __init__(self, name: str, key: str) -> None:
        self.name: Final = name
        self.key: Final = key
        self.pause_seconds = limits.RESULT_POLL_MIN_SECONDS
        self.seen: Standing | None = None
        self.is_late = False
        """Whether its time is up: the next look is the last one."""
        self.answer: asyncio.Future[Standing | None] = asyncio.get_running_loop().create_future()
        """Its end, or where it stands when the time is up; None: there is no such instance."""

    def tell(self, standing: Standing | None) -> None:
        """What a look showed."""
        self.seen = standing
        if (standing is None or standing.state in ENDED or self.is_late) and not self.answer.done():
            self.answer.set_result(standing)

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Results:
    """Everybody in this process who waits on one pool."""

    def __init__(self, pool: Pool) -> None:
        """For `wait_for_end`."""
        self._pool = pool
        self._due: list[tuple[float, int, _Waiter]] = []
        self._numbers = itertools.count()
        self._known: dict[UUID, set[_Waiter]] = {}
        """Waiters by instance, as soon as its id is known."""
        self._sooner = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def wait(self, name: str, key: str, instance_id: UUID | None, timeout_seconds: float) -> Standing | None:
        """See `wait_for_end`."""
        waiter = _Waiter(name, key)
        if instance_id is not None and runs_here(self._pool, instance_id):
            waiter.pause_seconds = limits.RESULT_POLL_MAX_SECONDS
        self._know(waiter, instance_id)
        self._plan(waiter, 0.0 if instance_id is None else waiter.pause_seconds)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look_around(), name="results of sagas")
        timer = asyncio.get_running_loop().call_later(timeout_seconds, self._time_is_up, waiter)
        try:
            return await waiter.answer
        finally:
            timer.cancel()
            found = waiter.seen.id if waiter.seen is not None else instance_id
            if found is not None and (waiters := self._known.get(found)) is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._known[found]

    def ended(self, instance_id: UUID, standing: Standing | None) -> None:
        """See `told_end`."""
        for waiter in self._known.get(instance_id, ()):
            if standing is not None:
                waiter.tell(standing)
            else:
                self._plan(waiter, 0.0)

    def _time_is_up(self, waiter: _Waiter) -> None:
        waiter.is_late = True
        self._plan(waiter, 0.0)

    def _know(self, waiter: _Waiter, instance_id: UUID | None) -> None:
        if instance_id is not None:
            self._known.setdefault(instance_id, set()).add(waiter)

    def _plan(self, waiter: _Waiter, pause_seconds: float) -> None:
        at = clock.monotonic() + pause_seconds
        heapq.heappush(self._due, (at, next(self._numbers), waiter))
        if self._due[0][2] is waiter:
            self._sooner.set()

    async def _look_around(self) -> None:
        """Look for those whose time has come, until nobody waits any more."""
        while self._due:
            self._sooner.clear()
            pause = self._due[0][0] - clock.monotonic()
            if pause > 0 and not self._due[0][2].answer.done():
                await retry.pause(pause, self._sooner)
                continue
            group = self._next_group()
            if not group:
                continue
            try:
                await self._look(group)
            except Exception as error:  # noqa: BLE001 - told to those who wait
                if not retry.is_transient(error):
                    for waiter in group:
                        waiter.fail(error)
                    continue
                log.warning("looking for results: %r; trying again", error)
                for waiter in group:
                    if waiter.is_late and waiter.seen is None:  # there is no time for another look
                        waiter.fail(error)
            self._plan_again(group)
        _RESULTS.pop(self._pool, None)

    def _plan_again(self, group: Sequence[_Waiter]) -> None:
        for waiter in group:
            if waiter.is_late and waiter.seen is not None:  # its last look has failed
                waiter.tell(waiter.seen)
            elif not waiter.answer.done():
                waiter.pause_seconds = min(waiter.pause_seconds * 1.5, limits.RESULT_POLL_MAX_SECONDS)
                self._plan(waiter, waiter.pause_seconds)

    def _next_group(self) -> list[_Waiter]:
        """All whose time has come, or comes within the shortest pause: they share a look."""
        until = clock.monotonic() + limits.RESULT_POLL_MIN_SECONDS / 2
        group: dict[_Waiter, None] = {}
        while self._due and len(group) < limits.RESULTS_AT_ONCE:
            at, _, waiter = self._due[0]
            if at > until and not waiter.answer.done():
                break
            heapq.heappop(self._due)
            if not waiter.answer.done():
                group[waiter] = None
        return list(group)

    async def _look(self, group: Sequence[_Waiter]) -> None:
        found = await standings(self._pool, [(waiter.name, waiter.key) for waiter in group])
        for waiter, standing in zip(group, found, strict=True):
            if waiter.seen is None and standing is not None:
                self._know(waiter, standing.id)
            waiter.tell(standing)


async def standings(db: Pool | Connection, wanted: Sequence[tuple[str, str]]) -> list[Standing | None]:
    """Where instances stand, by name and key; None where there is none."""
    rows = await SQL.standing.fetch(db, [name for name, _ in wanted], [key for _, key in wanted])
    return [
        Standing(
            id=row["id"],
            state=row["state"],
            output=row["output"],
            error=row["error_message"],
            paused_reason=row["paused_reason"],
        )
        if row["id"] is not None
        else None
        for row in rows
    ]


_RESULTS: Final[dict[Pool, Results]] = {}
"""Only pools on which somebody waits now."""


async def wait_for_end(
    pool: Pool, name: str, key: str, instance_id: UUID | None, timeout_seconds: float
) -> Standing | None:
    """Where an instance stands once it has ended, or after the timeout; None where there is none.

    Args:
        pool: of its database.
        name: of the saga.
        key: of the instance.
        instance_id: where it is known.
        timeout_seconds: there is at least one look, whatever it is.
    """
    results = _RESULTS.setdefault(pool, Results(pool))
    return await results.wait(name, key, instance_id, timeout_seconds)


def told_end(pool: Pool, instance_id: UUID, standing: Standing | None) -> None:
    """A worker of this process has committed an end; None: only the database knows all about it."""
    if (results := _RESULTS.get(pool)) is not None:
        results.ended(instance_id, standing)
