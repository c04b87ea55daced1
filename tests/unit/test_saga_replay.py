"""A body that is run again over its journal: it comes by the same way, or its instance pauses and nothing happens."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from saga import Rejected, Run, Saga, Signal, StepContext, remote, saga, step
from saga.decider import Execution
from saga.state import Checkpoint, Claimed, Decision
from saga.testing.faults import Turn
from tests.support.saga_lab import EPOCH, Scene, rejected


class Order(BaseModel):
    amount: int = 1


class Approval(Signal):
    approved: bool


closed: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_closed_yet() -> None:
    closed.clear()


@step
async def a(ctx: StepContext[Any], amount: int) -> int:
    return amount


@step
async def b(ctx: StepContext[Any], amount: int) -> int:
    return amount


@a.compensation
async def undo_a(ctx: StepContext[Any], done: object, amount: int) -> None: ...


@b.compensation
async def undo_b(ctx: StepContext[Any], done: object, amount: int) -> None: ...


class Reserved(BaseModel):
    shelf: str


reserve = remote("stock.reserve", Order, Reserved, timeout=30)

Body = Callable[[Run, Order], Awaitable[int]]


def declared(body: Body) -> Saga[Order, int]:
    return saga("changing", deadline=timedelta(hours=1))(body)


async def interrupted(before: Body, after: Body, at: str, *, amount: int = 1) -> Scene:
    """Run a body until its worker crashes at a site, then go on with another one."""
    old, new = declared(before), declared(after)
    scene = Scene(old, Order(amount=amount), {at: "crash before" if at.startswith("step") else "crash after"})
    scene.machine.at(EPOCH + timedelta(seconds=1), lambda: scene.machine.serve([new]))
    await scene.run()
    return scene


# ------------------------------------------------------------------------------------------------ divergence


async def sequence(run: Run, order: Order) -> int:
    return await run(a(1)) + await run(b(2)) + await run(a(3))


async def flipped(run: Run, order: Order) -> int:
    return await run(b(2)) + await run(a(1)) + await run(a(3))


async def other_input(run: Run, order: Order) -> int:
    return await run(a(10)) + await run(b(2)) + await run(a(3))


async def other_name(run: Run, order: Order) -> int:
    return await run(a(1)) + await run(a(2)) + await run(a(3))


async def shortened(run: Run, order: Order) -> int:
    return await run(a(1))


async def inserted(run: Run, order: Order) -> int:
    await run.sleep(1)
    return await sequence(run, order)


async def in_parallel(run: Run, order: Order) -> int:
    return sum(await run.parallel(a(1), b(2)))


async def longer(run: Run, order: Order) -> int:
    return await run(a(1)) + await run(b(2)) + await run(a(3)) + await run(b(4))


@pytest.mark.parametrize(
    ("after", "path"),
    [
        (flipped, "a#1"),
        (other_input, "a#1"),
        (other_name, "b#1"),
        (shortened, "b#1"),
        (inserted, "a#1"),
        (in_parallel, "a#1"),
    ],
)
async def test_other_code_over_a_journal_pauses_and_executes_nothing(after: Body, path: str) -> None:
    """H21. Red where `Forward._check_order` compares no path and no digest, or `_check_end` lets leftovers pass."""
    scene = await interrupted(sequence, after, "write running (3)")
    assert scene.row.state == "paused"
    assert (scene.row.paused_reason or "").startswith(f"diverged at {path}:")
    assert scene.journal == [("a#1", "completed"), ("b#1", "completed")]
    assert scene.service.calls == ["step a#1", "step b#1"]


@pytest.mark.parametrize("after", [flipped, other_input, inserted, in_parallel])
async def test_other_code_over_an_open_intent_pauses(after: Body) -> None:
    """H21, H1. Red where `Forward._check_intents` is not called: what may be happening would be forgotten."""
    scene = await interrupted(sequence, after, "step a#1 (1)")
    assert scene.row.state == "paused"
    assert "diverged at a#1" in (scene.row.paused_reason or "")
    assert scene.service.calls == []


async def test_an_open_intent_at_the_end_of_other_code_pauses() -> None:
    async def nothing(run: Run, order: Order) -> int:
        return 0

    scene = await interrupted(sequence, nothing, "step a#1 (1)")
    assert (scene.row.state, scene.service.calls) == ("paused", [])


async def test_an_if_that_flips_pauses() -> None:
    """H21."""

    async def before(run: Run, order: Order) -> int:
        return await run(a(1)) if order.amount > 0 else await run(b(1))

    async def after(run: Run, order: Order) -> int:
        return await run(a(1)) if order.amount > 100 else await run(b(1))

    scene = await interrupted(before, after, "step a#1 (1)")
    assert scene.row.state == "paused"


async def test_a_loop_that_is_reordered_pauses() -> None:
    """H21."""

    async def before(run: Run, order: Order) -> int:
        return sum([await run(a(n)) for n in (1, 2, 3)])

    async def after(run: Run, order: Order) -> int:
        return sum([await run(a(n)) for n in (3, 2, 1)])

    scene = await interrupted(before, after, "write running (2)")
    assert "diverged at a#1" in (scene.row.paused_reason or "")


async def test_new_steps_may_follow_once_all_that_is_journalled_was_consumed() -> None:
    scene = await interrupted(sequence, longer, "write running (3)")
    assert (scene.row.state, scene.row.output) == ("completed", "10")


async def test_a_paused_divergence_goes_on_with_the_code_that_fits() -> None:
    scene = await interrupted(sequence, flipped, "write running (3)")
    scene.machine.serve([declared(sequence)])
    scene.machine.journal.resume(scene.id)
    row = await scene.run()
    assert (row.state, row.output) == ("completed", "6")


async def test_a_cancel_undoes_also_where_the_code_has_diverged() -> None:
    """H1: an intent, then a cancel or a hotfix before recovery. The body is not asked."""
    old, new = declared(sequence), declared(flipped)
    scene = Scene(old, Order(), {"step b#1 (1)": "crash after"})
    scene.machine.at(EPOCH + timedelta(seconds=1), lambda: scene.machine.serve([new]))
    scene.machine.at(EPOCH + timedelta(seconds=2), lambda: scene.machine.journal.cancel(scene.id, "changed my mind"))
    row = await scene.run()
    assert row.state == "cancelled"
    assert scene.plan == [("b#1", "completed"), ("a#1", "completed")]
    assert scene.journal == [("a#1", "completed"), ("b#1", "unknown")]
    assert scene.left() == []


# ------------------------------------------------------------------------------------------------ foreign things


async def sleeps(run: Run, order: Order) -> int:
    await run(a(1))
    await asyncio.sleep(0)
    return await run(b(2))


async def really_sleeps(run: Run, order: Order) -> int:
    await run(a(1))
    await asyncio.sleep(0.01)
    return await run(b(2))


async def gathers(run: Run, order: Order) -> int:
    await run(a(1))
    calls = [run(b(2)), run(b(3))]
    try:
        return sum(await asyncio.gather(*calls))
    finally:
        for call in calls:
            call.close()


async def limits_time(run: Run, order: Order) -> int:
    await run(a(1))
    async with asyncio.timeout(5):
        return await run(b(2))


@pytest.mark.parametrize("body", [sleeps, really_sleeps, gathers, limits_time])
async def test_a_body_that_awaits_something_foreign_pauses(body: Body) -> None:
    """H49. Red where `Body._read` takes whatever is yielded, or the body sees the event loop."""
    scene = Scene(declared(body), Order())
    row = await scene.run()
    assert row.state == "paused"
    assert re.search("no operation of its run|no running event loop", row.paused_reason or ""), row.paused_reason
    assert scene.journal == [("a#1", "completed")]
    assert scene.service.calls == ["step a#1"]


async def test_an_operation_of_another_run_is_foreign() -> None:
    others: list[Run] = []

    async def lends(run: Run, order: Order) -> int:
        others.append(run)
        if len(others) > 1:
            return await others[0](a(1))
        return await run(b(2))

    first = Scene(declared(lends), Order())
    await first.run()
    second = Scene(declared(lends), Order())
    row = await second.run()
    assert (row.state, second.service.calls) == ("paused", [])


# ------------------------------------------------------------------------------------------------ closing


@asynccontextmanager
async def borrowed(run: Run) -> AsyncIterator[None]:
    try:
        yield
    finally:
        closed.append("finally")
        await run(b(99))
        closed.append("executed")


async def stubborn(run: Run, order: Order) -> int:
    await run(a(1))
    async with borrowed(run):
        await run.sleep(100)
    return 1


async def more_stubborn(run: Run, order: Order) -> int:
    await run(a(1))
    for _ in range(3):
        with suppress(BaseException):
            await run.sleep(100)
        with suppress(BaseException):
            await asyncio.sleep(0)
    return 1


@pytest.mark.parametrize("body", [stubborn, more_stubborn])
async def test_a_closed_body_executes_nothing(body: Body) -> None:
    """H49. Red where `Run._require_driven` lets a call pass, or `Body.close` gives up after one try."""
    scene = Scene(declared(body), Order())
    moment = EPOCH + timedelta(seconds=5)
    scene.machine.at(moment, lambda: scene.machine.journal.cancel(scene.id, "stop"))
    row = await scene.run()
    assert (row.state, scene.left()) == ("cancelled", [])
    assert not any("b#" in call for call in scene.service.calls)
    assert "executed" not in closed


async def test_a_body_that_is_closed_while_it_waits_for_a_step_executes_nothing() -> None:
    """H49, within one claim: the step is rejected for good, and the body's `finally` asks for another one."""

    async def tidy(run: Run, order: Order) -> int:
        try:
            await run(a(1))
            return await run(b(2))
        finally:
            closed.append("finally")
            await run(a(3))

    scene = Scene(declared(tidy), Order())
    scene.landed("b#1")
    scene.ends("b#1", rejected("b#1"))
    row = await scene.run()
    assert (row.state, scene.left()) == ("failed", [])
    assert "finally" in closed
    assert "step a#2" not in scene.service.calls


