"""Workers killed while they take over, suspend, let timers go off, or hand over; another one finishes.

In each run several sagas end on both ways, and what happened outside is counted for each.
"""

import asyncio
import signal
from typing import Any, Final

import pytest

from outbox import Pool
from outbox.crash_sites import Side
from saga import Handle, Saga, StepContext, runner
from saga.state import Work
from tests.support.faults import Fault, eventually
from tests.support.saga_process import worker_process
from tests.support.saga_worker import SERVICE, Order, approved, end_of, packed, violations, working

pytestmark = pytest.mark.crash

SIDES: Final[tuple[Side, Side]] = ("before", "after")
CALL, CHECKPOINT, CLAIM = "saga.runner.call", "saga.journal.checkpoint", "saga.journal.claim"
TAKE_OVER, TIMER, NEXT_TIMER = "saga.journal.take_over", "saga.journal.let_timers_go_off", "saga.tenure.next_timer"
HAND_OVER, DEREGISTER = "saga.journal.hand_over", "saga.journal.deregister"

SAGAS: Final = 20
HELD: Final = """
create function hold() returns trigger language plpgsql as $$
begin perform pg_advisory_xact_lock_shared(7); return new; end $$;
create trigger hold before insert on effects for each row when (new.name = 'charge') execute function hold()"""
"""Charges begin, and do not end while somebody has the lock."""
ALIVE: Final = "select count(*) from saga.workers where alive_until > clock_timestamp()"
LEASED: Final = "select lease_owner from saga.workflow_instances where lease_owner is not null"
WORKERS: Final = "select count(*) from saga.workers"
DUE: Final = "select count(*) from saga.workflow_instances where wake_at <= clock_timestamp()"
BLOCKED: Final = (
    "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like 'insert into effects%'"
)


async def start(pool: Pool, kind: Saga[Order, Any], **orders: str) -> dict[str, Handle[Any]]:
    """Sagas that no worker of this process takes: what fails, by sku."""
    await pool.execute(SERVICE)
    return {sku: await kind.start(pool, Order(sku=sku, fails=fails)) for sku, fails in orders.items()}


async def killed(url: str, fault: Fault) -> None:
    """A worker lives until then."""
    with worker_process(url, fault) as worker:
        assert await worker.ended() == -signal.SIGKILL


async def until(pool: Pool, query: str, count: int) -> None:
    async def look() -> bool:
        return int(await pool.fetchval(query)) == count

    await eventually(look, what=query)


async def ends(handles: dict[str, Handle[Any]]) -> dict[str, str]:
    return dict(zip(handles, await asyncio.gather(*map(end_of, handles.values())), strict=True))


def another_key(work: Work, deps: object) -> StepContext[Any]:
    """The context of an attempt under a key that depends on who makes it."""
    return StepContext(deps=deps, idempotency_key=f"{work.key} elsewhere", attempt=work.attempt)


@pytest.mark.parametrize(
    ("visit", "side", "without"),
    [*((visit, side, None) for visit in (2, 7) for side in SIDES), (7, "after", "one key")],
)
async def test_killed_while_it_takes_over(
    saga_pool: Pool,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    side: Side,
    visit: int,
    without: str | None,
) -> None:
    """What a first one left, early and on the way back; the second is killed around its takeover.

    Red where a call that is made again has another key.
    """
    if without is not None:
        monkeypatch.setattr(runner, "context_of", another_key)
    handles = await start(saga_pool, packed, a="", b="pack rejects", c="charge rejects", d="")
    await killed(database, Fault(CALL, "after", visit=visit))
    await until(saga_pool, ALIVE, 0)
    left = await saga_pool.fetch(LEASED)
    assert left
    await killed(database, Fault(TAKE_OVER, side))
    still = await saga_pool.fetch(f"{LEASED} and lease_owner = $1", left[0]["lease_owner"])
    assert len(still) == (len(left) if side == "before" else 0)
    async with working(saga_pool, packed):
        found = await ends(handles)
    assert found == {"a": "completed", "b": "undone", "c": "undone", "d": "completed"}
    wrong = await violations(saga_pool, found, ["reserve", "charge", "pack"])
    assert (wrong == []) == (without is None), wrong


@pytest.mark.parametrize("visit", [1, 2])
@pytest.mark.parametrize("side", SIDES)
async def test_killed_while_it_suspends(saga_pool: Pool, database: str, side: Side, visit: int) -> None:
    """Before a sleep, and before it receives; then the timer of the receive goes off, and it is undone."""
    handles = await start(saga_pool, approved, short="")
    await killed(database, Fault(CHECKPOINT, side, visit=visit))
    async with working(saga_pool, approved):
        found = await ends(handles)
    assert found == {"short": "undone"}
    assert await violations(saga_pool, found, ["reserve", "charge"]) == []


@pytest.mark.parametrize("visit", [1, 2])
@pytest.mark.parametrize("site", [TIMER, NEXT_TIMER, CLAIM])
@pytest.mark.parametrize("side", SIDES)
async def test_killed_while_a_timer_goes_off(saga_pool: Pool, database: str, side: Side, site: str, visit: int) -> None:
    """That of a sleep, and of a receive; the worker that set it was killed as well."""
    handles = await start(saga_pool, approved, short="")
    await killed(database, Fault(CHECKPOINT, "after", visit=visit))
    await until(saga_pool, DUE, 1)
    await killed(database, Fault(site, side))
    if site == TIMER:
        assert await saga_pool.fetchval(DUE) == (side == "before")
    async with working(saga_pool, approved):
        found = await ends(handles)
    assert found == {"short": "undone"}
    assert await violations(saga_pool, found, ["reserve", "charge"]) == []


@pytest.mark.parametrize("site", [HAND_OVER, DEREGISTER])
@pytest.mark.parametrize("side", SIDES)
async def test_killed_while_it_hands_over(saga_pool: Pool, database: str, side: Side, site: str) -> None:
    """After SIGTERM, with calls under way that it had to cut off."""
    orders = {f"n{n}": "pack rejects" if n % 3 == 2 else "" for n in range(SAGAS)}
    handles = await start(saga_pool, packed, **orders)
    await saga_pool.execute(HELD)
    async with saga_pool.acquire() as connection:
        await connection.execute("select pg_advisory_lock(7)")
        with worker_process(database, Fault(site, side)) as worker:
            await eventually(lambda: blocked(saga_pool), what="calls are under way")
            worker.signal(signal.SIGTERM)
            assert await worker.ended() == -signal.SIGKILL
        await connection.execute("select pg_advisory_unlock(7)")
    is_handed = (site, side) != (HAND_OVER, "before")
    assert bool(await saga_pool.fetch(LEASED)) != is_handed
    assert await saga_pool.fetchval(WORKERS) == ((site, side) != (DEREGISTER, "after"))
    async with working(saga_pool, packed):
        found = await ends(handles)
    assert found == {sku: "undone" if fails else "completed" for sku, fails in orders.items()}
    assert await violations(saga_pool, found, ["reserve", "charge", "pack"]) == []


async def blocked(pool: Pool) -> bool:
    return int(await pool.fetchval(BLOCKED)) > SAGAS // 4
