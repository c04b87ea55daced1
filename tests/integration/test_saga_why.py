"""`saga why`: one true sentence for each way in which a saga waits, is paused or has ended."""

import asyncio
import re
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

import pytest

from outbox import Pool
from saga import Rejected, Run, Saga, saga
from saga.inspection import read
from saga.operate import pause
from saga.why import Why, why
from tests.support.saga_cases import CASES, HOUR, asks, commands, locks, pair, parent, retries, sleeps, undone
from tests.support.saga_journal import drive
from tests.support.saga_worker import SERVICE, Order, Service, charge, reaches, reserve, working

MOMENT = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC"


@pytest.fixture
async def pool(saga_pool: Pool) -> Pool:
    await saga_pool.execute(SERVICE)
    return saga_pool


async def sentence(pool: Pool, instance_id: UUID) -> Why:
    return why(await read(pool, instance_id))


def fits(because: Why, pattern: str) -> None:
    """The sentence is this, with MOMENT for times."""
    assert re.fullmatch(pattern.replace("MOMENT", MOMENT) + rf"( Its deadline is {MOMENT}\.)?", because.text), because


@pytest.mark.parametrize(
    ("one", "pattern"),
    [
        pytest.param(asks, r"It waits for the signal Approval until MOMENT\.", id="signal"),
        pytest.param(sleeps, r"It sleeps until MOMENT\.", id="sleep"),
        pytest.param(
            commands, r"It waits for the reply of stock to reserve \(stock\.reserve#1\) until MOMENT\.", id="reply"
        ),
        pytest.param(parent, r"It waits for its child saga asks \([-0-9a-f]{36}\), which is \w+\.", id="child"),
        pytest.param(
            retries,
            r"It waits for another attempt of slow#1 at MOMENT after 1 failed \(ConnectionResetError: away.\[31m\)\.",
            id="backoff",
        ),
    ],
)
async def test_a_saga_that_waits_says_for_what(pool: Pool, one: Saga[Any, Any], pattern: str) -> None:
    """Red for signal and sleep where the checkpoint does not say `waits_for`."""
    async with working(pool, *CASES):
        handle = await one.start(pool, Order())
        await reaches(pool, handle.id, "waiting")
        because = await sentence(pool, handle.id)
    fits(because, pattern)
    assert not because.needs_person


async def test_a_queue_for_a_lock_names_who_has_it(pool: Pool) -> None:
    async with working(pool, locks):
        first = await locks.start(pool, Order(), key="first")
        await reaches(pool, first.id, "waiting")
        second = await locks.start(pool, Order(), key="second")
        await reaches(pool, second.id, "waiting")
        because = await sentence(pool, second.id)
    fits(because, rf"It waits for the lock 'shelf', which locks 'first' \({first.id}\) has until it ends\.")


async def test_what_is_no_longer_waited_for_is_not_named(pool: Pool) -> None:
    """Red where a checkpoint leaves the `waits_for` of an earlier one."""
    async with working(pool, asks):
        handle = await asks.start(pool, Order(), key="k")
        await reaches(pool, handle.id, "waiting")
        await asks.handle(pool, "k").cancel("x")
        await reaches(pool, handle.id, "cancelled")
    assert (await read(pool, handle.id)).waits_for is None


async def test_one_that_wants_a_worker_says_whether_there_is_any(pool: Pool) -> None:
    handle = await sleeps.start(pool, Order())
    because = await sentence(pool, handle.id)
    fits(because, r"It wants a worker since MOMENT, and no living worker serves sleeps version 1\.")
    assert because.needs_person
    assert because.remedy == "start a worker whose code has sleeps version 1: saga worker --app MODULE"
    await pool.execute(
        "insert into saga.workers (id, name, alive_until, serves)"
        " values ($1, 'w', now() + '1 h'::interval, '[\"sleeps/1\"]')",
        uuid4(),
    )
    because = await sentence(pool, handle.id)
    fits(because, r"It is ready since MOMENT; 1 worker serves it, and the next free one takes it\.")
    assert not because.needs_person


async def test_one_whose_time_has_come_and_that_nobody_serves_says_so(pool: Pool) -> None:
    """Red where only what is ready is looked at: workers ring the timers, so without one nothing ever gets ready."""
    async with working(pool, sleeps):
        handle = await sleeps.start(pool, Order())
        await reaches(pool, handle.id, "waiting")
    assert not (await sentence(pool, handle.id)).needs_person
    await pool.execute("update saga.workflow_instances set wake_at = now() - interval '1 s' where id = $1", handle.id)
    because = await sentence(pool, handle.id)
    assert because.text.endswith("That has come, and no living worker serves sleeps version 1.")
    assert because.needs_person
    assert because.remedy == "start a worker whose code has sleeps version 1: saga worker --app MODULE"


