"""What happens next: each rule of the decider, on sagas of a few steps in memory."""

from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from pydantic import BaseModel

from saga import NotDone, Rejected, Retry, Run, Signal, StepContext, Unknown, remote, saga, step
from saga.decider import Execution
from saga.state import Answer, Claimed, Completed, Intent, Late, Mailbox, step_key
from saga.testing.faults import Turn
from tests.support.saga_lab import EPOCH, Scene, rejected, uncertain


class Order(BaseModel):
    sku: str = "x"
    amount: int = 1


class Reserved(BaseModel):
    shelf: str


class Approval(Signal):
    approved: bool


undone: list[tuple[str, object]] = []


@pytest.fixture(autouse=True)
def _nothing_undone_yet() -> None:
    undone.clear()
    asked.clear()


@step(timeout=10)
async def charge(ctx: StepContext[Any], order: Order) -> str:
    return f"paid {order.amount}"


@charge.compensation
async def refund(ctx: StepContext[Any], done: str | Unknown, order: Order) -> None:
    undone.append(("charge", done))


@step
async def ship(ctx: StepContext[Any], order: Order, *, to: str = "home") -> str:
    return to


@ship.compensation(retry=Retry(3, initial=0.1))
async def recall(ctx: StepContext[Any], done: str | Unknown, order: Order, *, to: str = "home") -> None:
    undone.append(("ship", done))


@step
async def look_up(ctx: StepContext[Any], order: Order) -> int:
    return 7


reserve = remote("stock.reserve", Order, Reserved, timeout=30)


@saga("two", deadline=timedelta(hours=1))
async def two(run: Run, order: Order) -> str:
    paid = await run(charge(order))
    await run(look_up(order))
    shipped = await run(ship(order, to="work"))
    return f"{paid}, {shipped}"


# ------------------------------------------------------------------------------------------------ forward


async def test_a_saga_completes_with_one_checkpoint_a_step_and_one_for_its_first_intent() -> None:
    scene = Scene(two, Order())
    row = await scene.run()
    assert (row.state, row.output) == ("completed", '"paid 1, work"')
    assert scene.journal == [("charge#1", "completed"), ("look_up#1", "completed"), ("ship#1", "completed")]
    assert [c.state for c in scene.machine.checkpoints] == ["running", "running", "running", "completed"]
    assert [[i.path for i in c.next] for c in scene.machine.checkpoints] == [
        ["charge#1"],
        ["look_up#1"],
        ["ship#1"],
        [],
    ]
    assert row.intents is None
    assert scene.service.calls == ["step charge#1", "step look_up#1", "step ship#1"]


async def test_a_rejection_undoes_in_reverse_what_has_a_compensation() -> None:
    scene = Scene(two, Order())
    scene.ends("ship#1", rejected("ship#1", "no van"))
    row = await scene.run()
    assert (row.state, row.error) == ("failed", "no van")
    assert scene.plan == [("charge#1", "completed")]
    assert undone == [("charge", "paid 1")]
    assert scene.left() == ["look_up#1"]


async def test_a_saga_that_did_nothing_fails_at_once() -> None:
    scene = Scene(two, Order())
    scene.ends("charge#1", rejected("charge#1"))
    row = await scene.run()
    assert (row.state, scene.plan, row.no) == ("failed", [], 2)


async def test_an_uncertain_attempt_is_tried_again_under_the_same_key() -> None:
    scene = Scene(two, Order())
    scene.ends("charge#1", uncertain("charge#1"), uncertain("charge#1"))
    row = await scene.run()
    assert row.state == "completed"
    assert row.tasks[0].attempts == 3
    assert scene.service.calls.count("step charge#1") == 3


@saga("impatient", deadline=3600)
async def impatient(run: Run, order: Order) -> None:
    await run(look_up(order))
    await run(slow(order))


@step(retry=Retry(3, initial=100, maximum=100))
async def slow(ctx: StepContext[Any], order: Order) -> None: ...


async def test_a_long_backoff_is_written_down_and_the_instance_let_go() -> None:
    scene = Scene(impatient, Order())
    scene.ends("slow#1", uncertain("slow#1"))
    row = await scene.run()
    assert row.state == "completed"
    waiting = next(c for c in scene.machine.checkpoints if c.state == "waiting")
    assert not waiting.held
    assert [(i.attempts, i.tainted, i.flying) for i in waiting.open] == [(1, True, False)]
    assert waiting.wake_at is not None
    assert timedelta(seconds=50) <= waiting.wake_at - EPOCH <= timedelta(seconds=100)


async def test_attempts_of_a_backoff_survive_a_crash() -> None:
    scene = Scene(impatient, Order())
    scene.ends("slow#1", *[uncertain("slow#1")] * 3)
    row = await scene.run()
    assert (row.state, row.error) == ("failed", "slow#1 is unknown: connection lost")
    assert scene.service.calls.count("step slow#1") == 3


