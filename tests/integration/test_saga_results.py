"""Who waits for a result is told by the worker of the same process, and finds out by itself where that cannot be."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from outbox import Pool
from saga import ResultTimeout, limits, results, runner
from saga.handle import wall
from saga.results import Standing
from saga.starts import runs_here, starts_of
from tests.support.faults import eventually
from tests.support.saga_journal import Order, drive, shop
from tests.support.saga_worker import Order as WorkersOrder
from tests.support.saga_worker import shop as workers_shop
from tests.support.saga_worker import working


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> "asyncio.Queue[int]":
    """How many were looked for, each time."""
    seen: asyncio.Queue[int] = asyncio.Queue()
    real = results.standings

    async def counts(db: Any, wanted: Sequence[tuple[str, str]]) -> list[Standing | None]:
        found = await real(db, wanted)
        seen.put_nowait(len(wanted))
        return found

    monkeypatch.setattr(results, "standings", counts)
    return seen


async def takes_starts(pool: Pool) -> None:
    """Wait until a worker of this process is given what is started here."""

    async def look() -> bool:
        return bool(starts_of(pool)._takers)

    await eventually(look, what="the worker is there")


async def test_what_a_worker_of_this_process_has_is_not_asked_for(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch, looks: "asyncio.Queue[int]"
) -> None:
    """Red where the handle does not know that a worker here has got its instance."""
    monkeypatch.setattr(limits, "RESULT_POLL_MIN_SECONDS", 0.0)
    monkeypatch.setattr(limits, "RESULT_POLL_MAX_SECONDS", 60.0)
    async with working(saga_pool, workers_shop):
        await takes_starts(saga_pool)
        handle = await workers_shop.start(saga_pool, WorkersOrder())
        assert await handle.result(timeout=20) == "A1 paid sent"
    assert looks.empty()


async def test_an_end_that_was_told_before_anybody_waited_is_looked_for_at_once(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red where a start that a worker here got is looked for rarely, whatever has become of it since."""
    monkeypatch.setattr(limits, "RESULT_POLL_MAX_SECONDS", 60.0)
    async with working(saga_pool, workers_shop):
        await takes_starts(saga_pool)
        handle = await workers_shop.start(saga_pool, WorkersOrder())
        assert await handle.result(timeout=20) == "A1 paid sent"

        async def let_go() -> bool:
            return not runs_here(saga_pool, handle.id)

        await eventually(let_go, what="the worker has let it go")
        assert await asyncio.wait_for(handle.result(timeout=60), 20) == "A1 paid sent"


async def test_an_end_that_nobody_tells_is_found(saga_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker had it and has lost it: another one brings it to its end. Red where it is not looked for at all."""
    monkeypatch.setattr(runner, "told_end", lambda *_: None)
    async with working(saga_pool, workers_shop):
        await takes_starts(saga_pool)
        handle = await workers_shop.start(saga_pool, WorkersOrder())
        assert await asyncio.wait_for(handle.result(timeout=60), 20) == "A1 paid sent"


async def test_when_the_time_is_up_there_is_a_last_look(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch, looks: "asyncio.Queue[int]"
) -> None:
    """Red where what an earlier look showed is the answer."""
    monkeypatch.setattr(limits, "RESULT_POLL_MIN_SECONDS", 60.0)
    monkeypatch.setattr(limits, "RESULT_POLL_MAX_SECONDS", 60.0)
    await shop.start(saga_pool, Order(), key="k")
    waiting = asyncio.create_task(shop.handle(saga_pool, "k").result(timeout=3))
    await asyncio.wait_for(looks.get(), 20)
    while await drive(saga_pool, (shop,), now=wall()):
        pass
    assert not waiting.done()
    assert await waiting == "sent"


async def test_who_is_late_is_told_where_it_stands(saga_pool: Pool) -> None:
    handle = await shop.start(saga_pool, Order())
    with pytest.raises(ResultTimeout, match="is pending"):
        await handle.result(timeout=0)
