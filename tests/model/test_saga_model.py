"""A saga of two steps, two workers and every fault: all states, breadth first; see `tests.support.saga_model`.

Each rule is also taken out, and the model has to find that.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

import pytest
from pydantic import BaseModel

from saga import Retry, Run, Signal, StepContext, Unknown, calls, decider, plan, remote, saga, step
from saga.compensating import Compensating
from saga.decider import Execution
from saga.ledger import Ended, Ledger
from saga.state import Answer, Checkpoint, Decision, Fact, Late, PlanRow, Refused
from saga.testing.memory import MemoryJournal, Row
from tests.support.saga_model import Model
from tests.support.saga_search import Search, Wrong
from tests.support.saga_states import Scenario

TOGETHER: Final = int(os.environ.get("SAGABOX_MODEL_FAULTS", "2"))
"""How many faults come together. With 3 there are millions of states, and it takes minutes."""
HOUR: Final = timedelta(hours=1)
SOON: Final = timedelta(seconds=2)
TWICE: Final = Retry(2, initial=0)


@step(retry=TWICE, timeout=5, settle=10)
async def a(ctx: StepContext[Any]) -> str:
    return "done"


@a.compensation(retry=TWICE)
async def undo_a(ctx: StepContext[Any], done: str | Unknown) -> None: ...


@step(at_most_once=True, timeout=5)
async def b(ctx: StepContext[Any]) -> str:
    return "done"


@b.compensation(retry=Retry(1))
async def undo_b(ctx: StepContext[Any], done: str | Unknown) -> None: ...


@step(retry=TWICE, timeout=5, irreversible=True)
async def c(ctx: StepContext[Any]) -> str:
    return "done"


class Command(BaseModel):
    pass


class Go(Signal):
    pass


ask = remote("b.ask", Command, timeout=5)


@saga("one_after_the_other", deadline=SOON)
async def one_after_the_other(run: Run, _: None) -> None:
    await run(a())
    await run(b())


@saga("side_by_side", deadline=SOON)
async def side_by_side(run: Run, _: None) -> None:
    await run.parallel(a(), b())


@saga("pivoting", deadline=SOON)
async def pivoting(run: Run, _: None) -> None:
    await run(a())
    await run.pivot()
    await run(c())


@saga("receiving", deadline=HOUR)
async def receiving(run: Run, _: None) -> None:
    await run(a())
    if await run.receive(Go, timeout=1) is not None:
        await run(b())


@saga("commanding", deadline=HOUR)
async def commanding(run: Run, _: None) -> None:
    await run(a())
    await run(ask(Command()))


WORKERS: Final = {"crash": 2, "lease": 1, "answer lost": 1, "cancel": 1, "slow": 1}
CALLS: Final = {"timeout": 2, "reject": 1, "undo fails": 1}
SEQUENTIAL: Final = Scenario(saga=one_after_the_other, faults={**WORKERS, **CALLS, "deadline": 1}, together=TOGETHER)
DRIVEN: Final = replace(SEQUENTIAL, driven=True)
PARALLEL: Final = Scenario(saga=side_by_side, faults={**WORKERS, **CALLS, "crash": 1}, together=TOGETHER)
PIVOT: Final = Scenario(saga=pivoting, faults={**WORKERS, **CALLS, "deadline": 1}, together=TOGETHER)
RECEIVE: Final = Scenario(saga=receiving, faults=WORKERS, together=TOGETHER, signal="Go")
COMMAND: Final = Scenario(
    saga=commanding, faults={**WORKERS, "reject": 1, "twice": 1, "overtaken": 1}, together=TOGETHER
)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "scenario",
    [SEQUENTIAL, DRIVEN, PARALLEL, PIVOT, RECEIVE, COMMAND],
    ids=["sequential", "driven", "parallel", "pivot", "receive", "command"],
)
def test_every_state_is_as_it_must_be(scenario: Scenario) -> None:
    """SAGABOX_MODEL_FAULTS=3 combines more of them."""
    assert Search(Model(scenario)).run() > 1_000


# ------------------------------------------------------------------------------------------ journals without a rule


class NoEpoch(MemoryJournal):
    """Whoever writes is believed."""

    def write(self, checkpoint: Checkpoint) -> Answer:
        row = self.rows[checkpoint.id]
        return super().write(replace(checkpoint, epoch=row.epoch, no=row.no))


class NoNumber(MemoryJournal):
    """A checkpoint that is sent again is written again."""

    def write(self, checkpoint: Checkpoint) -> Answer:
        return super().write(replace(checkpoint, no=self.rows[checkpoint.id].no))


class NotAlready(MemoryJournal):
    """H45: a checkpoint that is sent again is taken for somebody else's."""

    def _compare(self, row: Row, checkpoint: Checkpoint) -> Answer:
        answer = super()._compare(row, checkpoint)
        return Answer(kind="broken") if row.no == checkpoint.no + 1 and answer.kind != "fenced" else answer


