"""Leases of workers: stalls, losses, takeover, hand-over, and how an idle worker is woken."""

import asyncio
import logging
import threading
import time
from typing import Any
from uuid import UUID, uuid4

import pytest

from outbox import Pool, crash_sites
from saga import Failed, ResultTimeout
from saga.lease import Heartbeat, LeaseLostError
from saga.settings import Settings
from tests.support.faults import eventually
from tests.support.saga_worker import (
    Approval,
    Order,
    Service,
    approved,
    effects,
    journal_of,
    settled,
    shop,
    state,
    working,
)


async def held(pool: Pool) -> int:
    return int(await pool.fetchval("select count(*) from saga.workflow_instances where lease_owner is not null"))


async def test_a_loop_that_stands_still_keeps_its_lease_and_is_complained_of(
    saga_pool: Pool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still for as many beats as come in more than two lengths of the lease."""
    beats = threading.Semaphore(0)

    async def count(site: str, side: str) -> None:
        if (site, side) == ("saga.journal.beat", "after"):
            beats.release()

    async with working(saga_pool, shop) as service:
        service.gates, service.reached = {"charge": asyncio.Event()}, {"charge": asyncio.Event()}
        handle = await shop.start(saga_pool, Order())
        await asyncio.wait_for(service.reached["charge"].wait(), 20)
        owner = await saga_pool.fetchval("select lease_owner from saga.workflow_instances")
        with caplog.at_level(logging.WARNING, "saga.lease"):
            monkeypatch.setattr(crash_sites, "hook", count)
            assert all(beats.acquire(timeout=20) for _ in range(7)), "no beat comes"  # the loop stands still here
            monkeypatch.setattr(crash_sites, "hook", None)
        assert await saga_pool.fetchval("select alive_until > clock_timestamp() from saga.workers where id = $1", owner)
        service.gates["charge"].set()
        assert await handle.result(timeout=20) == "A1 paid sent"
    assert "stands still" in caplog.text
    assert "beats.acquire(timeout=20)" in caplog.text
    assert service.counts["charge"] == 1


async def test_a_loop_that_hangs_for_good_loses_its_lease(saga_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saga.limits.LOOP_STALL_MAX_SECONDS", 0.7)
    beat = Heartbeat(saga_pool, uuid4(), 1.0, "[]")
    await beat.start()
    beat.check()
    beat._thread.join(20)  # the loop stands still until it gives up
    with pytest.raises(LeaseLostError):
        beat.check()
    await asyncio.wait_for(beat.lost.wait(), 20)
    await beat.stop()


async def test_a_lease_that_is_past_is_never_revived_and_the_worker_goes_on_under_another_id(saga_pool: Pool) -> None:
    async with working(saga_pool, shop):
        first = await eventually(lambda: saga_pool.fetchval("select id from saga.workers"), what="the worker is there")
        await saga_pool.execute("update saga.workers set alive_until = clock_timestamp() - interval '1 hour'")
        query = "select id from saga.workers where alive_until > clock_timestamp()"
        second = await eventually(lambda: saga_pool.fetchval(query), what="another life")
        assert second != first
        assert await (await shop.start(saga_pool, Order())).result(timeout=20) == "A1 paid sent"


async def test_nothing_begins_once_the_lease_is_past(saga_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """H46, the worker's half: a dead worker begins no call. Red without the check before a call."""
    async with working(saga_pool, shop) as service:
        service.gates, service.reached = {"reserve": asyncio.Event()}, {"reserve": asyncio.Event()}
        handle = await shop.start(saga_pool, Order())
        await asyncio.wait_for(service.reached["reserve"].wait(), 20)
        monkeypatch.setattr(Heartbeat, "is_held", property(lambda _self: False))
        service.gates["reserve"].set()

        async def written() -> Any:
            return await saga_pool.fetchval("select count(*) from saga.tasks where instance_id = $1", handle.id) == 2

        await eventually(written, what="the result of the call that was under way is written")
        await asyncio.sleep(0)
        assert service.counts["charge"] == 0


async def test_a_worker_hands_over_within_a_second(saga_pool: Pool) -> None:
    async with working(saga_pool, shop) as service:
        service.gates, service.reached = {"charge": asyncio.Event()}, {"charge": asyncio.Event()}
        handles = [await shop.start(saga_pool, Order(sku=str(n))) for n in range(200)]

        async def all_there() -> bool:
            return service.counts["charge"] == 200

        await eventually(all_there, what="all sagas are in their second step")
        began = time.monotonic()
    took = time.monotonic() - began
    assert await held(saga_pool) == 0
    assert await saga_pool.fetchval("select max(crash_count) from saga.workflow_instances") == 0
    assert took < 1, took
    async with working(saga_pool, shop):
        for handle in handles:
            assert await handle.result(timeout=30) == "A1 paid sent"
    assert sorted(await effects(saga_pool)) == ["charge"] * 200 + ["reserve"] * 200 + ["ship"] * 200


async def test_calls_that_end_soon_are_written_before_the_hand_over(saga_pool: Pool) -> None:
    async with working(saga_pool, settled) as service:
        service.gates, service.reached = {"send": asyncio.Event()}, {"send": asyncio.Event()}
        handle = await settled.start(saga_pool, Order())
        await asyncio.wait_for(service.reached["send"].wait(), 20)
        asyncio.get_running_loop().call_later(0.05, service.gates["send"].set)
    async with working(saga_pool, settled):
        assert await handle.result(timeout=20) == "sent"


async def test_a_call_that_is_cut_off_counts_as_one_that_may_have_happened(saga_pool: Pool) -> None:
    async with working(saga_pool, settled) as service:
        service.gates, service.reached = {"send": asyncio.Event()}, {"send": asyncio.Event()}
        handle = await settled.start(saga_pool, Order())
        await asyncio.wait_for(service.reached["send"].wait(), 20)
    async with working(saga_pool, settled):
        with pytest.raises(Failed, match="unknown"):
            await handle.result(timeout=20)
    assert await effects(saga_pool) == ["reserve", "unsend", "release"]


async def test_two_workers_share_and_neither_runs_what_the_other_has(saga_pool: Pool) -> None:
    service = Service(saga_pool)
    async with working(saga_pool, shop, deps=service), working(saga_pool, shop, deps=service):
        handles = await asyncio.gather(*(shop.start(saga_pool, Order(sku=str(n))) for n in range(100)))
        for handle in handles:
            assert await handle.result(timeout=30) == "A1 paid sent"
    assert sorted(await effects(saga_pool)) == ["charge"] * 100 + ["reserve"] * 100 + ["ship"] * 100


PATIENT = Settings(worker_lease_seconds=1.0, idle_after_seconds=0.02, safety_poll_seconds=60)


async def idle(pool: Pool) -> None:
    async def look() -> bool:
        return bool(await pool.fetchval("select 1 from pg_locks where classid = 1936287842 and mode = 'ExclusiveLock'"))

    await eventually(look, what="the worker is idle")


@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_an_idle_worker_is_called(saga_pool: Pool, rule: str) -> None:
    """Nobody polls for it: the safety poll is a minute away. Red where `saga.wake` does not call: `removed`."""
    if rule == "removed":
        await saga_pool.execute(
            "create or replace function saga.call_worker() returns void language plpgsql as $$ begin end $$"
        )
    async with saga_pool.acquire() as connection, working(saga_pool, approved, settings=PATIENT):
        handle = await approved.start(connection, Order())
        await receiving(saga_pool, handle.id)
        await idle(saga_pool)
        await connection.execute("select saga.signal('approved', $1, 'Approval', null, '{}')", handle.key)
        if rule == "kept":
            assert await handle.result(timeout=20) == "paid"
        else:
            with pytest.raises(ResultTimeout):
                await handle.result(timeout=1)


async def receiving(pool: Pool, instance_id: UUID) -> None:
    async def look() -> bool:
        return len(await journal_of(pool, instance_id)) == 2 and await state(pool, instance_id) == "waiting"

    await eventually(look, what="it waits for a signal")


async def test_of_two_idle_workers_the_one_that_serves_it_is_called(saga_pool: Pool) -> None:
    async with working(saga_pool, shop, settings=PATIENT), saga_pool.acquire() as connection:
        await idle(saga_pool)
        async with working(saga_pool, approved, settings=PATIENT):
            handle = await approved.start(connection, Order())
            await receiving(saga_pool, handle.id)
            await handle.signal(Approval())
            assert await handle.result(timeout=20) == "paid"


async def test_a_worker_whose_listening_connection_is_gone_still_stops_at_once(saga_pool: Pool) -> None:
    """It notices that the connection has ended and listens on another one; a dead one does not keep it running."""
    async with working(saga_pool, shop, settings=PATIENT):
        await idle(saga_pool)
        kill = "select pg_terminate_backend(pid) from pg_locks where classid = 1936287842 and mode = 'ExclusiveLock'"
        await saga_pool.execute(kill)
        await idle(saga_pool)  # it noticed, and listens again, on another connection
        began = time.monotonic()
    assert time.monotonic() - began < 5