async def test_retries_used_up_make_the_outcome_unknown_and_it_is_undone_after_it_settled() -> None:
    scene = Scene(two, Order())
    scene.ends("charge#1", *[uncertain("charge#1")] * 5)
    row = await scene.run()
    assert row.state == "failed"
    assert scene.journal == [("charge#1", "unknown")]
    (_, done), *rest = undone
    assert (isinstance(done, Unknown), rest) == (True, [])
    compensating = next(c for c in scene.machine.checkpoints if c.state == "compensating")
    assert compensating.wake_at is not None
    assert compensating.wake_at - compensating.at == timedelta(seconds=25), "timeout 10 s and lease margin 15 s"


async def test_a_step_that_was_tried_again_is_undone_once_no_call_of_it_can_land() -> None:
    """Found by `explore`: a first attempt that lands after the undo. Red where only unknown steps settle."""
    scene = Scene(two, Order())
    scene.ends("charge#1", uncertain("charge#1"))
    scene.ends("ship#1", rejected("ship#1"))
    row = await scene.run()
    assert (row.state, undone) == ("failed", [("charge", "paid 1")])
    charged = row.tasks[0].completed_at
    assert scene.machine.now - charged == timedelta(seconds=25)


# ------------------------------------------------------------------------------------------------ unclean rejections


async def test_a_rejection_after_an_attempt_that_may_have_landed_is_unknown() -> None:
    """H31. Red where `Calls.told` takes `Refused` for clean whatever came before it."""
    scene = Scene(two, Order())
    scene.landed("charge#1")
    scene.ends("charge#1", rejected("charge#1", "already charged"))
    row = await scene.run()
    assert row.state == "failed"
    assert scene.journal == [("charge#1", "unknown")]
    assert [type(done) for _, done in undone] == [Unknown]
    assert scene.left() == []


@pytest.mark.parametrize("turn", ["crash before", "crash after"])
async def test_a_rejection_after_a_crash_is_unknown(turn: Turn) -> None:
    """H31. Red where `Calls.claimed` does not taint what a claim finds open."""
    scene = Scene(two, Order(), {"step charge#1 (1)": turn})
    scene.ends("charge#1", *([rejected("charge#1")] if turn == "crash before" else []))
    if turn == "crash after":
        scene.machine.at(EPOCH + timedelta(seconds=1), lambda: scene.ends("charge#1", rejected("charge#1")))
    row = await scene.run()
    assert row.state == "failed"
    assert scene.journal == [("charge#1", "unknown")]
    assert scene.left() == []


async def test_a_crash_between_intent_and_result_tries_again() -> None:
    scene = Scene(two, Order(), {"step ship#1 (1)": "crash after"})
    row = await scene.run()
    assert row.state == "completed"
    assert [(t.path, t.attempts) for t in row.tasks] == [("charge#1", 1), ("look_up#1", 1), ("ship#1", 2)]
    assert scene.service.calls.count("step charge#1") == 1, "a result in the journal is not asked for again"


@step(at_most_once=True, timeout=1)
async def once(ctx: StepContext[Any], order: Order) -> str:
    return "once"


@once.compensation
async def undo_once(ctx: StepContext[Any], done: str | Unknown, order: Order) -> None:
    undone.append(("once", done))


@saga("at_most", deadline=3600)
async def at_most(run: Run, order: Order) -> str:
    return await run(once(order))


async def test_at_most_once_is_not_tried_again_after_a_crash() -> None:
    scene = Scene(at_most, Order(), {"step once#1 (1)": "crash after"})
    row = await scene.run()
    assert (row.state, scene.service.calls.count("step once#1")) == ("failed", 1)
    assert scene.left() == []


async def test_a_first_intent_that_nobody_acted_upon_is_not_unknown() -> None:
    """The first intent of a start counts only once somebody had the instance. Red without `Calls._untouched`."""
    scene = Scene(two, Order(), started=True)
    scene.machine.journal.cancel(scene.id, "at once")
    row = await scene.run()
    assert (row.state, scene.journal, scene.service.calls) == ("cancelled", [], [])


async def test_a_start_that_drove_the_body_saves_a_checkpoint() -> None:
    scene = Scene(two, Order(), started=True)
    row = await scene.run()
    assert (row.state, row.no) == ("completed", 3)
    assert row.tasks[0].attempts == 1


# ------------------------------------------------------------------------------------------------ what was asked for


def held(one: Any, *intents: Intent) -> Execution:
    """An instance that a worker has just got, before anything of it."""
    claimed = Claimed(
        id=UUID(int=1),
        epoch=1,
        checkpoint_no=0,
        fresh=True,
        state="running",
        started_at=EPOCH,
        deadline_at=EPOCH + timedelta(hours=1),
        request=one.request.encode(Order()),
        intents=intents,
        mailbox=Mailbox(wakeups=0),
    )
    return Execution(one, claimed)


