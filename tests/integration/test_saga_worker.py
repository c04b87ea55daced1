"""The worker on PostgreSQL: how sagas end, and what is undone."""

import asyncio
import time
from datetime import timedelta
from typing import Any

import pytest

import outbox
from outbox import Pool, clock
from saga import Conflict, Failed, NotWaiting, Rejected, Run, saga
from tests.support.saga_worker import (
    HOUR,
    Approval,
    Order,
    approved,
    both,
    charge,
    effects,
    exclusive,
    journal_of,
    plan_of,
    reaches,
    recorded,
    reserve,
    settled,
    shop,
    state,
    working,
)


@pytest.fixture
def saga_pool(any_saga_pool: Pool) -> Pool:
    """A worker runs on each supported PostgreSQL."""
    return any_saga_pool


async def test_a_saga_returns_its_result(saga_pool: Pool) -> None:
    async with working(saga_pool, shop):
        handle = await shop.start(saga_pool, Order(), key="k")
        assert await handle.result(timeout=20) == "A1 paid sent"
    assert await effects(saga_pool) == ["reserve", "charge", "ship"]
    assert [path for path, _ in await journal_of(saga_pool, handle.id)] == ["reserve#1", "charge#1", "ship#1"]


async def test_a_rejection_undoes_what_happened_in_reverse(saga_pool: Pool) -> None:
    async with working(saga_pool, shop):
        handle = await shop.start(saga_pool, Order(fails="ship rejects"))
        with pytest.raises(Failed, match="ship says no"):
            await handle.result(timeout=20)
    assert await effects(saga_pool) == ["reserve", "charge", "refund", "release"]
    assert await plan_of(saga_pool, handle.id) == [("charge#1", "completed"), ("reserve#1", "completed")]


async def test_a_compensation_that_fails_is_tried_again_before_the_next(saga_pool: Pool) -> None:
    async with working(saga_pool, shop) as service:
        handle = await shop.start(saga_pool, Order(fails="ship rejects, refund fails 3"))
        with pytest.raises(Failed):
            await handle.result(timeout=20)
    assert service.counts["refund"] == 4
    assert await effects(saga_pool) == ["reserve", "charge", "refund", "release"]


async def test_a_step_is_tried_again_under_the_same_key(saga_pool: Pool) -> None:
    async with working(saga_pool, shop) as service:
        handle = await shop.start(saga_pool, Order(fails="charge fails 2"))
        assert await handle.result(timeout=20) == "A1 paid sent"
    assert service.counts["charge"] == 3


async def test_a_step_at_most_once_that_may_have_happened_is_undone(saga_pool: Pool) -> None:
    async with working(saga_pool, settled) as service:
        handle = await settled.start(saga_pool, Order(fails="send lands"))
        with pytest.raises(Failed, match="unknown"):
            await handle.result(timeout=20)
    assert service.counts["send"] == 1
    assert await effects(saga_pool) == ["reserve", "send", "unsend", "release"]
    assert ("send#1", "unknown") in await journal_of(saga_pool, handle.id)


async def test_parallel_branches_are_under_way_together(saga_pool: Pool) -> None:
    async with working(saga_pool, both) as service:
        service.gates = {"reserve": asyncio.Event(), "charge": asyncio.Event()}
        service.reached = {"reserve": asyncio.Event(), "charge": asyncio.Event()}
        handle = await both.start(saga_pool, Order())
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in service.reached.values())), 20)
        for gate in service.gates.values():
            gate.set()
        assert await handle.result(timeout=20) == "A1 paid"


async def test_a_rejected_branch_waits_for_the_other_and_both_are_accounted_for(saga_pool: Pool) -> None:
    """H30."""
    async with working(saga_pool, both) as service:
        service.gates, service.reached = {"reserve": asyncio.Event()}, {"reserve": asyncio.Event()}
        handle = await both.start(saga_pool, Order(fails="charge rejects"))
        await asyncio.wait_for(service.reached["reserve"].wait(), 20)
        service.gates["reserve"].set()
        with pytest.raises(Failed, match="charge says no"):
            await handle.result(timeout=20)
    assert await effects(saga_pool) == ["reserve", "release"]


async def test_a_signal_wakes_a_waiting_saga_within_moments(saga_pool: Pool) -> None:
    async with working(saga_pool, approved):
        handle = await approved.start(saga_pool, Order())
        await reaches(saga_pool, handle.id, "waiting")
        await handle.signal(Approval())
        assert await handle.result(timeout=20) == "paid"
        with pytest.raises(NotWaiting):
            await handle.signal(Approval())


async def test_nothing_received_in_time(saga_pool: Pool) -> None:
    async with working(saga_pool, approved):
        handle = await approved.start(saga_pool, Order(sku="short"))
        with pytest.raises(Failed, match="nobody approves"):
            await handle.result(timeout=20)
    assert await effects(saga_pool) == ["reserve", "release"]