class WholeAgain(MemoryJournal):
    """One that was written beside news, and is sent again, is taken for written in whole."""

    def _compare(self, row: Row, checkpoint: Checkpoint) -> Answer:
        answer = super()._compare(row, checkpoint)
        is_again = row.no == checkpoint.no + 1 and answer.kind == "news"
        return replace(answer, kind="applied") if is_again else answer


class NoCounter(MemoryJournal):
    """News is not noticed."""

    def write(self, checkpoint: Checkpoint) -> Answer:
        return super().write(replace(checkpoint, seen=self.rows[checkpoint.id].wakeups))


class NotStrict(MemoryJournal):
    """A decision by absence is written beside news."""

    def write(self, checkpoint: Checkpoint) -> Answer:
        return super().write(replace(checkpoint, strict=False))


class NoIntent(MemoryJournal):
    """A call begins, and nothing says so."""

    def write(self, checkpoint: Checkpoint) -> Answer:
        return super().write(replace(checkpoint, next=()))


class NoNewEpoch(MemoryJournal):
    """A takeover leaves the epoch to the claim."""

    def take_over(self, instance_id: UUID) -> None:
        super().take_over(instance_id)
        self.rows[instance_id].epoch -= 1


class NoLate(MemoryJournal):
    """H47: what a fenced run reports is thrown away."""

    def record_late(self, instance_id: UUID, epoch: int, late: Late) -> None:
        pass


class LateOfOthers(MemoryJournal):
    """What a fenced run reports is thrown away if another one has journalled the step."""

    def record_late(self, instance_id: UUID, epoch: int, late: Late) -> None:
        if not any((task.path, task.outcome) == (late.path, "completed") for task in self.rows[instance_id].tasks):
            super().record_late(instance_id, epoch, late)


# ------------------------------------------------------------------------------------------ deciders without a rule

Patch = pytest.MonkeyPatch


def forwards(patch: Patch) -> None:
    """Compensations in the order of the steps."""

    def make_plan(*given: Any) -> list[PlanRow]:
        rows = plan.make_plan(*given)
        return [replace(row, position=n) for n, row in enumerate(reversed(rows), 1)]

    patch.setattr(decider, "make_plan", make_plan)


def unknown_is_rejected(patch: Patch) -> None:
    """What is not known did not happen."""
    end = calls.Calls._end

    def _end(self: calls.Calls, path: str, ended: Ended) -> None:
        end(self, path, replace(ended, outcome="rejected") if ended.outcome == "unknown" else ended)

    patch.setattr(calls.Calls, "_end", _end)


def any_rejection_is_clean(patch: Patch) -> None:
    """H31: the last attempt speaks for all."""
    told = calls.Calls.told

    def clean(self: calls.Calls, fact: Fact, now: Any) -> None:
        intent = self._ledger.intents.get(fact.path)
        if isinstance(fact, Refused) and intent is not None:
            self._ledger.intents[fact.path] = replace(intent, tainted=False)
        told(self, fact, now)

    patch.setattr(calls.Calls, "told", clean)


def claims_count_nothing(patch: Patch) -> None:
    """H31, H1: a call that a claim finds open was never begun."""
    patch.setattr(calls.Calls, "claimed", lambda *_: None)


def open_calls_are_forgotten(patch: Patch) -> None:
    """H1: cancel or deadline before recovery, and only rows are undone."""
    patch.setattr(calls.Calls, "unfinished", lambda *_: None)


def at_once(patch: Patch) -> None:
    """H46: what is unknown is undone before it has settled."""
    patch.setattr(plan, "_settled_at", lambda *_: None)


def cancels_after_the_pivot(patch: Patch) -> None:
    """H44."""
    wait = Execution._interrupted

    def interrupted(self: Execution, now: Any) -> Any:
        return ("cancelled", self._cancel) if self._cancel is not None else wait(self, now)

    patch.setattr(Execution, "_interrupted", interrupted)