@saga("forked", deadline=timedelta(hours=1))
async def forked(run: Run, order: Order) -> str:
    paid, found = await run.parallel(charge(order), look_up(order))
    return f"{paid} {found}"


def test_what_was_asked_for_starts_once_its_intents_are_written() -> None:
    execution = held(forked)
    asked_for = execution.begin(EPOCH)
    assert asked_for.start == (), "nothing happens before its intent is written"
    assert asked_for.checkpoint is not None
    begun = execution.answered(Answer(kind="applied"), EPOCH)
    assert [work.path for work in begun.start] == ["parallel#1[0]/charge#1", "parallel#1[1]/look_up#1"]


def test_past_the_deadline_what_was_asked_for_is_not_begun() -> None:
    """Red where `_applied` starts what follows without a look at the deadline."""
    execution = held(two)
    execution.begin(EPOCH)
    decision = execution.answered(Answer(kind="applied"), EPOCH + timedelta(hours=2))
    assert decision.start == ()
    assert decision.checkpoint is not None
    assert decision.checkpoint.ending == "failed"


@saga("grown", deadline=timedelta(hours=1))
async def grown(run: Run, order: Order) -> str:
    done, found = await run.parallel(once(order), look_up(order))
    return f"{done} {found}"


def test_what_was_heard_while_intents_were_written_is_decided_upon_first() -> None:
    """A branch that was added to the code is being written down while the one that was there before becomes unknown.

    Red where `_applied` starts what follows although something was heard (`_has_heard`).
    """
    text, digest = once.arguments.recognise({"order": Order()})
    there = Intent(path="parallel#1[0]/once#1", name="once", kind="step", digest=digest, input=text, flying=False)
    execution = held(grown, there)
    asked_for = execution.begin(EPOCH)
    assert [work.path for work in asked_for.start] == [there.path]
    assert asked_for.checkpoint is not None
    execution.fact(uncertain(there.path), EPOCH)
    decision = execution.answered(Answer(kind="applied"), EPOCH)
    assert decision.start == ()
    assert decision.checkpoint is not None
    assert decision.checkpoint.ending == "failed"


# ------------------------------------------------------------------------------------------------ bodies


@saga("catching", deadline=3600)
async def catching(run: Run, order: Order) -> str:
    try:
        await run(charge(order))
    except Rejected as no:
        return f"without: {no}"
    return "with"


async def test_a_body_may_catch_a_clean_rejection_also_after_a_crash() -> None:
    scene = Scene(catching, Order(), {"write completed (1)": "crash after"})
    scene.ends("charge#1", rejected("charge#1", "empty"))
    row = await scene.run()
    assert (row.state, row.output) == ("completed", '"without: empty"')


broken: list[Exception] = []


@saga("buggy", deadline=3600)
async def buggy(run: Run, order: Order) -> str:
    paid = await run(charge(order))
    if broken:
        raise broken[0]
    return paid


async def test_a_bug_pauses_with_the_result_and_undoes_nothing() -> None:
    broken.append(KeyError("sku"))
    scene = Scene(buggy, Order())
    row = await scene.run()
    assert (row.state, row.paused_reason) == ("paused", "KeyError: 'sku'")
    assert scene.journal == [("charge#1", "completed")]
    assert (undone, scene.service.calls) == ([], ["step charge#1"])
    broken.clear()
    scene.machine.journal.resume(scene.id)
    assert (await scene.run()).state == "completed"
    assert scene.service.calls == ["step charge#1"]


async def test_an_input_that_is_not_of_its_type_pauses() -> None:
    @saga("wrong", deadline=3600)
    async def wrong(run: Run, order: Order) -> str:
        return await run(charge("x"))  # type: ignore[arg-type]

    row = await Scene(wrong, Order()).run()
    assert row.state == "paused"
    assert "cannot be written as JSON" in (row.paused_reason or "")


async def test_a_result_that_is_not_of_its_type_pauses_and_stays_open() -> None:
    @step
    async def wrong(ctx: StepContext[Any], order: Order) -> int:
        return "no number"  # type: ignore[return-value]

    @saga("wrong_result", deadline=3600)
    async def wrong_result(run: Run, order: Order) -> int:
        return await run(wrong(order))

    row = await Scene(wrong_result, Order()).run()
    assert row.state == "paused"
    assert "its result cannot be written" in (row.paused_reason or "")
    assert '"path":"wrong#1"' in (row.intents or "")


# ------------------------------------------------------------------------------------------------ time and signals


