"""When a worker looks for ready instances again: polling while there are some, waiting for a notification while not.

The same protocol as the relay's (`outbox.relay.wakeup`), the other way round: LISTEN; take the advisory lock
exclusively; look once more; wait. Whoever makes an instance ready tries that lock, shared, in the same transaction
(`saga.call_worker`), and notifies only if it fails, that is, only if a worker is idle.

Of several idle workers one holds the lock. The notification reaches all of them; the others look now and then besides,
so that one of them becomes the one that is called when the first has enough to do.
"""

import asyncio
import contextlib
from typing import Final

from outbox import postgres
from outbox.postgres import Connection
from saga import limits
from saga.settings import Settings

SQL: Final = postgres.Statements("saga", "wakeup.sql")
CHANNEL: Final = "saga_ready"
_CLOSE_TIMEOUT_SECONDS: Final = 0.2


class Wakeup:
    """The pace of one worker."""

    def __init__(self, settings: Settings) -> None:
        """On no connection yet."""
        self._settings = settings
        self._connection: Connection | None = None
        self._called = asyncio.Event()
        self._pause = settings.poll_min_seconds
        self._quiet_seconds = 0.0
        self.is_idle = False

    async def attach(self, connection: Connection) -> None:
        """LISTEN on the connection that looks, before the first look."""
        self._connection, self.is_idle = connection, False
        connection.add_termination_listener(self._on_notification)  # a look then finds out
        if self._settings.wakeup == "listen":
            await connection.add_listener(CHANNEL, self._on_notification)

    async def detach(self) -> None:
        """UNLISTEN; a connection that is gone has done so already."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        with contextlib.suppress(*postgres.CONNECTION_ERRORS):  # the pool may have taken a dead one back already
            connection.remove_termination_listener(self._on_notification)
            async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                if self.is_idle:
                    await SQL.stop_idling.fetchval(connection)
                await connection.remove_listener(CHANNEL, self._on_notification)

    def _on_notification(self, *_: object) -> None:
        self._called.set()

    def wake(self) -> None:
        """Look now, for a reason of this process."""
        self._called.set()

    async def found(self) -> None:
        """A look brought instances: there may be more."""
        self._pause, self._quiet_seconds = self._settings.poll_min_seconds, 0.0
        await self._stop_idling()

    async def found_nothing(self) -> None:
        """Wait a little, or go idle and wait for long."""
        if self.is_idle:
            await self._wait(self._settings.safety_poll_seconds)
            return
        longest = self._settings.poll_max_seconds
        if self._quiet_seconds >= self._settings.idle_after_seconds and self._settings.wakeup == "listen":
            assert self._connection is not None
            self._called.clear()
            self.is_idle = await SQL.go_idle.fetchval(self._connection)
            if self.is_idle:
                return  # and look once more
            longest = limits.IDLE_POLL_SECONDS
        pause = self._pause
        self._pause = min(self._pause * 2, longest)
        self._quiet_seconds += pause
        await self._wait(pause)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._called.wait()
        if self._called.is_set():
            self._called.clear()
            self._pause, self._quiet_seconds = self._settings.poll_min_seconds, 0.0
            await self._stop_idling()

    async def _stop_idling(self) -> None:
        if self.is_idle:
            assert self._connection is not None
            self.is_idle = False
            await SQL.stop_idling.fetchval(self._connection)
