"""The lab: a saga in memory, steps that end as a test says, and every history in which something goes wrong."""

import time
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import UUID

import pytest
from pydantic import BaseModel

from outbox import Transaction
from saga import (
    BodyError,
    Failed,
    NotDone,
    Rejected,
    Retry,
    Run,
    Saga,
    SagaError,
    Signal,
    StepContext,
    Unknown,
    remote,
    saga,
    step,
)
from saga.testing import Counterexample, Lab
from saga.testing.faults import Choices


class PlaceOrder(BaseModel):
    order_id: UUID = UUID(int=7)
    sku: str = "x"
    amount: int = 3


class Charge(BaseModel):
    id: str


class Reserved(BaseModel):
    shelf: str


class Approval(Signal):
    approved: bool


@dataclass
class Bank:
    """A service that counts a call once under its key, and can be told to undo one that it never saw."""

    charged: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bank) and sum(self.charged.values()) == sum(other.charged.values())

    __hash__ = None  # type: ignore[assignment]

    def charge(self, key: str, amount: int) -> None:
        self.charged[key] = amount

    def refund(self, key: str) -> None:
        self.charged.pop(key, None)


reserve_stock = remote("stock.reserve", PlaceOrder, Reserved, timeout=30)


@step(transactional=True)
async def create_order(tx: Transaction, order: PlaceOrder) -> UUID:
    raise NotImplementedError


@create_order.compensation
async def cancel_order(tx: Transaction, done: UUID | Unknown, order: PlaceOrder) -> None:
    raise NotImplementedError


@step(retry=Retry(attempts=3, initial=0.2), timeout=10)
async def charge(ctx: StepContext[Bank], order: PlaceOrder) -> Charge:
    ctx.deps.charge(ctx.idempotency_key, order.amount)
    return Charge(id=ctx.idempotency_key)


@charge.compensation(retry=Retry(3, initial=0.1))
async def refund(ctx: StepContext[Bank], done: Charge | Unknown, order: PlaceOrder) -> None:
    ctx.deps.refund(done.idempotency_key if isinstance(done, Unknown) else done.id)


@charge.probe
async def find_charge(ctx: StepContext[Bank], order: PlaceOrder) -> Charge | NotDone:
    key = ctx.idempotency_key
    return Charge(id=key) if key in ctx.deps.charged else NotDone()


@saga("lab_order", deadline=timedelta(hours=48))
async def place_order(run: Run, order: PlaceOrder) -> str:
    await run(create_order(order))
    stock, paid = await run.parallel(reserve_stock(order), charge(order))
    approval = await run.receive(Approval, timeout=timedelta(hours=24))
    if approval is None or not approval.approved:
        raise Rejected("not approved")
    await run.pivot()
    return f"{stock.shelf} {bool(paid.id)}"


def lab_of(the_saga: Saga[PlaceOrder, str] = place_order, deps: object = None) -> Lab[PlaceOrder, str]:
    lab = Lab(the_saga, deps=deps)
    lab.on(create_order).returns(UUID(int=7))
    lab.on(reserve_stock).returns(Reserved(shelf="A1"))
    return lab


# ------------------------------------------------------------------------------------------------ running


async def test_it_completes_in_no_time() -> None:
    lab = lab_of(deps=Bank())
    lab.signal(Approval(approved=True), after=3600)
    began = time.monotonic()
    outcome = await lab.run(PlaceOrder())
    assert (outcome.state, outcome.result, outcome.compensated) == ("completed", "A1 True", [])
    assert time.monotonic() - began < 5


async def test_not_approved_releases_everything() -> None:
    lab = lab_of()
    lab.on(charge).times_out(landed=True)
    lab.on(charge).returns(Charge(id="c"))
    lab.on(charge).compensation_fails(times=2)
    outcome = await lab.run(PlaceOrder())
    assert (outcome.state, outcome.reason, outcome.blocked_on) == ("failed", "not approved", None)
    assert outcome.compensated == ["charge", "reserve_stock", "create_order"]
    with pytest.raises(Failed, match="not approved"):
        _ = outcome.result


