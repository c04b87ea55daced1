"""Starting a saga from a service, waiting for it, signals and cancels, on PostgreSQL."""

import asyncio
from datetime import timedelta

import pytest

import outbox
from outbox import Pool, crash_sites
from saga import (
    BodyError,
    Conflict,
    Failed,
    NotFound,
    NotWaiting,
    PayloadError,
    Rejected,
    ResultTimeout,
    Run,
    Saga,
    SagaError,
    Signal,
    saga,
)
from saga.handle import wall
from tests.support.saga_journal import Order, charge, drive, shop


class Approval(Signal):
    approved: bool


@saga("approved", deadline=timedelta(hours=1))
async def approved(run: Run, order: Order) -> str:
    await run(charge(order))
    approval = await run.receive(Approval, timeout=60)
    return "yes" if approval and approval.approved else "no"


@saga("picky", deadline=60)
async def picky(run: Run, order: Order) -> None:
    if order.sku == "no":
        raise Rejected("we do not sell that")
    if order.sku == "bug":
        raise KeyError(order.sku)


async def run_all(pool: Pool, *sagas: Saga[Order, str]) -> None:
    while await drive(pool, sagas, now=wall()):
        pass


async def test_a_start_is_found_again_and_its_result_awaited(saga_pool: Pool) -> None:
    handle = await shop.start(saga_pool, Order(), key="k")
    assert (await shop.start(saga_pool, Order(), key="k")).id == handle.id
    with pytest.raises(Conflict, match="another request"):
        await shop.start(saga_pool, Order(sku="y"), key="k")
    waiting = asyncio.create_task(shop.handle(saga_pool, "k").result(timeout=20))
    await run_all(saga_pool, shop)
    assert await waiting == "sent"
    assert await handle.result(timeout=1) == "sent"


async def test_a_start_in_a_transaction_commits_with_it_and_its_handle_outlives_it(saga_pool: Pool) -> None:
    async with outbox.transaction(saga_pool) as tx:
        handle = await shop.start(tx, Order())
        assert await saga_pool.fetchval("select count(*) from saga.workflow_instances") == 0
    await run_all(saga_pool, shop)
    assert await handle.result(timeout=5) == "sent"


async def test_a_saga_that_would_fail_at_once_fails_in_the_callers_hands(saga_pool: Pool) -> None:
    with pytest.raises(Rejected, match="we do not sell that"):
        await picky.start(saga_pool, Order(sku="no"))
    with pytest.raises(BodyError, match="KeyError"):
        await picky.start(saga_pool, Order(sku="bug"))
    with pytest.raises(PayloadError):
        await picky.start(saga_pool, Order(sku="a\x00"))
    for key in ("", "x" * 1025, "a\x00"):
        with pytest.raises(SagaError, match="1 to 1024"):
            await picky.start(saga_pool, Order(), key=key)
    assert await saga_pool.fetchval("select count(*) from saga.workflow_instances") == 0


async def test_a_signal_is_answered_by_the_saga(saga_pool: Pool) -> None:
    handle = await approved.start(saga_pool, Order(), key="k")
    await run_all(saga_pool, approved)
    with pytest.raises(ResultTimeout, match="is waiting"):
        await handle.result(timeout=0)
    for _ in range(2):
        await approved.handle(saga_pool, "k").signal(Approval(approved=True), dedupe_key="once")
    await run_all(saga_pool, approved)
    assert await handle.result(timeout=1) == "yes"
    assert await saga_pool.fetchval("select count(*) from saga.signals") == 1
    with pytest.raises(NotWaiting):
        await handle.signal(Approval(approved=True))
    with pytest.raises(NotWaiting):
        await handle.cancel("late")


async def test_a_signal_is_sent_if_its_transaction_commits(saga_pool: Pool) -> None:
    await approved.start(saga_pool, Order(), key="k")

    async def signals_and_fails() -> None:
        async with outbox.transaction(saga_pool) as tx:
            await approved.handle(tx, "k").signal(Approval(approved=True))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        await signals_and_fails()
    assert await saga_pool.fetchval("select count(*) from saga.signals") == 0


async def test_a_cancel_undoes_and_is_told_to_who_waits(saga_pool: Pool) -> None:
    handle = await approved.start(saga_pool, Order())
    await run_all(saga_pool, approved)
    await handle.cancel("changed my mind")
    await run_all(saga_pool, approved)
    with pytest.raises(Failed, match="was cancelled: changed my mind") as raised:
        await handle.result(timeout=1)
    assert raised.value.state == "cancelled"


async def test_nothing_under_a_key(saga_pool: Pool) -> None:
    handle = shop.handle(saga_pool, "nothing")
    with pytest.raises(NotFound):
        await handle.result(timeout=1)
    with pytest.raises(NotFound):
        await handle.cancel("x")
    with pytest.raises(NotFound):
        _ = handle.id


async def test_who_waits_is_told_in_time_that_the_database_is_away(saga_pool: Pool) -> None:
    """Red where `Results` looks again until it is back, however long somebody wanted to wait."""
    handle = await shop.start(saga_pool, Order())

    async def away(at: str, _: str) -> None:
        if at == "saga.results.standing":
            raise ConnectionResetError("injected")

    crash_sites.hook = away
    try:
        async with asyncio.timeout(10):
            with pytest.raises(ConnectionResetError):
                await handle.result(timeout=0.05)
    finally:
        crash_sites.hook = None