@saga("approved", deadline=timedelta(hours=48))
async def approved(run: Run, order: Order) -> str:
    await run(charge(order))
    approval = await run.receive(Approval, timeout=timedelta(hours=24))
    if approval is None:
        raise Rejected("nobody answered")
    await run.sleep(60)
    return f"{approval.approved} at {(run.now() - EPOCH).total_seconds():g}"


async def test_a_signal_is_received_and_time_passes() -> None:
    scene = Scene(approved, Order())
    tell = scene.machine.journal.tell
    moment = EPOCH + timedelta(seconds=100)
    scene.machine.at(moment, lambda: tell(scene.id, "signal", "Approval", '{"approved": true}', moment))
    row = await scene.run()
    assert (row.state, row.output) == ("completed", '"True at 160"')
    assert [c.held for c in scene.machine.checkpoints if c.state == "waiting"] == [False, False]


async def test_a_signal_that_came_before_is_received_too() -> None:
    scene = Scene(approved, Order())
    scene.machine.journal.tell(scene.id, "signal", "Approval", '{"approved": false}', EPOCH)
    assert (await scene.run()).output == '"False at 60"'


async def test_nobody_answers() -> None:
    scene = Scene(approved, Order())
    row = await scene.run()
    assert (row.state, row.error) == ("failed", "nobody answered")
    assert scene.left() == []


async def test_a_signal_that_races_the_timeout_is_received() -> None:
    """A decision by absence is strict: beside news it is not written, but made again. Red without `strict`."""
    scene = Scene(approved, Order())
    write = scene.machine.journal.write

    def late(checkpoint: Any) -> Any:
        if any(task.path == "Approval#1" for task in checkpoint.rows) and not scene.row.mail:
            scene.machine.journal.tell(scene.id, "signal", "Approval", '{"approved": true}', scene.machine.now)
        return write(checkpoint)

    scene.machine.journal.write = late  # type: ignore[method-assign]
    row = await scene.run()
    assert (row.state, row.output) == ("completed", '"True at 86460"')


async def test_past_its_deadline_it_is_undone() -> None:
    @saga("late", deadline=50)
    async def late(run: Run, order: Order) -> None:
        await run(charge(order))
        await run.sleep(1000)

    scene = Scene(late, Order())
    row = await scene.run()
    assert (row.state, row.error, scene.left()) == ("failed", "past its deadline", [])
    assert scene.machine.now == EPOCH + timedelta(seconds=50)


async def test_a_replay_sees_the_same_time_and_chance() -> None:
    seen: list[object] = []

    @saga("looking", deadline=3600)
    async def looking(run: Run, order: Order) -> None:
        seen.append((run.now(), run.random(), run.uuid()))
        await run(charge(order))
        seen.append((run.now(), run.random(), run.uuid()))
        await run.sleep(5)
        seen.append((run.now(), run.random(), run.uuid()))

    scene = Scene(looking, Order())
    await scene.run()
    assert len(seen) > 3, "it was run again after the sleep"
    assert len(set(seen)) == 3


# ------------------------------------------------------------------------------------------------ cancel and pivot


async def test_a_cancel_closes_the_body_and_undoes() -> None:
    scene = Scene(two, Order(), {"write running (3)": "cancel"})
    row = await scene.run()
    assert (row.state, row.error) == ("cancelled", "cancelled by a test")
    assert scene.plan == [("charge#1", "completed")]
    assert "step ship#1" not in scene.service.calls


async def test_a_cancel_that_races_completion_wins_if_it_was_first() -> None:
    scene = Scene(two, Order(), {"write completed (1)": "cancel"})
    row = await scene.run()
    assert row.state == "cancelled"
    assert scene.left() == ["look_up#1"]
    assert scene.plan == [("ship#1", "completed"), ("charge#1", "completed")]


@saga("pivoting", deadline=3600)
async def pivoting(run: Run, order: Order) -> str:
    await run(charge(order))
    await run.pivot()
    await run(ship(order))
    if order.amount > 1:
        raise Rejected("too late")
    await run.sleep(10_000)
    return "done"


@pytest.mark.parametrize("site", ["write waiting (1)", "write completed (1)"])
async def test_a_cancel_or_a_deadline_after_the_pivot_is_only_recorded(site: str) -> None:
    """H44. Red where `_interrupted` forgets the pivot; the deadline passes during the sleep."""
    scene = Scene(pivoting, Order(), {site: "cancel"})
    row = await scene.run()
    assert (row.state, row.cancel_reason) == ("completed", "cancelled by a test")
    assert undone == []


async def test_a_cancel_that_is_there_before_the_pivot_is_written_wins() -> None:
    scene = Scene(pivoting, Order(), {"write running (2)": "cancel"})
    row = await scene.run()
    assert (row.state, row.pivoted, scene.left()) == ("cancelled", False, [])
    assert scene.journal == [("charge#1", "completed")]