def late_results_change_nothing(patch: Patch) -> None:
    """H19."""
    patch.setattr(Compensating, "_reopen_if_late", lambda *_: None)


def each_attempt_knows_anew(patch: Patch) -> None:
    """H19: the second attempt of a compensation is taken to act on what came after the first."""
    patch.setattr(Compensating, "_late_seen", lambda self, row: len(self._ledger.late_of(row.path)))


def begun_is_done(patch: Patch) -> None:
    """A compensation that a claim finds begun has been done."""

    def claimed(self: Compensating, now: Any) -> None:
        self.read(now)
        for row in self.rows:
            if row.status == "executing":
                self._change(row, status="completed")

    patch.setattr(Compensating, "claimed", claimed)


def attempts_are_forgotten(patch: Patch) -> None:
    """H31: the intents are as the checkpoint had them, whatever has ended since."""
    written = Ledger.written

    def forgetful(self: Ledger, checkpoint: Checkpoint, *, with_next: bool) -> None:
        self.intents.update({intent.path: intent for intent in checkpoint.open})
        written(self, checkpoint, with_next=with_next)

    patch.setattr(Ledger, "written", forgetful)


def fenced_in_silence(patch: Patch) -> None:
    """H47: a fenced run forgets what it holds."""
    fenced = Execution._fenced

    def silent(self: Execution) -> Decision:
        return replace(fenced(self), late=())

    patch.setattr(Execution, "_fenced", silent)


def no_patch(_: Patch) -> None:
    """The decider as it is."""


@dataclass(frozen=True)
class Variant:
    """A rule that is missing, and where that shows."""

    name: str
    scenario: Scenario
    patch: Callable[[Patch], None] = no_patch
    faults: tuple[str, ...] = ()
    """Which are enough to show it; empty: all of the scenario."""


def without(rule: type[MemoryJournal], scenario: Scenario, *faults: str) -> Variant:
    return Variant(rule.__name__, replace(scenario, journal=rule), faults=faults)


def patched(patch: Callable[[Patch], None], scenario: Scenario, *faults: str) -> Variant:
    return Variant(patch.__name__, scenario, patch, faults)


VARIANTS: Final = [
    without(NoEpoch, SEQUENTIAL, "lease"),
    without(NoNumber, SEQUENTIAL, "answer lost"),
    without(NotAlready, SEQUENTIAL, "answer lost"),
    without(WholeAgain, SEQUENTIAL, "answer lost", "cancel", "crash"),
    without(NoCounter, SEQUENTIAL, "cancel"),
    without(NoCounter, RECEIVE),
    without(NotStrict, RECEIVE),
    without(NoIntent, SEQUENTIAL, "crash", "cancel"),
    without(NoNewEpoch, SEQUENTIAL, "lease"),
    without(NoLate, SEQUENTIAL, "lease"),
    without(LateOfOthers, SEQUENTIAL, "lease", "cancel"),
    patched(forwards, SEQUENTIAL, "cancel"),
    patched(unknown_is_rejected, SEQUENTIAL, "timeout"),
    patched(any_rejection_is_clean, SEQUENTIAL, "timeout", "reject"),
    patched(claims_count_nothing, SEQUENTIAL, "crash", "reject"),
    patched(open_calls_are_forgotten, SEQUENTIAL, "crash", "cancel"),
    patched(at_once, SEQUENTIAL, "timeout"),
    patched(cancels_after_the_pivot, PIVOT, "cancel", "crash"),
    patched(late_results_change_nothing, SEQUENTIAL, "lease"),
    patched(each_attempt_knows_anew, SEQUENTIAL, "lease", "crash"),
    patched(begun_is_done, SEQUENTIAL, "crash", "cancel"),
    patched(attempts_are_forgotten, PARALLEL, "timeout", "reject"),
    patched(fenced_in_silence, SEQUENTIAL, "lease"),
    Variant("lease is not checked", replace(SEQUENTIAL, checks_lease=False), faults=("lease", "crash")),
    Variant("no tombstones", replace(COMMAND, tombstones=False), faults=("slow", "overtaken")),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: f"{one.name}-{one.scenario.saga.name}")
def test_a_missing_rule_is_found(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    variant.patch(monkeypatch)
    faults = {name: most for name, most in variant.scenario.faults.items() if name in variant.faults}
    scenario = replace(variant.scenario, together=max(2, len(faults)), faults=faults or variant.scenario.faults)
    with pytest.raises(Wrong):
        Search(Model(scenario)).run()
