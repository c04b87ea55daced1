"""The life of a loop: start, run, stop, drain, cancel; and who hears of its error."""

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest

from outbox.loop import Loop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


class Scripted(Loop):
    """Does what the test says."""

    def __init__(self, main: "Callable[[Scripted], Coroutine[Any, Any, None]]", *, drain: float = 20.0) -> None:
        super().__init__(drain_timeout_seconds=drain)
        self._script = main
        self.events: list[str] = []
        self.started = asyncio.Event()

    async def _main(self) -> None:
        self.events.append("started")
        self.started.set()
        try:
            await self._script(self)
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise
        self.events.append("ended")

    async def until_stopped(self) -> None:
        await self._stopping.wait()


async def for_ever(_: Scripted) -> None:
    await asyncio.Event().wait()


async def fail(_: Scripted) -> None:
    raise ValueError("the reason")


async def test_leaving_the_context_drains() -> None:
    async with Scripted(Scripted.until_stopped) as loop:
        await loop.started.wait()
        assert loop.events == ["started"]
    assert loop.events == ["started", "ended"]
    await loop.run()


async def test_it_runs_without_run() -> None:
    done = asyncio.Event()

    async def main(_: Scripted) -> None:
        done.set()

    async with Scripted(main):
        await done.wait()


async def test_stop_ends_run() -> None:
    async with Scripted(Scripted.until_stopped) as loop:
        await loop.started.wait()
        loop.stop()
        loop.stop()
        await loop.run()
        assert loop.events == ["started", "ended"]


async def test_cancelling_run_cancels_the_waiting_only() -> None:
    async with Scripted(Scripted.until_stopped) as loop:
        waiting = asyncio.create_task(loop.run())
        await loop.started.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert loop.events == ["started"]
    assert loop.events == ["started", "ended"]


async def test_an_error_is_logged_and_raised_by_run(caplog: pytest.LogCaptureFixture) -> None:
    async with Scripted(fail) as loop:
        with pytest.raises(ValueError, match="the reason"):
            await loop.run()
        with pytest.raises(ValueError, match="the reason"):
            await loop.run()
    [record] = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert "Scripted ended: the reason" in record.message
    assert record.exc_info


async def test_an_error_that_nobody_waits_for_is_logged_and_does_not_replace_the_callers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def serve() -> None:
        async with Scripted(fail) as loop:
            await loop.started.wait()
            raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        await serve()
    async with Scripted(fail):
        pass
    assert [record.levelname for record in caplog.records].count("CRITICAL") == 2


async def test_what_does_not_drain_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    async with Scripted(for_ever, drain=0.01) as loop:
        await loop.started.wait()
    assert loop.events == ["started", "cancelled"]
    assert "Scripted did not drain in 0.01 s" in caplog.text


async def test_a_cancelled_exit_leaves_no_loop_behind() -> None:
    loop = Scripted(for_ever)

    async def service() -> None:
        async with loop:
            await loop.started.wait()

    serving = asyncio.create_task(service())
    await loop._stopping.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert loop._task is not None
    await asyncio.wait({loop._task})
    assert loop.events == ["started", "cancelled"]


async def test_a_loop_is_entered_once() -> None:
    loop = Scripted(Scripted.until_stopped)
    with pytest.raises(RuntimeError, match="enter the context first"):
        await loop.run()
    async with loop:
        with pytest.raises(RuntimeError, match="has been started before"):
            await loop.__aenter__()
    with pytest.raises(RuntimeError, match="make another one"):
        await loop.__aenter__()
