"""Polling while there is work, waiting for a notification while there is none.

Going idle, in this order: LISTEN (once, when the tenure begins); take the shard's advisory lock exclusively; read
once more; wait. A writer tries the same lock, shared, in every emit statement, and notifies only if it fails. So a
commit that the last read missed either held the shared lock, and the relay did not go idle, or failed to get it, and
notifies: the locks are released after the commit has become visible. Under load nobody notifies, and nobody waits for
the other.

The safety poll covers what no protocol can: a half-open connection that delivers nothing.
"""

import asyncio
import contextlib
from typing import Final

from outbox import postgres
from outbox.postgres import Connection
from outbox.settings import Settings

SQL: Final = postgres.Statements("outbox", "relay/wakeup.sql")
CHANNEL: Final = "outbox_wake"
_CLOSE_TIMEOUT_SECONDS: Final = 2.0


class Wakeup:
    """When to read again."""

    def __init__(self, connection: Connection, shard: int, settings: Settings) -> None:
        """For one shard, on the connection that reads it."""
        self._connection = connection
        self._shard = shard
        self._settings = settings
        self._pause = settings.poll_min_seconds
        self._quiet_seconds = 0.0
        self._notified = asyncio.Event()
        self.idle = False
        self.called = False
        """Whether somebody has asked for parked keys to be released since this was last set to False."""

    async def listen(self) -> None:
        """LISTEN, before anything is locked or read."""
        if self._settings.wakeup == "listen":
            await self._connection.add_listener(CHANNEL, self._on_notification)

    async def close(self) -> None:
        """UNLISTEN; a connection that is gone has done so already."""
        with contextlib.suppress(*postgres.CONNECTION_ERRORS):
            async with asyncio.timeout(_CLOSE_TIMEOUT_SECONDS):
                await self._connection.remove_listener(CHANNEL, self._on_notification)

    def _on_notification(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        if payload == str(self._shard):
            self._notified.set()
        elif payload == f"{self._shard} parked":
            self.called = True
            self._notified.set()

    def wake(self) -> None:
        """Read now, for a reason of this process."""
        self._notified.set()

    async def found(self) -> None:
        """A read brought events: poll on."""
        self._pause = self._settings.poll_min_seconds
        self._quiet_seconds = 0.0
        await self._stop_idling()

    async def pace(self) -> None:
        """Between two reads while there is work: fewer and larger windows, at most `poll_min_seconds` later."""
        await self._wait(self._settings.poll_min_seconds)

    async def found_nothing(self, at_most_seconds: float) -> None:
        """A read brought nothing: wait a little, or go idle and wait for long, but never longer than the given time."""
        if self.idle:
            await self._wait(min(self._settings.safety_poll_seconds, at_most_seconds))
            return
        if self._quiet_seconds >= self._settings.idle_after_seconds and self._settings.wakeup == "listen":
            self._notified.clear()
            self.idle = await SQL.go_idle.fetchval(self._connection, self._shard)
            if self.idle:
                return  # and read once more
        pause = min(self._pause, at_most_seconds)
        await self._wait(pause)
        self._quiet_seconds += pause
        self._pause = min(self._pause * 2, self._settings.poll_max_seconds)

    async def _wait(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._notified.wait()
        if self._notified.is_set():
            self._notified.clear()
            self._quiet_seconds = 0.0
            self._pause = self._settings.poll_min_seconds
            await self._stop_idling()

    async def _stop_idling(self) -> None:
        if self.idle:
            self.idle = False
            await SQL.stop_idling.fetchval(self._connection, self._shard)
