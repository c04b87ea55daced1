"""What persons do to sagas, and what it does to a worker that runs."""

import asyncio
from uuid import UUID

import pytest

from outbox import Pool
from saga import Failed, Handle
from saga.errors import NotFound, NotPossible, NotWaiting, PayloadError
from saga.inspection import find, instances, read
from saga.operate import cancel, pause, resume, settle, signal, skip, start
from saga.state import step_key
from saga.why import why
from tests.support import changed_sagas as changed
from tests.support.pages import ROOT, blocks
from tests.support.saga_cases import Switch, asks, buggy, commands, pair, parent, pivoted, retries, sleeps, undone
from tests.support.saga_worker import (
    SERVICE,
    Order,
    Service,
    effects,
    journal_of,
    packed,
    plan_of,
    reaches,
    working,
)


async def paused(pool: Pool, handle: Handle[object]) -> UUID:
    await reaches(pool, handle.id, "paused")
    return handle.id


async def test_a_signal_reaches_a_saga_that_waits_for_it_once(saga_pool: Pool) -> None:
    async with working(saga_pool, asks):
        handle = await asks.start(saga_pool, Order(), key="k")
        await reaches(saga_pool, handle.id, "waiting")
        await pause(saga_pool, handle.id, "so that it cannot end in between")
        done = await signal(saga_pool, handle.id, "Approval", '{"approved": true}', "1")
        again = await signal(saga_pool, handle.id, "Approval", '{"approved": false}', "1")
        assert (done.effect, again.effect) == ("accepted", "duplicate")
        await resume(saga_pool, handle.id, "both are sent")
        assert await handle.result(timeout=10) == "approved"
        with pytest.raises(NotWaiting, match="has ended"):
            await signal(saga_pool, handle.id, "Approval", "{}", None)


async def test_a_cancel_undoes_what_was_done(saga_pool: Pool) -> None:
    async with working(saga_pool, asks):
        handle = await asks.start(saga_pool, Order())
        await reaches(saga_pool, handle.id, "waiting")
        assert (await cancel(saga_pool, handle.id, "by phone")).effect == "requested"
        with pytest.raises(Failed, match="by phone"):
            await handle.result(timeout=10)
        assert await effects(saga_pool) == ["reserve", "release"]
        found = await read(saga_pool, handle.id)
        assert [(one.action, one.reason) for one in found.interventions] == [("cancel", "by phone")]


async def test_a_waiting_saga_pauses_at_once_and_goes_on_where_it_was(saga_pool: Pool) -> None:
    """A signal that comes meanwhile is not lost, and does not wake it."""
    async with working(saga_pool, asks):
        handle = await asks.start(saga_pool, Order())
        await reaches(saga_pool, handle.id, "waiting")
        assert (await pause(saga_pool, handle.id, "bank holiday")).effect == "paused"
        await signal(saga_pool, handle.id, "Approval", '{"approved": false}', None)
        found = await read(saga_pool, handle.id)
        assert (found.state, found.ready_at, found.wake_at) == ("paused", None, None)
        with pytest.raises(NotPossible, match="paused already"):
            await pause(saga_pool, handle.id, "again")
        assert (await resume(saga_pool, handle.id, "over")).effect == "resumed"
        assert await handle.result(timeout=10) == "refused"
        actions = [one.action for one in (await read(saga_pool, handle.id)).interventions]
        assert actions == ["pause", "resume"]


async def test_pausing_a_running_saga_keeps_the_result_of_the_call_under_way(saga_pool: Pool) -> None:
    """Red where the decider does not look at `pause_asked`, or `look` does not read it: `charge` begins.

    Red, too, where a pause takes the lease away: the call is then unknown, and `reserve` is done twice.
    """
    await saga_pool.execute(SERVICE)
    service = Service(saga_pool, gates={"reserve": asyncio.Event()}, reached={"reserve": asyncio.Event()})
    async with working(saga_pool, pair, deps=service):
        handle = await pair.start(saga_pool, Order())
        await service.reached["reserve"].wait()
        assert (await pause(saga_pool, handle.id, "wait for me")).effect == "pausing"
        service.gates["reserve"].set()
        await paused(saga_pool, handle)
        assert await journal_of(saga_pool, handle.id) == [("reserve#1", "completed")]
        found = await read(saga_pool, handle.id)
        assert found.paused_reason == "paused by a person: wait for me"
        assert found.pause_asked is None
        await resume(saga_pool, handle.id, "go")
        assert await handle.result(timeout=10) == "A1paid"
        assert await effects(saga_pool) == ["reserve", "charge"]