# ------------------------------------------------------------------------------------------------ property


async def branching(run: Run, order: Order) -> int:
    total = 0
    for n in range(order.amount % 3):
        total += await run(a(n))
    if order.amount % 2:
        one, other = await run.parallel(a(total), b(total))
        total += one + other
    try:
        total += len((await run(reserve(Order(amount=total)))).shelf)
    except Rejected:
        total += 100
    approval = await run.receive(Approval, timeout=50)
    await run.sleep(5)
    if approval is None:
        raise Rejected("nobody")
    if order.amount > 6:
        await run.pivot()
    return total + await run(b(int(run.random() * 1000)))


SITES = (
    "write running (1)",
    "write running (2)",
    "write running (3)",
    "write waiting (1)",
    "write waiting (2)",
    "write compensating (1)",
    "write completed (1)",
    "step a#1 (1)",
    "step b#1 (1)",
    "step parallel#1[0]/a#1 (1)",
    "do command stock.reserve#1 (1)",
    "undo a#1 (1)",
)
TURNS: tuple[Turn, ...] = ("crash before", "crash after", "rejects", "cancel", "times out, landed", "answer lost")


class Recording(Scene):
    """Remembers every claim with what was decided at once, and what a second look at the same journal decides."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.pairs: list[tuple[Checkpoint | None, Checkpoint | None]] = []
        claim = self.machine.journal.claim

        def compared(instance_id: Any, owner: str) -> Claimed | None:
            claimed = claim(instance_id, owner)
            if claimed is not None:
                first, second = (Execution(self.saga, claimed).begin(self.machine.now) for _ in range(2))
                self.pairs.append((first.checkpoint, second.checkpoint))
                assert [w.path for w in first.start] == [w.path for w in second.start]
            return claimed

        self.machine.journal.claim = compared  # type: ignore[method-assign]


@given(
    amount=st.integers(0, 9),
    turns=st.dictionaries(st.sampled_from(SITES), st.sampled_from(TURNS), max_size=3),
    approves=st.booleans(),
)
def test_whatever_happens_it_ends_once_and_all_is_accounted_for(
    amount: int,
    turns: dict[str, Turn],
    approves: bool,  # noqa: FBT001 - hypothesis passes by name
) -> None:
    scene = Recording(declared(branching), Order(amount=amount), turns)
    if approves:
        moment = EPOCH + timedelta(seconds=20)
        tell = scene.machine.journal.tell
        scene.machine.at(moment, lambda: tell(scene.id, "signal", "Approval", '{"approved": true}', moment))
    row = asyncio.run(scene.run())
    ended = row.state in ("completed", "failed", "cancelled")
    assert ended or (row.state == "paused" and row.pivoted), (row.paused_reason, scene.machine.log)
    assert all(first == second for first, second in scene.pairs)
    if row.state in ("failed", "cancelled"):
        assert scene.left() == [], scene.machine.log
    elif row.state == "completed":
        assert scene.plan == []


@given(amount=st.integers(0, 9), rejects=st.booleans(), cut=st.integers(0, 20))
def test_a_replay_of_any_prefix_of_a_journal_decides_what_was_decided_then(
    amount: int,
    rejects: bool,  # noqa: FBT001 - hypothesis passes by name
    cut: int,
) -> None:
    """The live body, kept between steps, and a body that is run again over the journal are the same."""
    plain = Scene(
        declared(branching), Order(amount=amount), {"do command stock.reserve#1 (1)": "rejects"} if rejects else {}
    )
    tell = plain.machine.journal.tell
    plain.machine.at(
        EPOCH + timedelta(seconds=20),
        lambda: tell(plain.id, "signal", "Approval", '{"approved": true}', plain.machine.now),
    )
    asyncio.run(plain.run())
    writes = plain.machine.checkpoints
    upto = min(cut, len(writes) - 1)
    live = writes[upto]
    applied = _after(plain, writes[:upto], live)
    again = Execution(plain.saga, applied).begin(live.at)
    expected = [task.path for task in live.rows], [i.path for i in live.next], live.state
    works = {work.path for work in again.start}
    if works:  # the call whose result the live checkpoint holds is under way here, and is the same one
        assert works >= {task.path for task in live.rows if task.kind == "step"}
    else:
        assert _shape(again) == expected


def _after(scene: Scene, written: list[Checkpoint], live: Checkpoint) -> Claimed:
    """A claim of the journal as it was after these checkpoints."""
    copy = Scene(scene.saga, Order())
    row = copy.row
    row.request, row.id = scene.row.request, scene.id
    copy.machine.journal.rows[scene.id] = row
    for checkpoint in written:
        row.wakeups, row.epoch = checkpoint.seen, checkpoint.epoch
        assert copy.machine.journal.write(checkpoint).kind == "applied"
    row.is_ready, row.epoch, row.wakeups = True, 0, live.seen
    row.mail = [mail for mail in scene.row.mail if mail.no <= live.seen]
    claimed = copy.machine.journal.claim(scene.id, "another")
    assert claimed is not None
    return claimed


def _shape(decision: Decision) -> tuple[list[str], list[str], str]:
    checkpoint = decision.checkpoint
    assert checkpoint is not None
    return [task.path for task in checkpoint.rows], [i.path for i in checkpoint.next], checkpoint.state
