"""Workers of sagas killed at every crash site, stopped and continued; another worker finishes, and nothing is lost.

What happened outside is counted by the services' own table: a call that may have happened is made again under the same
key, so services see a key twice at most, and the journal has one row for each step.
"""

import signal
from collections import Counter
from typing import Any

import pytest

from outbox import Pool
from outbox.crash_sites import Side
from saga import Failed
from tests.support.faults import Fault, eventually
from tests.support.mutations import break_function
from tests.support.saga_process import worker_process
from tests.support.saga_worker import (
    SERVICE,
    Order,
    effects,
    journal_of,
    packed,
    plan_of,
    reaches,
    recorded,
    settled,
    shop,
    working,
)

pytestmark = pytest.mark.crash

CALL, CHECKPOINT = "saga.runner.call", "saga.journal.checkpoint"
SIDES: tuple[Side, Side] = ("before", "after")
HAPPY = [
    *(Fault(site, side, visit=visit) for site in (CALL, CHECKPOINT) for visit in (1, 2, 3) for side in SIDES),
    *(Fault(site, side) for site in ("saga.journal.claim", "saga.journal.register") for side in SIDES),
]
BACK = [Fault(site, side, visit=visit) for site in (CALL, CHECKPOINT) for visit in (3, 4, 5) for side in SIDES]
EARLIER = [Fault(site, side, visit=visit) for site in (CALL, CHECKPOINT) for visit in (2, 3) for side in SIDES]
LANDED = [Fault(site, side, visit=visit) for site in (CALL, CHECKPOINT) for visit in (2, 3, 4) for side in SIDES]
TRANSACTIONAL = [
    *(Fault("saga.journal.checkpoint_waiting", side) for side in SIDES),
    Fault("saga.writer.limit_lock_waits", "after"),
]


async def start(pool: Pool, one: Any, order: Order) -> Any:
    """A start that no worker of this process takes."""
    await pool.execute(SERVICE)
    return await one.start(pool, order)


async def keys(pool: Pool) -> Counter[str]:
    """How many different calls of each name happened outside."""
    rows = await pool.fetch("select name, count(distinct key) as keys from effects group by name")
    return Counter({row["name"]: row["keys"] for row in rows})


async def killed(pool: Pool, database: str, one: Any, order: Order, fault: Fault) -> Any:
    """A saga whose worker was killed by a fault."""
    handle = await start(pool, one, order)
    with worker_process(database, fault) as worker:
        assert await worker.ended() == -signal.SIGKILL
    return handle


async def undone(pool: Pool, one: Any, handle: Any) -> Counter[str]:
    """Another worker lets it fail; the calls that happened."""
    async with working(pool, one):
        with pytest.raises(Failed):
            await handle.result(timeout=30)
    return await keys(pool)


@pytest.mark.parametrize("fault", HAPPY, ids=str)
async def test_killed_on_the_way(saga_pool: Pool, database: str, fault: Fault) -> None:
    handle = await killed(saga_pool, database, packed, Order(), fault)
    async with working(saga_pool, packed):
        assert await handle.result(timeout=30) == "A1 paid packed"
    assert await keys(saga_pool) == {"reserve": 1, "charge": 1, "pack": 1}
    assert [outcome for _, outcome in await journal_of(saga_pool, handle.id)] == ["completed"] * 3


@pytest.mark.parametrize("fault", BACK, ids=str)
async def test_killed_on_the_way_back(saga_pool: Pool, database: str, fault: Fault) -> None:
    handle = await killed(saga_pool, database, packed, Order(fails="pack rejects"), fault)
    found = await undone(saga_pool, packed, handle)
    assert {name: found[name] for name in ("reserve", "release", "charge", "refund", "pack")} == {
        "reserve": 1,
        "release": 1,
        "charge": 1,
        "refund": 1,
        "pack": 0,
    }
    assert [status for _, status in await plan_of(saga_pool, handle.id)] == ["completed"] * len(
        await plan_of(saga_pool, handle.id)
    )
    order = [name for name in dict.fromkeys(await effects(saga_pool)) if name in ("refund", "release")]
    assert order == ["refund", "release"]


@pytest.mark.parametrize("fault", EARLIER, ids=str)
async def test_killed_on_the_way_back_from_the_second_step(saga_pool: Pool, database: str, fault: Fault) -> None:
    handle = await killed(saga_pool, database, packed, Order(fails="charge rejects"), fault)
    found = await undone(saga_pool, packed, handle)
    assert (found["reserve"], found["release"], found["charge"], found["pack"]) == (1, 1, 0, 0)
    assert {status for _, status in await plan_of(saga_pool, handle.id)} == {"completed"}