async def test_one_that_runs_names_its_worker_and_calls(pool: Pool) -> None:
    service = Service(pool, gates={"reserve": asyncio.Event()}, reached={"reserve": asyncio.Event()})
    async with working(pool, pair, deps=service):
        handle = await pair.start(pool, Order())
        await service.reached["reserve"].wait()
        fits(await sentence(pool, handle.id), r"Worker \S+ runs reserve#1\.")
        await pause(pool, handle.id, "wait")
        because = await sentence(pool, handle.id)
        fits(because, r"Worker \S+ runs reserve#1\. It pauses when that has ended \(paused by a person: wait\)\.")
        service.gates["reserve"].set()
        await reaches(pool, handle.id, "paused")
    because = await sentence(pool, handle.id)
    fits(because, r"It is paused: paused by a person: wait\.")
    assert because.remedy == f"let it go on: saga resume {handle.id}"


async def test_one_whose_worker_is_lost_says_so(pool: Pool) -> None:
    handle = await sleeps.start(pool, Order())
    await pool.execute("update saga.workflow_instances set lease_owner = $1, ready_at = null", uuid4())
    because = await sentence(pool, handle.id)
    assert "was lost; another one takes it over" in because.text
    assert because.needs_person, "no worker is there that could"


async def test_one_that_is_undone_says_what_it_waits_for(pool: Pool) -> None:
    service = Service(pool, gates={"unbook": asyncio.Event()}, reached={"unbook": asyncio.Event()})
    async with working(pool, undone, deps=service):
        handle = await undone.start(pool, Order())
        await service.reached["unbook"].wait()
        fits(await sentence(pool, handle.id), r"Worker \S+ undoes book#1 with unbook\.")
        service.gates["unbook"].set()
        await reaches(pool, handle.id, "failed")
    fits(await sentence(pool, handle.id), r"It failed at MOMENT: sold out\. What it had done was undone\.")


@pytest.mark.parametrize(
    ("columns", "pattern"),
    [
        (
            {"status": "pending", "not_before": "2030-01-01", "attempts": 0},
            r"It waits until MOMENT, until then the call book#1 may still have its effect; unbook undoes it then\.",
        ),
        (
            {"status": "pending", "not_before": "2030-01-01", "attempts": 2, "error": "away"},
            r"It waits for another attempt to undo book#1 with unbook at MOMENT after 2 failed \(away\)\.",
        ),
        (
            {"status": "executing", "kind": "remote", "not_before": "2030-01-01"},
            r"It waits for stock to undo reserve \(book#1\) until MOMENT\.",
        ),
        ({"status": "executing", "kind": "child"}, r"It waits for its child saga book#1 to undo itself\."),
    ],
)
async def test_each_way_of_waiting_while_being_undone(pool: Pool, columns: dict[str, Any], pattern: str) -> None:
    handle = await sleeps.start(pool, Order())
    await pool.execute(
        "update saga.workflow_instances set state = 'compensating', ending = 'failed', ready_at = null where id = $1",
        handle.id,
    )
    moment = columns.get("not_before")
    await pool.execute(
        "insert into saga.saga_compensations (id, instance_id, task_id, task_seq, path, step_id, step_type, position,"
        " compensation_action, status, not_before, attempts, error_message)"
        " values ($1, $2, $1, 1, 'book#1', $3, $4, 1, 'unbook', $5, $6, $7, $8)",
        uuid4(),
        handle.id,
        "stock.reserve" if columns.get("kind") == "remote" else "book",
        columns.get("kind", "step"),
        columns["status"],
        datetime.fromisoformat(f"{moment}T00:00:00+00:00") if moment else None,
        columns.get("attempts", 0),
        columns.get("error"),
    )
    fits(await sentence(pool, handle.id), pattern)


@saga("after_pivot", deadline=HOUR)
async def after_pivot(run: Run, order: Order) -> None:
    await run(reserve(order))
    await run.pivot()
    raise Rejected("too late")


async def test_each_way_of_being_paused_has_its_remedy(pool: Pool) -> None:
    """A bug, a stuck call and a failed compensation: see test_saga_operate."""
    crashed = await sleeps.start(pool, Order())
    await pool.execute(
        "update saga.workflow_instances set state = 'paused', ready_at = null,"
        " paused_reason = 'crash loop: its worker was lost 6 times without any progress' where id = $1",
        crashed.id,
    )
    assert (await sentence(pool, crashed.id)).remedy == (
        f"find out what kills the worker (memory, a native crash in a step), mend it, then: saga resume {crashed.id}"
    )
    async with working(pool, after_pivot):
        rejected = await after_pivot.start(pool, Order())
        await reaches(pool, rejected.id, "paused")
    because = await sentence(pool, rejected.id)
    assert because.text == "It is paused: rejected after the pivot: too late."
    assert (because.remedy or "").startswith("nothing is undone after the pivot; change the body")

    @saga("pair", deadline=HOUR)
    async def other(run: Run, order: Order) -> str:
        return await run(charge(order)) + await run(reserve(order))

    diverged = await pair.start(pool, Order(), key="d")
    await drive(pool, [other])
    because = await sentence(pool, diverged.id)
    assert because.text.startswith("It is paused: diverged at reserve#1")
    assert (because.remedy or "").startswith("deploy the code that wrote this journal")


async def test_one_that_completed_waits_for_nothing(pool: Pool) -> None:
    async with working(pool, pair):
        handle = await pair.start(pool, Order())
        await handle.result(timeout=10)
    fits(await sentence(pool, handle.id), r"It completed at MOMENT, and waits for nothing\.")