async def test_a_cancel_during_compensation_is_only_recorded() -> None:
    """H44. Red where `_decide_back` looks at a cancel."""
    scene = Scene(two, Order(), {"write compensating (1)": "cancel", "write failed (1)": "cancel"})
    scene.ends("ship#1", rejected("ship#1", "no van"))
    row = await scene.run()
    assert row.state in ("failed", "cancelled")
    assert (row.error, scene.left()) == ("no van", ["look_up#1"])
    assert len(scene.machine.checkpoints) < 10


async def test_rejected_after_the_pivot_pauses() -> None:
    scene = Scene(pivoting, Order(amount=2))
    row = await scene.run()
    assert (row.state, row.paused_reason) == ("paused", "rejected after the pivot: too late")
    assert undone == []


async def test_unknown_after_the_pivot_pauses_and_is_tried_again_when_resumed() -> None:
    scene = Scene(pivoting, Order())
    scene.ends("ship#1", *[uncertain("ship#1")] * 5)
    row = await scene.run()
    assert row.state == "paused"
    assert "unknown after the pivot" in (row.paused_reason or "")
    scene.machine.journal.resume(scene.id)
    assert (await scene.run()).state == "completed"


# ------------------------------------------------------------------------------------------------ parallel


@saga("both", deadline=3600)
async def both(run: Run, order: Order) -> str:
    await run(look_up(order))
    paid, shipped, seven = await run.parallel(charge(order), ship(order), look_up(order))
    return f"{paid} {shipped} {seven}"


async def test_parallel_starts_all_at_once_and_answers_in_order() -> None:
    scene = Scene(both, Order())
    row = await scene.run()
    assert row.output == '"paid 1 home 7"'
    first = scene.machine.checkpoints[1]
    assert [i.path for i in first.next] == [
        "parallel#1[0]/charge#1",
        "parallel#1[1]/ship#1",
        "parallel#1[2]/look_up#1",
    ]


async def test_one_branch_is_rejected_while_another_is_in_flight() -> None:
    """H30. Red where the plan is made before the branches in flight have ended."""
    scene = Scene(both, Order())
    scene.ends("parallel#1[0]/charge#1", rejected("parallel#1[0]/charge#1", "empty"))
    row = await scene.run()
    assert (row.state, row.error) == ("failed", "empty")
    assert scene.plan == [("parallel#1[1]/ship#1", "completed")]
    assert scene.left() == ["look_up#1", "parallel#1[2]/look_up#1"]


@saga("doomed", deadline=3600)
async def doomed(run: Run, order: Order) -> None:
    await run.parallel(once(order), ship(order))


async def test_one_branch_is_unknown_while_another_is_in_flight() -> None:
    """H30. Red where `_wait` goes back without waiting for what is in flight."""
    scene = Scene(doomed, Order())
    scene.ends("parallel#1[0]/once#1", uncertain("parallel#1[0]/once#1"))
    row = await scene.run()
    assert row.state == "failed"
    assert scene.journal == [("parallel#1[0]/once#1", "unknown"), ("parallel#1[1]/ship#1", "completed")]
    assert scene.plan == [("parallel#1[1]/ship#1", "completed"), ("parallel#1[0]/once#1", "completed")]


@saga("pair", deadline=3600)
async def pair(run: Run, order: Order) -> None:
    await run.parallel(charge(order), ship(order))


async def test_an_attempt_that_ends_while_a_checkpoint_is_written_stays_known() -> None:
    """H31, found by the model: a branch times out and has landed, and the answer to a checkpoint comes after that.

    Red where `Ledger.written` takes the intents as the checkpoint has them: the next rejection would be clean.
    """
    execution = Execution(
        pair,
        Claimed(
            id=uuid4(),
            epoch=1,
            checkpoint_no=0,
            fresh=True,
            state="running",
            started_at=EPOCH,
            deadline_at=EPOCH + timedelta(hours=1),
            request=pair.request.encode(Order()),
            mailbox=Mailbox(wakeups=0),
        ),
    )
    execution.begin(EPOCH)
    charging, shipping = (work.path for work in execution.answered(Answer(kind="applied"), EPOCH).start)
    assert execution.fact(Completed(path=shipping, output='"home"'), EPOCH).checkpoint is not None
    assert execution.fact(uncertain(charging), EPOCH).checkpoint is None, "one is on its way"
    (again,) = execution.answered(Answer(kind="applied"), EPOCH).start
    assert (again.path, again.attempt) == (charging, 2)
    last = execution.fact(rejected(charging), EPOCH).checkpoint
    assert last is not None
    assert [(row.path, row.outcome) for row in last.rows] == [(charging, "unknown")]


