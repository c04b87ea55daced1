"""After the pivot nothing is undone, whatever comes: what would be undone before it pauses."""

from typing import Any

from saga import Rejected, Run, Signal, StepContext, remote, saga, step
from saga.state import Unwritable
from tests.support.saga_lab import Scene, uncertain
from tests.unit.test_saga_decider import Order, Reserved, charge, ship, undone

reserve = remote("stock.reserve", Order, Reserved, timeout=30)


class Go(Signal):
    pass


@saga("rejects_at_once", deadline=3600)
async def rejects_at_once(run: Run, order: Order) -> None:
    await run(charge(order))
    await run.pivot()
    raise Rejected("too late")


class Bug:
    is_there = True


@saga("breaks_at_once", deadline=3600)
async def breaks_at_once(run: Run, order: Order) -> str:
    await run(charge(order))
    await run.pivot()
    if Bug.is_there:
        raise KeyError("price")
    await run.receive(Go, timeout=100)
    return await run(ship(order))


@saga("commands_after", deadline=3600)
async def commands_after(run: Run, order: Order) -> str:
    await run(charge(order))
    await run.pivot()
    return (await run(reserve(order))).shelf


async def test_rejected_in_the_same_breath_as_the_pivot_pauses_for_good() -> None:
    """The pivot is written with the pause. Red where `Composer.paused` writes its row without the flag."""
    undone.clear()
    scene = Scene(rejects_at_once, Order())
    for _ in range(3):
        row = await scene.run()
        assert (row.state, row.paused_reason) == ("paused", "rejected after the pivot: too late")
        assert row.pivoted
        scene.machine.journal.resume(scene.id)
    assert undone == []


async def test_a_cancel_while_a_bug_after_the_pivot_is_mended_is_only_recorded() -> None:
    """Red where `Composer.paused` writes the pivot's row without the flag."""
    undone.clear()
    Bug.is_there = True
    scene = Scene(breaks_at_once, Order())
    assert (await scene.run()).state == "paused"
    Bug.is_there = False
    scene.machine.journal.cancel(scene.id, "changed my mind")
    scene.machine.journal.resume(scene.id)
    assert (await scene.run()).state == "completed"
    assert undone == []


async def test_a_command_that_fails_after_the_pivot_pauses_for_good() -> None:
    """A poison command is answered `unknown`. Red where `Calls.expire` leaves such an answer to be journalled."""
    undone.clear()
    scene = Scene(commands_after, Order())
    scene.ends("do stock.reserve#1", Unwritable(path="stock.reserve#1", problem="a bug"))
    for _ in range(3):
        row = await scene.run()
        assert row.state == "paused"
        assert "stock.reserve#1 is unknown after the pivot: cannot be written: a bug" in (row.paused_reason or "")
        scene.machine.journal.resume(scene.id)
    assert undone == []


@step(at_most_once=True)
async def wire(ctx: StepContext[Any], order: Order) -> str:
    return "wired"


@saga("wires_after", deadline=3600)
async def wires_after(run: Run, order: Order) -> str:
    await run.pivot()
    return await run(wire(order))


async def test_at_most_once_holds_beyond_a_resume() -> None:
    """Only a person's result ends it. Red where `Calls.claimed` begins its attempts anew, like those of other steps."""
    scene = Scene(wires_after, Order())
    scene.ends("wire#1", uncertain("wire#1"))
    for told in ("connection lost", "called once at most: connection lost; say what it has brought"):
        row = await scene.run()
        assert row.state == "paused"
        assert told in (row.paused_reason or "")
        scene.machine.journal.resume(scene.id)
    assert scene.service.calls == ["step wire#1"]


async def test_a_reply_does_not_end_a_call_that_is_no_command() -> None:
    """Whoever writes to the topic of replies could say so. Red where `Ledger.take_replies` looks at the path only."""

    @saga("calls", deadline=3600)
    async def calls(run: Run, order: Order) -> str:
        return await run(charge(order))

    scene = Scene(calls, Order(), started=True)
    payload: Any = '{"outcome": "rejected", "error": "by a stranger"}'
    scene.machine.journal.tell(scene.id, "reply", "charge#1", payload, scene.machine.now)
    assert (await scene.run()).state == "completed"