async def test_a_cancel_undoes_a_waiting_saga(saga_pool: Pool) -> None:
    async with working(saga_pool, approved):
        handle = await approved.start(saga_pool, Order())
        await reaches(saga_pool, handle.id, "waiting")
        await handle.cancel("changed my mind")
        with pytest.raises(Failed, match="changed my mind") as failure:
            await handle.result(timeout=20)
    assert failure.value.state == "cancelled"
    assert await effects(saga_pool) == ["reserve", "release"]


@saga("hasty", deadline=timedelta(seconds=0.3))
async def hasty(run: Run, order: Order) -> str:
    await run(reserve(order))
    await run.receive(Approval, timeout=HOUR)
    return await run(charge(order))


async def test_a_saga_past_its_deadline_is_undone(saga_pool: Pool) -> None:
    async with working(saga_pool, hasty):
        handle = await hasty.start(saga_pool, Order())
        with pytest.raises(Failed, match="deadline"):
            await handle.result(timeout=20)
    assert await effects(saga_pool) == ["reserve", "release"]


async def test_starts_are_idempotent_and_join_the_callers_transaction(saga_pool: Pool) -> None:
    async with working(saga_pool, shop):
        async with outbox.transaction(saga_pool) as tx:
            handle = await shop.start(tx, Order(), key="k")
            assert await saga_pool.fetchval("select count(*) from saga.workflow_instances") == 0
        again = await shop.start(saga_pool, Order(), key="k")
        with pytest.raises(Conflict):
            await shop.start(saga_pool, Order(sku="y"), key="k")
        assert again.id == handle.id
        assert await again.result(timeout=20) == "A1 paid sent"
    assert await effects(saga_pool) == ["reserve", "charge", "ship"]


@saga("parent", deadline=HOUR)
async def parent(run: Run, order: Order) -> str:
    found = await run.child(shop, order)
    if order.sku == "late":
        raise Rejected("too late")
    return f"child: {found}"


async def test_a_child_runs_and_is_undone_with_its_parent(saga_pool: Pool) -> None:
    async with working(saga_pool, parent, shop):
        handle = await parent.start(saga_pool, Order())
        assert await handle.result(timeout=20) == "child: A1 paid sent"
        handle = await parent.start(saga_pool, Order(sku="late"))
        with pytest.raises(Failed, match="too late"):
            await handle.result(timeout=20)
    assert (await effects(saga_pool))[3:] == ["reserve", "charge", "ship", "recall", "refund", "release"]


async def test_a_lock_is_passed_on(saga_pool: Pool) -> None:
    async with working(saga_pool, exclusive):
        handles = [await exclusive.start(saga_pool, Order(sku=str(n))) for n in range(5)]
        for handle in handles:
            assert await handle.result(timeout=20) == "paid"
    assert await effects(saga_pool) == ["reserve", "charge"] * 5


async def test_a_bug_pauses_and_undoes_nothing(saga_pool: Pool) -> None:
    async with working(saga_pool, buggy):
        handle = await buggy.start(saga_pool, Order())
        await reaches(saga_pool, handle.id, "paused")
    assert "KeyError" in await saga_pool.fetchval("select paused_reason from saga.workflow_instances")
    assert await effects(saga_pool) == ["reserve"]


@saga("buggy", deadline=HOUR)
async def buggy(run: Run, order: Order) -> str:
    found: dict[str, Any] = {"shelf": await run(reserve(order))}
    return str(found["shelve"])


async def test_a_transactional_step_commits_with_its_checkpoint(saga_pool: Pool) -> None:
    await saga_pool.execute("create table records (sku text primary key)")
    async with working(saga_pool, recorded):
        handle = await recorded.start(saga_pool, Order())
        assert await handle.result(timeout=20) == 1
        assert await saga_pool.fetchval("select count(*) from records") == 1
        handle = await recorded.start(saga_pool, Order(sku="y", fails="record rejects"))
        with pytest.raises(Failed):
            await handle.result(timeout=20)
    assert await saga_pool.fetchval("select count(*) from records") == 1
    assert await state(saga_pool, handle.id) == "failed"


async def test_a_transactional_step_is_undone_in_a_transaction(saga_pool: Pool) -> None:
    await saga_pool.execute("create table records (sku text primary key)")
    async with working(saga_pool, recorded):
        handle = await recorded.start(saga_pool, Order(fails="ship rejects"))
        with pytest.raises(Failed):
            await handle.result(timeout=20)
    assert await saga_pool.fetchval("select count(*) from records") == 0
    assert await effects(saga_pool) == ["reserve", "release"]


@saga("naps", deadline=HOUR)
async def naps(run: Run, order: Order) -> str:
    await run.sleep(0.5)
    return "awake"


async def test_a_worker_whose_clock_is_behind_is_not_woken_in_vain(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red where `saga.checkpoint` takes the worker's time for the database's: hundreds of claims until it is over."""
    monkeypatch.setattr(clock, "wall", lambda: time.time() - 30)
    async with working(saga_pool, naps):
        handle = await naps.start(saga_pool, Order())
        assert await handle.result(timeout=20) == "awake"
    row = await saga_pool.fetchrow("select checkpoint_no, lease_epoch from saga.workflow_instances")
    assert row["lease_epoch"] < 6
    assert row["checkpoint_no"] < 6