async def test_branches_are_undone_in_the_reverse_order_of_their_calls() -> None:
    """The first one ends last. Red where the plan is the reverse of the journal."""
    scene = Scene(both, Order(), {"write completed (1)": "cancel"})
    scene.ends("parallel#1[0]/charge#1", uncertain("parallel#1[0]/charge#1"))
    row = await scene.run()
    assert row.state == "cancelled"
    assert [task.path for task in row.tasks][-1] == "parallel#1[0]/charge#1"
    assert [name for name, _ in undone] == ["ship", "charge"]


async def test_a_crash_in_a_parallel_loses_nothing() -> None:
    scene = Scene(both, Order(), {"step parallel#1[1]/ship#1 (1)": "crash after"})
    row = await scene.run()
    assert row.state == "completed"
    assert scene.service.calls.count("step parallel#1[0]/charge#1") == 1


async def test_a_pivot_cannot_be_inside_a_parallel() -> None:
    @saga("sly", deadline=3600)
    async def sly(run: Run, order: Order) -> None:
        await run.parallel(charge(order), run.pivot())  # type: ignore[call-overload]

    row = await Scene(sly, Order()).run()
    assert row.state == "paused"
    assert "is no call of a step" in (row.paused_reason or "")


# ------------------------------------------------------------------------------------------------ compensation


async def test_a_compensation_is_tried_again_and_then_waits_for_a_person() -> None:
    scene = Scene(two, Order(), {"write completed (1)": "cancel"})
    scene.ends("undo ship#1", *[uncertain("ship#1")] * 3)
    row = await scene.run()
    assert row.state == "paused"
    assert row.paused_reason == "compensation of ship#1 failed 3 times: connection lost"
    assert scene.plan == [("ship#1", "failed"), ("charge#1", "pending")]
    scene.machine.journal.resume(scene.id)
    row = await scene.run()
    assert (row.state, scene.left()) == ("cancelled", ["look_up#1"])


async def test_a_compensation_that_is_not_required_may_fail() -> None:
    @step
    async def greet(ctx: StepContext[Any], order: Order) -> None: ...

    @greet.compensation(required=False, retry=Retry(2, initial=0.1))
    async def apologise(ctx: StepContext[Any], done: None | Unknown, order: Order) -> None:  # noqa: RUF036
        raise OSError("no line")

    @saga("polite", deadline=3600)
    async def polite(run: Run, order: Order) -> None:
        await run(charge(order))
        await run(greet(order))
        raise Rejected("no")

    scene = Scene(polite, Order())
    row = await scene.run()
    assert (row.state, scene.plan) == ("failed", [("greet#1", "failed"), ("charge#1", "completed")])


@pytest.mark.parametrize("turn", ["crash before", "crash after", "times out, landed"])
async def test_a_compensation_survives_a_crash_under_the_same_key(turn: Turn) -> None:
    scene = Scene(two, Order(), {"write completed (1)": "cancel", "undo ship#1 (1)": turn})
    row = await scene.run()
    assert (row.state, scene.left()) == ("cancelled", ["look_up#1"])


async def test_a_step_whose_code_is_gone_waits_for_a_person() -> None:
    scene = Scene(two, Order(), {"write completed (1)": "cancel"})
    two.find("charge")
    del two._targets["charge"]
    original = two.find
    two.find = lambda name: None if name == "charge" else original(name)  # type: ignore[method-assign]
    try:
        row = await scene.run()
    finally:
        del two.find
    assert row.state == "paused"
    assert "nothing is called charge" in (row.paused_reason or "")


# ------------------------------------------------------------------------------------------------ late results


@step(retry=Retry(1), timeout=1, settle=0)
async def hasty(ctx: StepContext[Any], order: Order) -> str:
    return "hasty"


@hasty.compensation
async def undo_hasty(ctx: StepContext[Any], done: str | Unknown, order: Order) -> None:
    undone.append(("hasty", done))
    if during and isinstance(done, Unknown):
        during.pop()()


during: list[Any] = []


@saga("hasty_saga", deadline=3600)
async def hasty_saga(run: Run, order: Order) -> str:
    return await run(hasty(order))


async def test_a_late_result_opens_its_compensation_again_even_after_the_end() -> None:
    """H46, H19. Red where `Compensating.read` does not look at late results."""
    scene = Scene(hasty_saga, Order(), {"step hasty#1 (1)": "lands late"})
    row = await scene.run()
    assert row.state == "failed"
    assert [type(done) for _, done in undone] == [Unknown, str], "what was not known is undone with its result"
    assert scene.plan == [("hasty#1", "completed"), ("hasty#1", "completed")]
    assert scene.left() == []