async def test_a_pause_that_is_taken_back_in_time_does_nothing(saga_pool: Pool) -> None:
    await saga_pool.execute(SERVICE)
    service = Service(saga_pool, gates={"reserve": asyncio.Event()}, reached={"reserve": asyncio.Event()})
    async with working(saga_pool, pair, deps=service):
        handle = await pair.start(saga_pool, Order())
        await service.reached["reserve"].wait()
        await pause(saga_pool, handle.id, "wait")
        await resume(saga_pool, handle.id, "no")
        service.gates["reserve"].set()
        assert await handle.result(timeout=10) == "A1paid"


async def test_a_saga_that_is_being_undone_pauses_between_two_compensations(saga_pool: Pool) -> None:
    """Red where `_decide_back` does not look at `pause_asked`: `release` is done."""
    await saga_pool.execute(SERVICE)
    service = Service(saga_pool, gates={"unbook": asyncio.Event()}, reached={"unbook": asyncio.Event()})
    async with working(saga_pool, undone, deps=service):
        handle = await undone.start(saga_pool, Order())
        await service.reached["unbook"].wait()
        await pause(saga_pool, handle.id, "wait")
        service.gates["unbook"].set()
        await paused(saga_pool, handle)
        assert await plan_of(saga_pool, handle.id) == [("book#1", "completed"), ("reserve#1", "pending")]
        await resume(saga_pool, handle.id, "go")
        await reaches(saga_pool, handle.id, "failed")
        assert await effects(saga_pool) == ["reserve", "book", "unbook", "release"]