@pytest.mark.parametrize("fault", LANDED, ids=str)
async def test_killed_around_a_step_whose_outcome_is_unknown(saga_pool: Pool, database: str, fault: Fault) -> None:
    """Its call lands and times out: it is undone, and what came before."""
    handle = await killed(saga_pool, database, settled, Order(fails="send lands"), fault)
    found = await undone(saga_pool, settled, handle)
    assert (found["reserve"], found["release"], found["unsend"]) == (1, 1, 1)
    assert found["send"] <= 1
    assert await plan_of(saga_pool, handle.id) == [("send#1", "completed"), ("reserve#1", "completed")]


@pytest.mark.parametrize("fault", TRANSACTIONAL, ids=str)
async def test_killed_in_a_transactional_step(saga_pool: Pool, database: str, fault: Fault) -> None:
    await saga_pool.execute("create table records (sku text)")
    handle = await killed(saga_pool, database, recorded, Order(), fault)
    async with working(saga_pool, recorded):
        assert await handle.result(timeout=30) == 1
    assert await saga_pool.fetchval("select count(*) from records") == 1


@pytest.mark.parametrize("without", [None, "lease check"])
async def test_a_zombie_begins_nothing(saga_pool: Pool, database: str, without: str | None) -> None:
    """H46, H47: stopped before a call, continued when another worker has finished. Red without the lease check."""
    handle = await start(saga_pool, packed, Order())
    with worker_process(database, Fault("saga.runner.call", "before", "stop", 2), without=without) as zombie:
        await zombie.stopped()
        async with working(saga_pool, packed):
            assert await handle.result(timeout=30) == "A1 paid packed"
            zombie.signal(signal.SIGCONT)

            async def started_again() -> bool:
                return int(await saga_pool.fetchval(ALIVE)) == 2

            await eventually(started_again, what="the zombie works under another id")
            assert Counter(await effects(saga_pool))["charge"] == (1 if without is None else 2)


KNOWN = "if true or exists (select from saga.tasks"
ALIVE = "select count(*) from saga.workers where alive_until > clock_timestamp()"


@pytest.mark.parametrize("without", [None, "late results"])
async def test_a_zombie_that_holds_a_result_has_it_undone_again(
    saga_pool: Pool, database: str, without: str | None
) -> None:
    """H19, H47: its call landed, it was taken over, the unknown was undone; then it goes on with the result.

    Red where what it reports is thrown away.
    """
    if without is not None:
        await break_function(saga_pool, "record_late", "if exists (select from saga.tasks", KNOWN, schema="saga")
    handle = await start(saga_pool, settled, Order())
    with worker_process(database, Fault("saga.runner.call", "after", "stop", 2)) as zombie:
        await zombie.stopped()
        async with working(saga_pool, settled):
            with pytest.raises(Failed, match="unknown"):
                await handle.result(timeout=30)
            assert await effects(saga_pool) == ["reserve", "send", "unsend", "release"]
            zombie.signal(signal.SIGCONT)

            async def undone_again() -> bool:
                return (await effects(saga_pool)).count("unsend") == 2

            async def started_again() -> bool:
                return int(await saga_pool.fetchval(ALIVE)) == 2

            await eventually(started_again if without else undone_again, what="the zombie goes on")
            await reaches(saga_pool, handle.id, "failed")
    if without is not None:
        assert not await undone_again()
        return
    assert await saga_pool.fetchval("select count(*) from saga.late_results") == 1
    assert (await plan_of(saga_pool, handle.id)).count(("send#1", "completed")) == 2


async def test_an_instance_that_kills_its_workers_is_paused(saga_pool: Pool, database: str) -> None:
    """The brake: alone from the second time, paused after the sixth; no other instance suffers."""
    handle = await start(saga_pool, packed, Order())
    for _ in range(6):
        with worker_process(database, Fault("saga.runner.call", "before")) as worker:
            assert await worker.ended() == -signal.SIGKILL
    async with working(saga_pool, shop) as _:  # takes over, and does not serve it
        await reaches(saga_pool, handle.id, "paused")
        assert await (await shop.start(saga_pool, Order())).result(timeout=20) == "A1 paid sent"
    reason = await saga_pool.fetchval("select paused_reason from saga.workflow_instances where id = $1", handle.id)
    assert "without any progress" in reason