async def test_a_compensation_that_keeps_failing_blocks() -> None:
    lab = lab_of()
    lab.on(charge).returns(Charge(id="c"))
    lab.on(charge).compensation_fails()
    outcome = await lab.run(PlaceOrder())
    assert (outcome.state, outcome.blocked_on, outcome.compensated) == ("paused", "charge", [])
    assert "failed 3 times" in (outcome.reason or "")


@pytest.mark.parametrize("landed", [True, False])
async def test_an_outcome_that_stays_unknown_is_undone_or_asked_for(landed: bool) -> None:  # noqa: FBT001
    lab = lab_of()
    lab.on(charge).times_out(landed=landed)
    outcome = await lab.run(PlaceOrder())
    assert outcome.state == "failed"
    assert ("charge" in outcome.compensated) == landed
    assert "reserve_stock" in outcome.compensated


@pytest.mark.parametrize("landed", [True, False])
async def test_a_command_whose_reply_never_comes_is_undone(landed: bool) -> None:  # noqa: FBT001
    lab = Lab(place_order)
    lab.on(create_order).returns(UUID(int=7))
    lab.on(charge).returns(Charge(id="c"))
    lab.on(reserve_stock).times_out(landed=landed)
    outcome = await lab.run(PlaceOrder())
    assert outcome.state == "failed"
    assert outcome.compensated == ["charge", "reserve_stock", "create_order"]


async def test_a_step_that_rejects() -> None:
    lab = lab_of()
    lab.on(charge).rejects("no money")
    outcome = await lab.run(PlaceOrder())
    assert (outcome.reason, outcome.compensated) == ("no money", ["reserve_stock", "create_order"])


async def test_a_cancel() -> None:
    lab = lab_of(deps=Bank())
    lab.cancel("changed my mind", after=60)
    outcome = await lab.run(PlaceOrder())
    assert (outcome.state, outcome.reason) == ("cancelled", "changed my mind")


async def test_what_needs_a_database_has_to_be_said() -> None:
    with pytest.raises(SagaError, match=r"create_order is transactional.*lab.on"):
        await Lab(place_order).run(PlaceOrder())
    lab = Lab(place_order, deps=Bank())
    lab.on(create_order).returns(UUID(int=7))
    with pytest.raises(SagaError, match="no participant here"):
        await lab.run(PlaceOrder())


async def test_a_request_that_is_rejected_at_once_is_the_callers() -> None:
    @saga("picky", deadline=60)
    async def picky(run: Run, order: PlaceOrder) -> None:
        if order.amount:
            raise Rejected("no")
        raise KeyError("bug")

    with pytest.raises(Rejected):
        await Lab(picky).run(PlaceOrder())
    with pytest.raises(BodyError):
        await Lab(picky).run(PlaceOrder(amount=0))


# ------------------------------------------------------------------------------------------------ exploring


async def test_a_saga_that_is_right_survives_everything() -> None:
    lab = lab_of()
    lab.signal(Approval(approved=True), after=10)
    await lab.explore(PlaceOrder(), world=Bank, histories=600)
    refused = lab_of()
    await refused.explore(PlaceOrder(), world=Bank, depth=1)


@dataclass
class Shop:
    """Things in the world that steps act on."""

    things: dict[str, int] = field(default_factory=dict)
    count: int = 0


def saga_of(*, forgets: bool = False, adds: bool = False, ignores: bool = False) -> Saga[PlaceOrder, str]:
    """Two steps, with one mistake at most."""

    @step(timeout=5)
    async def first(ctx: StepContext[Shop], order: PlaceOrder) -> str:
        if adds:
            ctx.deps.count += 1
        else:
            ctx.deps.things[ctx.idempotency_key] = 1
        return ctx.idempotency_key

    @step(timeout=5)
    async def second(ctx: StepContext[Shop], order: PlaceOrder) -> str:
        return "done"

    async def undo(ctx: StepContext[Shop], done: str | Unknown, order: PlaceOrder) -> None:
        if adds:
            ctx.deps.count -= 1
        elif isinstance(done, Unknown):
            if not ignores:
                ctx.deps.things.pop(done.idempotency_key, None)
        else:
            ctx.deps.things.pop(done, None)

    if not forgets:
        first.compensation(undo)

    @saga("mistaken", deadline=3600)
    async def mistaken(run: Run, order: PlaceOrder) -> str:
        await run(first(order))
        return await run(second(order))

    return mistaken