async def test_resume_after_a_bug_runs_the_mended_code(saga_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with working(saga_pool, buggy):
        handle = await buggy.start(saga_pool, Order())
        await paused(saga_pool, handle)
        because = why(await read(saga_pool, handle.id))
        assert "KeyError" in because.text
        assert because.remedy == f"mend the code, deploy it, then: saga resume {handle.id}"
        monkeypatch.setattr(Switch, "body_has_bug", False)
        await resume(saga_pool, handle.id, "mended")
        assert await handle.result(timeout=10) == "A1"
        assert await effects(saga_pool) == ["reserve"]
        with pytest.raises(NotPossible, match="not paused, it is completed"):
            await resume(saga_pool, handle.id, "again")


async def test_a_cancel_of_a_paused_saga_comes_first_when_it_is_resumed(saga_pool: Pool) -> None:
    async with working(saga_pool, buggy):
        handle = await buggy.start(saga_pool, Order())
        await paused(saga_pool, handle)
        await cancel(saga_pool, handle.id, "give up")
        assert (await read(saga_pool, handle.id)).state == "paused"
        await resume(saga_pool, handle.id, "undo it")
        await reaches(saga_pool, handle.id, "cancelled")
        assert await effects(saga_pool) == ["reserve", "release"]


async def test_a_required_compensation_that_fails_can_be_skipped(saga_pool: Pool) -> None:
    """Red where `skip` does not set the row completed: it is tried again."""
    async with working(saga_pool, undone) as service:
        handle = await undone.start(saga_pool, Order(fails="unbook fails 99"))
        await paused(saga_pool, handle)
        because = why(await read(saga_pool, handle.id))
        assert "compensation of book#1 failed 2 times: ConnectionResetError" in because.text
        assert "--skip book#1 --reason" in (because.remedy or "")
        with pytest.raises(NotPossible, match="nothing is not there; name one of: book#1, reserve#1"):
            await skip(saga_pool, handle.id, "nothing", "x")
        tried = service.counts["unbook"]
        await skip(saga_pool, handle.id, "book", "by hand")
        await reaches(saga_pool, handle.id, "failed")
        assert service.counts["unbook"] == tried
        assert await effects(saga_pool) == ["reserve", "book", "release"]
        found = await read(saga_pool, handle.id)
        assert [(row.path, row.status, row.resolution) for row in found.plan] == [
            ("book#1", "completed", "by hand"),
            ("reserve#1", "completed", None),
        ]
        assert [(one.action, one.path) for one in found.interventions] == [("skip", "book#1")]


async def test_a_step_whose_code_is_gone_can_be_skipped_before_there_is_a_plan(saga_pool: Pool) -> None:
    """Red where the plan is made without the skip: it pauses again.

    Red, too, where the pause forgets that it is being undone, where the skip is not handed over with the claim, and
    where the plan does not give it its place.
    """
    await saga_pool.execute(SERVICE)
    service = Service(saga_pool, gates={"pack": asyncio.Event()}, reached={"pack": asyncio.Event()})
    async with working(saga_pool, packed, deps=service):
        handle = await packed.start(saga_pool, Order())
        await service.reached["pack"].wait()
        await cancel(saga_pool, handle.id, "the customer called")
    async with working(saga_pool, changed.without_charge) as service:
        await paused(saga_pool, handle)
        found = await read(saga_pool, handle.id)
        assert (found.ending, found.error, found.plan) == ("cancelled", "the customer called", ())
        because = why(found)
        assert "nothing is called pack in the code of packed any more" in because.text
        assert "--skip pack#1 --reason" in because.text
        assert because.remedy == f"bring the step back and deploy it, then: saga resume {handle.id}"
        with pytest.raises(NotPossible, match="ship is not there; name one of: reserve#1, charge#1, pack#1"):
            await skip(saga_pool, handle.id, "ship", "x")
        await skip(saga_pool, handle.id, "pack", "it never was packed")
        await paused(saga_pool, handle)
        assert "nothing is called charge" in ((await read(saga_pool, handle.id)).paused_reason or "")
        await skip(saga_pool, handle.id, "charge#1", "paid back by hand")
        await reaches(saga_pool, handle.id, "cancelled")
    assert await effects(saga_pool) == ["reserve", "charge", "release"]
    found = await read(saga_pool, handle.id)
    assert [(row.position, row.path, row.status, row.resolution) for row in found.plan] == [
        (1, "pack#1", "completed", "it never was packed"),
        (2, "charge#1", "completed", "paid back by hand"),
        (3, "reserve#1", "completed", None),
    ]
    assert [(one.action, one.path) for one in found.interventions] == [
        ("cancel", None),
        ("skip", "pack#1"),
        ("skip", "charge#1"),
    ]


async def test_a_paused_saga_that_is_to_be_cancelled_can_leave_a_compensation_out(saga_pool: Pool) -> None:
    """Red where a skip is taken although nothing is to be undone: whoever meant the step would undo nothing later."""
    async with working(saga_pool, asks) as service:
        handle = await asks.start(saga_pool, Order())
        await reaches(saga_pool, handle.id, "waiting")
        await pause(saga_pool, handle.id, "wait")
        with pytest.raises(NotPossible, match="not being undone, so no compensation can be skipped; cancel it first"):
            await skip(saga_pool, handle.id, "reserve", "x")
        await cancel(saga_pool, handle.id, "give up")
        await skip(saga_pool, handle.id, "reserve", "released by hand")
        await reaches(saga_pool, handle.id, "cancelled")
        assert service.counts["release"] == 0
        assert await plan_of(saga_pool, handle.id) == [("reserve#1", "completed")]


async def test_a_required_compensation_is_tried_again_by_a_plain_resume(saga_pool: Pool) -> None:
    async with working(saga_pool, undone):
        handle = await undone.start(saga_pool, Order(fails="unbook fails 3"))
        await paused(saga_pool, handle)
        await resume(saga_pool, handle.id, "mended")
        await reaches(saga_pool, handle.id, "failed")
        assert await effects(saga_pool) == ["reserve", "book", "unbook", "release"]


async def test_a_person_says_what_a_stuck_call_has_brought(saga_pool: Pool) -> None:
    async with working(saga_pool, pivoted) as service:
        handle = await pivoted.start(saga_pool, Order(fails="certain lands"))
        await paused(saga_pool, handle)
        because = why(await read(saga_pool, handle.id))
        assert "certain#1 is unknown after the pivot" in because.text
        assert "--step certain#1 --result JSON" in (because.remedy or "")
        with pytest.raises(NotPossible, match="no JSON"):
            await settle(saga_pool, handle.id, "certain", "sure", "seen")
        with pytest.raises(PayloadError):
            await settle(saga_pool, handle.id, "certain", "1", "seen", saga=pivoted)
        with pytest.raises(NotPossible, match="not being undone"):
            await skip(saga_pool, handle.id, "certain", "x")
        await settle(saga_pool, handle.id, "certain", '"by hand"', "seen", saga=pivoted)
        assert await handle.result(timeout=10) == "by hand"
        assert service.counts["certain"] == 1
        assert ("certain#1", "completed") in await journal_of(saga_pool, handle.id)


async def test_start_by_name_and_key_is_found_again(saga_pool: Pool) -> None:
    handle = await start(saga_pool, sleeps, '{"sku": "A"}', "k")
    assert await find(saga_pool, "sleeps/k") == handle.id
    assert (await start(saga_pool, sleeps, '{"sku": "A"}', "k")).id == handle.id
    with pytest.raises(PayloadError):
        await start(saga_pool, sleeps, '{"sku": 1}', "other")
    with pytest.raises(NotFound, match="under the key 'nowhere'"):
        await find(saga_pool, "sleeps/nowhere")
    with pytest.raises(NotFound, match="names no instance"):
        await find(saga_pool, "nowhere")


async def test_the_list_is_by_state_saga_and_age(saga_pool: Pool) -> None:
    first = await sleeps.start(saga_pool, Order(), key="a")
    second = await commands.start(saga_pool, Order(), key="b")
    await pause(saga_pool, first.id, "x")
    assert [one.key for one in await instances(saga_pool, limit=9)] == ["b", "a"]
    assert [one.id for one in await instances(saga_pool, states=["paused"], limit=9)] == [first.id]
    assert [one.id for one in await instances(saga_pool, name="commands", limit=9)] == [second.id]
    assert await instances(saga_pool, older_than_seconds=3600, limit=9) == []
    assert len(await instances(saga_pool, limit=1)) == 1


async def test_the_manuals_statement_forgets_what_has_ended_long_ago_and_nothing_else(saga_pool: Pool) -> None:
    [forget] = [block.body for block in blocks(ROOT / "docs" / "operations.md") if "with old as" in block.body]
    async with working(saga_pool, pair, undone, asks, parent):
        done = await pair.start(saga_pool, Order())
        assert await done.result(timeout=10) == "A1paid"
        back = await undone.start(saga_pool, Order())
        await reaches(saga_pool, back.id, "failed")
        waits = await asks.start(saga_pool, Order())
        await reaches(saga_pool, waits.id, "waiting")
        family = await parent.start(saga_pool, Order())
        await reaches(saga_pool, family.id, "waiting")
        await signal(saga_pool, step_key(family.id, "asks#1"), "Approval", "{}", None)
        await reaches(saga_pool, family.id, "completed")
    fresh = await rows_of_sagas(saga_pool)
    assert (await saga_pool.fetchval(forget), await rows_of_sagas(saga_pool)) == (0, fresh)
    await saga_pool.execute("update saga.workflow_instances set completed_at = completed_at - interval '91 days'")
    assert await saga_pool.fetchval(forget) == 3, "a child stays as long as its parent"
    assert await saga_pool.fetchval(forget) == 1
    left = await rows_of_sagas(saga_pool)
    assert {name: ids for name, ids in left.items() if ids} == {
        "workflow_instances": {waits.id},
        "tasks": {waits.id},
    }
    async with working(saga_pool, asks):
        await signal(saga_pool, waits.id, "Approval", "{}", None)
        assert await waits.result(timeout=10) == "approved"


async def rows_of_sagas(pool: Pool) -> dict[str, set[UUID]]:
    """Of which instances there are rows, by table."""
    tables = ("tasks", "saga_compensations", "signals", "late_results", "interventions", "locks")
    rows = {name: await pool.fetch(f"select instance_id as id from saga.{name}") for name in tables}
    rows["workflow_instances"] = await pool.fetch("select id from saga.workflow_instances")
    return {name: {row["id"] for row in found} for name, found in rows.items()}


async def test_what_cannot_be_is_refused(saga_pool: Pool) -> None:
    handle = await retries.start(saga_pool, Order())
    with pytest.raises(NotPossible, match="not paused"):
        await resume(saga_pool, handle.id, "x")
    with pytest.raises(NotPossible, match="reason is empty"):
        await pause(saga_pool, handle.id, " ")
    with pytest.raises(NotFound):
        await cancel(saga_pool, UUID(int=1), "x")
