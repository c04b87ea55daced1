"""What was committed, and nobody heard of: claims and starts whose connection is lost between COMMIT and its answer."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

import outbox
from outbox import Pool, crash_sites
from saga import limits
from saga.tenure import Tenure
from tests.support.faults import eventually
from tests.support.saga_worker import Order, Service, effects, packed, working

CLAIM, START = "saga.journal.claim", "saga.journal.start"


@contextmanager
def losing(site: str, when: Callable[[], bool] = lambda: True) -> Iterator[list[str]]:
    """The first reply of a statement is lost after it was committed; what was lost is noted."""
    lost: list[str] = []

    async def lose(at: str, on: str) -> None:
        if (at, on) == (site, "after") and not lost and when():
            lost.append(at)
            raise ConnectionResetError(f"injected after {at}")

    crash_sites.hook = lose
    try:
        yield lost
    finally:
        crash_sites.hook = None


async def test_a_claim_whose_reply_is_lost_is_found_by_the_worker_itself(saga_pool: Pool) -> None:
    """It is leased to a living worker, so nobody takes it over. Red without `Tenure._count`."""
    async with outbox.transaction(saga_pool) as tx:
        handle = await packed.start(tx, Order())
    with losing(CLAIM) as lost:
        async with working(saga_pool, packed):
            assert await handle.result(timeout=20) == "A1 paid packed"
    assert lost == [CLAIM]
    assert await effects(saga_pool) == ["reserve", "charge", "pack"]


@pytest.mark.parametrize("takes", [(False, True), (True, False)])
async def test_a_start_that_is_sent_again_is_for_the_owner_of_the_first_copy(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch, takes: tuple[bool, bool]
) -> None:
    """Else two run it under one epoch, as it is pending and run; or nobody, as it is leased to who does not know.

    Red where `Starts` asks for a taker each time.
    """
    answers = list(takes)
    real = Tenure.takes
    monkeypatch.setattr(
        Tenure, "takes", lambda self, starts: (answers.pop(0) if answers else True) and real(self, starts)
    )
    monkeypatch.setattr(limits, "COUNT_EVERY_SECONDS", 3600.0)
    async with working(saga_pool, packed) as service:
        await eventually(lambda: leading(saga_pool), what="a worker that is there")
        gate = service.gates["reserve"] = asyncio.Event()
        with losing(START) as lost:
            handle = await packed.start(saga_pool, Order())
        assert lost == [START]
        await eventually(lambda: called(service), what="the first call")
        for _ in range(10):
            await saga_pool.fetchval("select 1")
        gate.set()
        assert await handle.result(timeout=20) == "A1 paid packed"
        assert service.counts["reserve"] == 1


async def leading(pool: Pool) -> bool:
    return bool(await pool.fetchval("select count(*) from saga.workers"))


async def called(service: Service) -> bool:
    return service.counts["reserve"] > 0


async def test_a_start_that_nobody_waits_for_any_more_is_run(saga_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first copy is leased to this process. Red where a group that is sent again leaves such out."""
    monkeypatch.setattr(limits, "COUNT_EVERY_SECONDS", 3600.0)
    async with working(saga_pool, packed):
        await eventually(lambda: leading(saga_pool), what="a worker that is there")
        caller: asyncio.Task[Any]

        def give_up() -> bool:
            caller.cancel()
            return True

        with losing(START, give_up) as lost:
            caller = asyncio.create_task(packed.start(saga_pool, Order(), key="k"))
            await asyncio.wait([caller])
            assert caller.cancelled()
        assert lost == [START]
        assert await packed.handle(saga_pool, "k").result(timeout=20) == "A1 paid packed"
