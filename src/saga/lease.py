"""One heartbeat a process, from a thread and a connection of its own, and the clock by which a worker stops itself.

A worker's instances belong to it while its row in `saga.workers` is alive; there is no lease of each. The database's
clock grants it, this process's monotonic clock ends it: the local deadline counts from *before* the request was sent,
so it always falls before the database's. It is looked at immediately before every external call (`check`).

* The event loop stands still (a step that computes, a driver that blocks): the thread beats on, so nobody takes over
  what is only slow, and complains with the line that the loop is at. After `LOOP_STALL_MAX_SECONDS` it stops beating:
  a loop that hangs for good would hold its instances for ever.
* The process is killed: the row runs out, others take over.
* The process is stopped and goes on later: the deadline is past, no call begins any more, and what is still written
  carries an outdated epoch. A row that is past is never revived, not even by its owner: the worker starts again under
  another id.
"""

import asyncio
import logging
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Final
from uuid import UUID

from outbox import clock, postgres
from outbox.postgres import Connection, Pool
from saga import journal, limits

log = logging.getLogger(__name__)

_BEATS: Final = 3
"""Beats within one length of the lease."""
_TICKS: Final = 2
"""Looks at the event loop within one beat."""
_RECONNECT_SECONDS: Final = 0.1


class LeaseLostError(Exception):
    """The worker's lease has run out by our own clock; nothing may be begun under it."""


class Heartbeat:
    """The lease of one worker id, from `start` until it is lost or `stop`ped."""

    def __init__(self, pool: Pool, worker_id: UUID, seconds: float, serves: str) -> None:
        """For a new id.

        Args:
            pool: whose parameters the thread's own connection gets.
            worker_id: never used before.
            seconds: the length of the lease.
            serves: JSON, for people: names and versions.
        """
        self.worker_id: Final = worker_id
        self.lost: Final = asyncio.Event()
        """Set in the event loop once the lease is past."""
        self._pool = pool
        self._seconds = seconds
        self._serves = serves
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._deadline = 0.0
        self._seen = clock.monotonic()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="saga heartbeat", daemon=True)

    async def start(self) -> None:
        """Commit the worker's row, before its first claim; raises what prevents it."""
        self._thread.start()
        await self._started

    @property
    def is_held(self) -> bool:
        """Whether the lease is ours by our own clock."""
        return clock.monotonic() < self._deadline

    def check(self) -> None:
        """Call immediately before every external effect.

        Raises:
            LeaseLostError: the lease has run out.
        """
        if not self.is_held:
            raise LeaseLostError(f"the lease of worker {self.worker_id} ran out before it was renewed")

    async def stop(self) -> None:
        """End the thread; the row stays as it is."""
        self._stop.set()
        await asyncio.to_thread(self._thread.join)

    # -------------------------------------------------------------------------------------------- in the thread

    def _main(self) -> None:
        try:
            asyncio.run(self._beat())
        except BaseException as error:
            self._deadline = 0.0
            if not self._call(self._fail, error):
                raise
        else:
            self._call(self.lost.set)

    def _fail(self, error: BaseException) -> None:
        if not self._started.done():
            self._started.set_exception(error)
        else:
            log.error("the heartbeat of worker %s ended: %r", self.worker_id, error)
        self.lost.set()

    def _begun(self) -> None:
        if not self._started.done():
            self._started.set_result(None)

    async def _beat(self) -> None:
        connection = await postgres.connect_like(self._pool)
        try:
            asked = clock.monotonic()
            name = f"{socket.gethostname()}:{os.getpid()}"
            await journal.SQL.register.execute(connection, self.worker_id, name, self._seconds, self._serves)
            self._deadline = asked + self._seconds
            self._call(self._begun)
            while self._pause():
                connection = await self._renew(connection)
                if not self.is_held:
                    return
        finally:
            postgres.drop(connection)

    def _pause(self) -> bool:
        """Until the next beat, with an eye on the event loop; false: no beat any more."""
        for _ in range(_TICKS):
            self._call(self._tick)
            if self._stop.wait(self._seconds / _BEATS / _TICKS):  # this loop has nothing else to do
                return False
            still = clock.monotonic() - self._seen
            if still > limits.LOOP_STALL_MAX_SECONDS:
                self._deadline = 0.0
                log.critical(
                    "the event loop stands still for %.0f s: worker %s gives up its lease", still, self.worker_id
                )
                return False
            if still > max(limits.LOOP_STALL_SECONDS, self._seconds / _BEATS / _TICKS + 0.1):
                log.warning("the event loop stands still for %.1f s, at\n%s", still, self._where())
        return True

    async def _renew(self, connection: Connection) -> Connection:
        """Beat until it is heard, or until the deadline; the connection comes back, or the one that replaced it."""
        while self.is_held and not self._stop.is_set():
            asked = clock.monotonic()
            try:
                async with asyncio.timeout(max(self._deadline - asked, 0.001)):
                    if connection.is_closed():
                        connection = await postgres.connect_like(self._pool)
                    alive = await journal.SQL.beat.fetchval(connection, self.worker_id, self._seconds)
            except (postgres.PostgresError, *postgres.CONNECTION_ERRORS) as error:
                log.warning("worker %s cannot renew its lease: %r; trying again", self.worker_id, error)
                postgres.drop(connection)
                await asyncio.sleep(_RECONNECT_SECONDS)
                continue
            self._deadline = asked + self._seconds if alive else 0.0
            if not alive:
                log.warning("the lease of worker %s is past: it was not renewed in time", self.worker_id)
            return connection
        return connection

    def _tick(self) -> None:
        self._seen = clock.monotonic()

    def _where(self) -> str:
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - the documented way to another thread's stack
        return "".join(traceback.format_stack(frame)) if frame is not None else "an unknown place"

    def _call(self, function: Callable[..., object], *arguments: object) -> bool:
        """Call in the worker's event loop; false where that has ended."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # closed
            return False
        return True