async def test_a_late_result_while_its_compensation_is_under_way_opens_it_again() -> None:
    """H19. Red where a compensation does not remember how many late results there were when it began."""
    scene = Scene(hasty_saga, Order())
    scene.ends("hasty#1", uncertain("hasty#1"))
    during.append(lambda: scene.machine.journal.record_late(scene.id, 1, Late(path="hasty#1", output='"hasty"')))
    row = await scene.run()
    assert row.state == "failed"
    assert [type(done) for _, done in undone] == [Unknown, str]


async def test_a_late_result_that_is_known_before_its_compensation_begins_is_undone_once() -> None:
    scene = Scene(at_most, Order(), {"step once#1 (1)": "lands late"})
    row = await scene.run()
    assert row.state == "failed"
    assert undone == [("once", "once")]
    assert scene.left() == []


async def test_a_late_result_between_two_attempts_of_a_compensation_opens_it_again() -> None:
    """H19, found by the model: the second attempt has the first one's key, so it does not undo what landed in between.

    Red where `Compensating._late_seen` counts anew for each attempt.
    """
    scene = Scene(hasty_saga, Order(), {"undo hasty#1 (1)": "crash after"})
    scene.ends("hasty#1", uncertain("hasty#1"))
    late = Late(path="hasty#1", output='"hasty"')
    scene.machine.at(EPOCH + timedelta(seconds=1), lambda: scene.machine.journal.record_late(scene.id, 1, late))
    row = await scene.run()
    assert row.state == "failed"
    assert [type(done) for _, done in undone] == [Unknown, str, str]
    assert scene.plan == [("hasty#1", "completed"), ("hasty#1", "completed")]


async def test_a_run_that_is_fenced_reports_its_result_once() -> None:
    """H47: the result of a fenced run is recorded; a saga that has completed with another run's stays as it is."""
    scene = Scene(two, Order(), {"step charge#1 (1)": "lands late"})
    row = await scene.run()
    assert (row.state, undone) == ("completed", [])
    assert [late.path for late in row.late] == ["charge#1"]


# ------------------------------------------------------------------------------------------------ remote


@saga("remotely", deadline=3600)
async def remotely(run: Run, order: Order) -> str:
    reserved = await run(reserve(order))
    await run(charge(order))
    if order.amount > 1:
        raise Rejected("too many")
    return reserved.shelf


async def test_a_command_is_the_intent_and_its_reply_shares_the_next_checkpoint() -> None:
    scene = Scene(remotely, Order())
    row = await scene.run()
    assert (row.state, row.output) == ("completed", '"A1"')
    sent = scene.machine.checkpoints[0]
    assert (sent.state, sent.held, [m.event_type for m in sent.outbox]) == ("waiting", False, ["stock.reserve.do"])
    assert sent.outbox[0].topic == "saga.stock.commands"
    assert sent.wake_at == EPOCH + timedelta(seconds=30)
    after = scene.machine.checkpoints[1]
    assert ([t.path for t in after.rows], [i.path for i in after.next]) == (["stock.reserve#1"], ["charge#1"])


async def test_a_remote_step_is_undone_by_a_command() -> None:
    scene = Scene(remotely, Order(amount=2))
    row = await scene.run()
    assert row.state == "failed"
    assert scene.plan == [("charge#1", "completed"), ("stock.reserve#1", "completed")]
    assert scene.service.calls[-1] == "undo stock.reserve#1"
    assert scene.left() == []


@pytest.mark.parametrize("turn", ["rejects", "reply twice", "reply late"])
async def test_replies_that_are_no_twice_or_late(turn: Turn) -> None:
    scene = Scene(remotely, Order(), {"do command stock.reserve#1 (1)": turn})
    row = await scene.run()
    assert row.state == ("completed" if turn == "reply twice" else "failed")
    assert scene.left() == ([] if row.state == "failed" else ["charge#1", "stock.reserve#1"])


async def test_a_reply_that_races_the_timeout_counts() -> None:
    """A timeout is a decision by absence. Red without `strict` on unknown rows of commands."""
    scene = Scene(remotely, Order(), {"do command stock.reserve#1 (1)": "reply late"})
    write = scene.machine.journal.write

    def late(checkpoint: Any) -> Any:
        if any(task.outcome == "unknown" for task in checkpoint.rows):
            scene.machine.journal.tell(
                scene.id, "reply", "stock.reserve#1", '{"outcome": "completed", "output": {"shelf": "B"}}', EPOCH
            )
        return write(checkpoint)

    scene.machine.journal.write = late  # type: ignore[method-assign]
    row = await scene.run()
    assert (row.state, row.output) == ("completed", '"B"')


# ------------------------------------------------------------------------------------------------ probes


asked: list[list[str]] = []


