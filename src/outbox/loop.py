"""The life of the loops that a service embeds: start, run, drain, stop.

`async with Relay(...)` starts the loop in the background; `await relay.run()` waits for its end and raises what ended
it. A service that only enters the context (in its lifespan) need not call `run`; leaving the context drains and
stops.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Self

log = logging.getLogger(__name__)


class Loop(ABC):
    """One background task with a stop signal."""

    def __init__(self, *, drain_timeout_seconds: float) -> None:
        """A loop that may take `drain_timeout_seconds` to finish what it has begun."""
        self._drain_timeout_seconds = drain_timeout_seconds
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @abstractmethod
    async def _main(self) -> None:
        """Work until `_stopping` is set; then finish or abandon what is in flight and return."""

    def stop(self) -> None:
        """Ask the loop to end, as SIGTERM does; returns at once."""
        self._stopping.set()

    async def run(self) -> None:
        """Wait until the loop ends, of itself or after `stop`; raises the error that ended it."""
        if self._task is None:
            raise RuntimeError(f"enter the context first: async with {type(self).__name__}(...) as loop")
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({self._task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        await self._drain(self._task)
        if not self._task.cancelled():
            self._task.result()

    async def __aenter__(self) -> Self:
        """Start."""
        if self._task is not None:
            raise RuntimeError(f"this {type(self).__name__} has been started before; make another one")
        self._task = asyncio.create_task(self._main(), name=type(self).__name__)
        self._task.add_done_callback(self._report)
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Drain; at once where the caller is cancelled while it waits."""
        assert self._task is not None
        self.stop()
        try:
            await self._drain(self._task)
        except asyncio.CancelledError:
            self._task.cancel()
            raise

    async def _drain(self, task: asyncio.Task[None]) -> None:
        """Wait for at most the drain timeout, then cancel; _report logs how it ended."""
        done, _ = await asyncio.wait({task}, timeout=self._drain_timeout_seconds)
        if not done:
            log.warning("%s did not drain in %s s", type(self).__name__, self._drain_timeout_seconds)
            task.cancel()
            await asyncio.wait({task})

    def _report(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s ended: %s", type(self).__name__, error, exc_info=error)
