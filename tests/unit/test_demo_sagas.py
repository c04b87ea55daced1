"""The demo's verdict on its sagas, rule by rule; integration/test_demo has the whole of it."""

from dataclasses import dataclass, replace
from uuid import UUID

import pytest

from examples.agents.saga_verdict import EFFECTS, ENDS, Effect, Fault, SagaRun, SagaVerdict, Takeover, judge

COMPLETED, FAILED, CANCELLED, NOBODYS = (UUID(int=number) for number in range(4))
RUN = SagaRun(
    asked=frozenset({COMPLETED, FAILED, CANCELLED}), happened={"calls repeated": 1}, takeover=Takeover(3, 4.0)
)


@dataclass
class Run:
    """What a run left behind; made good, to be spoilt."""

    outcomes: list[tuple[UUID, str]]
    effects: dict[str, list[Effect]]
    sagas: SagaRun = RUN

    def judged(self) -> SagaVerdict:
        return judge(self.sagas, self.outcomes, self.effects)

    def faults(self) -> dict[Fault, int]:
        return {fault: finding.count for fault, finding in self.judged().findings.items() if finding.count}


@pytest.fixture
def run() -> Run:
    """One completed, one that was undone when it had come to the end, one cancelled before it did anything."""
    return Run(
        outcomes=[(COMPLETED, "completed"), (FAILED, "failed"), (CANCELLED, "cancelled")],
        effects={table: [Effect(COMPLETED, True), Effect(FAILED, False)] for table in EFFECTS},
    )


def test_effects_that_fit_their_outcomes_are_valid(run: Run) -> None:
    verdict = run.judged()
    assert verdict.valid
    assert verdict.ends == dict.fromkeys(ENDS, 1)
    assert (verdict.kept, verdict.undone) == (4, 4)


@pytest.mark.parametrize("table", EFFECTS)
@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        (Effect(COMPLETED, True), [], Fault.EFFECT_LOST),
        (Effect(COMPLETED, True), [Effect(COMPLETED, False)], Fault.EFFECT_UNDONE),
        (Effect(FAILED, False), [Effect(FAILED, True)], Fault.EFFECT_LEFT),
        (Effect(FAILED, False), [Effect(FAILED, False), Effect(CANCELLED, True)], Fault.EFFECT_LEFT),
        (Effect(COMPLETED, True), [Effect(COMPLETED, True)] * 2, Fault.EFFECT_TWICE),
        (Effect(COMPLETED, True), [Effect(COMPLETED, True), Effect(COMPLETED, False)], Fault.EFFECT_TWICE),
        (Effect(FAILED, False), [Effect(FAILED, False)] * 2, Fault.EFFECT_TWICE),
        (Effect(FAILED, False), [Effect(FAILED, False), Effect(NOBODYS, False)], Fault.EFFECT_STRAY),
    ],
    ids=["lost", "undone", "left", "left elsewhere", "twice", "twice, once undone", "twice undone", "stray"],
)
def test_one_row_of_any_service_that_does_not_fit_is_one_fault(
    run: Run, table: str, before: Effect, after: list[Effect], fault: Fault
) -> None:
    run.effects[table].remove(before)
    run.effects[table] += after
    assert run.faults() == {fault: 1}
    assert not run.judged().valid
    assert f"  {fault}: 1\n    {table} of workflow " in run.judged().explain()


@pytest.mark.parametrize(
    "cancelled",
    [
        [],
        [(CANCELLED, "waiting")],
        [(CANCELLED, "paused")],
        [(CANCELLED, "cancelled"), (CANCELLED, "failed")],
        [(CANCELLED, "cancelled"), (NOBODYS, "failed")],
    ],
    ids=["none", "waits", "is paused", "two", "nobody asked"],
)
def test_a_saga_without_exactly_one_outcome_is_a_fault(run: Run, cancelled: list[tuple[UUID, str]]) -> None:
    run.outcomes[-1:] = cancelled
    assert run.faults() == {Fault.SAGA_OPEN: 1}
    assert not run.judged().valid


def test_a_run_in_which_a_trouble_did_not_happen_is_not_valid(run: Run) -> None:
    run.sagas = replace(RUN, happened={"calls repeated": 0}, takeover=Takeover(0, 0.0))
    assert run.faults() == {}
    assert not run.judged().valid
    assert run.judged().did_not_happen == ["calls repeated", "taken over"]


def test_a_run_in_which_nothing_was_cancelled_is_not_valid(run: Run) -> None:
    run.outcomes[-1] = (CANCELLED, "failed")
    assert run.judged().did_not_happen == ["cancelled"]