def probed(answer: object) -> Any:
    @step(retry=Retry(2, initial=0.1), timeout=10, settle=20)
    async def pay(ctx: StepContext[Any], order: Order) -> str:
        return "paid"

    @pay.compensation
    async def unpay(ctx: StepContext[Any], done: str | Unknown, order: Order) -> None:
        undone.append(("pay", done))

    @pay.probe
    async def find(ctx: StepContext[Any], order: Order) -> Any:
        for keys in asked:
            keys.append(ctx.idempotency_key)
        now = answer.pop(0) if isinstance(answer, list) else answer
        if isinstance(now, Exception):
            raise now
        return now

    @saga("probing", deadline=3600)
    async def probing(run: Run, order: Order) -> str:
        await run(charge(order))
        try:
            return await run(pay(order))
        except Rejected:
            return "not paid"

    return probing


async def test_a_probe_turns_an_unknown_outcome_into_a_result_once_it_has_settled() -> None:
    scene = Scene(probed("found"), Order())
    scene.ends("pay#1", uncertain("pay#1"), uncertain("pay#1"))
    row = await scene.run()
    assert (row.state, row.output) == ("completed", '"found"')
    asked = next(c for c in scene.machine.checkpoints if c.state == "waiting")
    assert [i.phase for i in asked.open] == ["probe"]
    assert asked.wake_at is not None
    assert asked.wake_at >= EPOCH + timedelta(seconds=20)


async def test_a_probe_that_finds_nothing_is_a_clean_rejection() -> None:
    scene = Scene(probed(NotDone()), Order())
    scene.ends("pay#1", uncertain("pay#1"), uncertain("pay#1"))
    row = await scene.run()
    assert (row.state, row.output) == ("completed", '"not paid"')


async def test_a_probe_that_fails_is_asked_again() -> None:
    """Red where one failure of the probe is enough."""
    answers: list[Any] = [OSError("down"), OSError("down"), "found"]
    scene = Scene(probed(answers), Order())
    scene.ends("pay#1", uncertain("pay#1"), uncertain("pay#1"))
    row = await scene.run()
    assert (row.state, row.output, answers) == ("completed", '"found"', [])


async def test_a_probe_that_keeps_failing_leaves_it_unknown() -> None:
    scene = Scene(probed(OSError("down")), Order())
    scene.ends("pay#1", uncertain("pay#1"), uncertain("pay#1"))
    row = await scene.run()
    assert (row.state, [(name, type(done)) for name, done in undone]) == ("failed", [("pay", Unknown), ("charge", str)])


async def test_a_compensation_asks_first_what_there_is_to_undo() -> None:
    """The probe fails while going forward, and answers on the way back. Red where it is asked under the undo's key."""
    answers: list[Any] = [*[OSError("down")] * 5, "found"]
    scene = Scene(probed(answers), Order())
    keys: list[str] = []
    asked.append(keys)
    scene.ends("pay#1", uncertain("pay#1"), uncertain("pay#1"))
    row = await scene.run()
    assert (row.state, undone) == ("failed", [("pay", "found"), ("charge", "paid 1")])
    assert set(keys) == {str(step_key(scene.id, "pay#1"))}


@pytest.mark.parametrize("times", [1, 3, 20, 45])
async def test_a_command_that_failed_to_undo_is_sent_again(times: int) -> None:
    """After 20 attempts a person resumes it, and they begin anew.

    Red where `_told_by_mail` takes any error for one of the attempt under way: each claim reads the old ones again, and
    what succeeded meanwhile is not seen. Red where `claimed` begins attempts anew after it has read the mail: it never
    pauses. Red where an id of an undo comes twice: its answer is a duplicate for the mailbox.
    """
    scene = Scene(remotely, Order(amount=2))
    scene.ends("undo stock.reserve#1", *[uncertain("stock.reserve#1")] * times)
    for _ in range(times // 20):
        row = await scene.run()
        assert (row.state, row.paused_reason) == (
            "paused",
            "compensation of stock.reserve#1 failed 20 times: unknown: connection lost",
        )
        scene.machine.journal.resume(scene.id)
    row = await scene.run()
    assert (row.state, scene.left()) == ("failed", [])
    assert scene.service.calls.count("undo stock.reserve#1") == times + 1
    undos = [message.event_id for message in scene.machine.journal.outbox if message.event_type.endswith(".undo")]
    assert len(set(undos)) == len(undos) == times + 1


@saga("queueing", deadline=3600)
async def queueing(run: Run, order: Order) -> None:
    await run.lock("the printer")


async def test_a_place_in_a_queue_is_given_back_with_the_end() -> None:
    """Asked for and given up under one claim. Red where `_chores` looks at what the claim and the journal say only."""
    scene = Scene(queueing, Order(), {"write waiting (1)": "cancel"})
    queue = scene.machine.journal._locks.setdefault("the printer", [])
    queue.append((step_key(scene.id, "another"), "lock#1"))
    assert (await scene.run()).state == "cancelled"
    assert len(queue) == 1