async def test_a_saga_of_two_steps_survives_every_pair_of_faults() -> None:
    await Lab(saga_of()).explore(PlaceOrder(), world=Shop)


async def test_a_forgotten_compensation_is_found_with_one_fault() -> None:
    with pytest.raises(Counterexample) as found:
        await Lab(saga_of(forgets=True)).explore(PlaceOrder(), world=Shop)
    assert len(found.value.faults) == 1
    assert "the saga has" in found.value.problem
    assert "instead of" in found.value.problem
    text = str(found.value)
    assert "What goes wrong:\n  1. " in text
    assert "step first#1: completed" in text


async def test_a_step_that_does_not_count_once_under_its_key_is_found() -> None:
    with pytest.raises(Counterexample) as found:
        await Lab(saga_of(adds=True)).explore(PlaceOrder(), world=Shop)
    assert len(found.value.faults) == 1
    assert "first#1" in str(found.value)


async def test_a_compensation_that_ignores_what_is_unknown_is_found() -> None:
    with pytest.raises(Counterexample) as found:
        await Lab(saga_of(ignores=True)).explore(PlaceOrder(), world=Shop)
    assert len(found.value.faults) == 2, "an effect that nobody saw, and something that makes the saga go back"


async def test_a_saga_that_never_ends_by_itself_is_refused() -> None:
    @saga("stuck", deadline=3600)
    async def stuck(run: Run, order: PlaceOrder) -> None:
        await run.pivot()
        raise Rejected("too late")

    with pytest.raises(SagaError, match="rejected after the pivot"):
        await Lab(stuck).explore(PlaceOrder(), world=Shop)


async def test_a_signal_may_come_right_before_any_write() -> None:
    """It is not lost: the write that lets go of the instance finds news."""
    lab = lab_of()
    lab.signal(Approval(approved=True), after=3600)
    site = "write waiting (1)"
    raced = await lab.attempt(PlaceOrder(), Choices({site: "signal"}), Bank())
    assert [str(fault) for fault in raced.machine.choices.taken] == [f"{site}: signal"]
    assert raced.outcome.state == "completed"
    assert not any(line.lstrip().startswith("3600") for line in raced.outcome.log)
    assert "signal" in raced.machine.choices.seen[site]
    assert "signal" not in raced.machine.choices.seen["write completed (1)"]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("undo", "parallel#1[1]/charge#1"),
        ("undo command", "parallel#1[0]/stock.reserve#1"),
        ("undo_transactional", "create_order#1"),
    ],
)
async def test_a_compensation_may_fail_for_good(kind: str, path: str) -> None:
    """What comes after it has not begun; `explore` complains where it has."""
    lab = lab_of()
    lab.signal(Approval(approved=False))
    run = await lab.attempt(PlaceOrder(), Choices({f"{kind} {path} (1)": "fails for good"}), Bank())
    assert [fault.turn for fault in run.machine.choices.taken] == ["fails for good"]
    assert run.outcome.state == "paused"
    plan = sorted(run.row.plan.values(), key=lambda planned: planned.position)
    failed = next(n for n, planned in enumerate(plan) if planned.status == "failed")
    assert plan[failed].path == path
    assert {planned.status for planned in plan[:failed]} <= {"completed"}
    assert {planned.status for planned in plan[failed + 1 :]} <= {"pending"}


async def test_a_way_back_that_goes_past_what_failed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decider that takes every compensation that failed for one that is not required."""
    monkeypatch.setattr("saga.compensating._given_up", lambda row: row.status == "failed")
    lab = lab_of()
    lab.signal(Approval(approved=False))
    with pytest.raises(Counterexample, match="was done and not undone"):
        await lab.explore(PlaceOrder(), world=Bank, depth=1)
