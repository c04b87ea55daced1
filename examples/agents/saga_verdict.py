"""The verdict on the sagas: how each ended, against what each service's own table says happened.

A saga's own journal is asked for nothing but its outcome. What it did is counted where it was done.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, LiteralString, NamedTuple
from uuid import UUID

from examples.agents.stage import Stage
from tests.support.checker import EXAMPLES_MAX, Finding

ENDS: Final = ("completed", "failed", "cancelled")

OUTCOMES: Final = """
    select key::uuid as workflow_id, state from saga.workflow_instances where workflow_name = 'workflow_execution'"""
EFFECTS: Final[Mapping[str, tuple[str, LiteralString]]] = {
    "executions": (
        "llm_agent_db",
        "select workflow_id, status = 'completed' as kept from executions where workflow_id is not null",
    ),
    "validation_results": (
        "validation_db",
        "select workflow_id, status = 'passed' as kept from validation_results",
    ),
    "workflow_results": ("workflow_db", "select workflow_id, status = 'recorded' as kept from workflow_results"),
    "notifications": ("notification_db", "select workflow_id, status = 'sent' as kept from notifications"),
}
"""What happened, in the database of the service that did it, and whether it still holds."""


class Fault(StrEnum):
    """The ways to break the promise."""

    SAGA_OPEN = "saga_open"
    EFFECT_LOST = "effect_lost"
    EFFECT_UNDONE = "effect_undone"
    EFFECT_LEFT = "effect_left"
    EFFECT_TWICE = "effect_twice"
    EFFECT_STRAY = "effect_stray"


MEANING: Final[Mapping[Fault, str]] = {
    Fault.SAGA_OPEN: "sagas without exactly one outcome",
    Fault.EFFECT_LOST: "effects that are missing, of sagas that completed",
    Fault.EFFECT_UNDONE: "effects undone, of sagas that completed",
    Fault.EFFECT_LEFT: "effects left behind, of sagas that were undone",
    Fault.EFFECT_TWICE: "effects that happened more than once",
    Fault.EFFECT_STRAY: "effects of no saga at all",
}


class Effect(NamedTuple):
    """One row of one service's table."""

    workflow_id: UUID
    kept: bool


class Takeover(NamedTuple):
    """How many sagas a killed worker had in its hands, and after how long another one had them."""

    sagas: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaRun:
    """What the run did with its sagas."""

    asked: frozenset[UUID]
    """The workflows that it started, in its own memory."""
    happened: Mapping[str, int]
    """How often each trouble befell them."""
    takeover: Takeover


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaVerdict:
    """How all sagas ended, and every fault."""

    run: SagaRun
    ends: Mapping[str, int]
    kept: int
    undone: int
    findings: Mapping[Fault, Finding] = field(repr=False)

    @property
    def exercised(self) -> Mapping[str, int]:
        """What a run has to show to say anything."""
        return {**self.ends, **self.run.happened, "taken over": self.run.takeover.sagas}

    @property
    def did_not_happen(self) -> list[str]:
        """What the run was meant to show, and did not."""
        return [what for what, count in self.exercised.items() if not count]

    @property
    def valid(self) -> bool:
        return not self.did_not_happen and not any(finding.count for finding in self.findings.values())

    def explain(self) -> str:
        """The verdict as text: every fault with its first examples."""
        lines = ["sagas:", *(f"  did not happen: {what}" for what in self.did_not_happen)]
        for fault, finding in self.findings.items():
            if finding.count:
                lines += [f"  {fault}: {finding.count}", *(f"    {example}" for example in finding.examples)]
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        return {
            "asked": len(self.run.asked),
            **self.ends,
            "effects_kept": self.kept,
            "effects_undone": self.undone,
            "faults": {fault: finding.count for fault, finding in self.findings.items()},
            "examples": {fault: found.examples for fault, found in self.findings.items() if found.count},
            "did_not_happen": self.did_not_happen,
            "exercised": self.exercised,
            "taken_over_seconds": round(self.run.takeover.seconds, 2),
        }


async def reach(stage: Stage, run: SagaRun) -> SagaVerdict:
    """Read every service's table and judge."""
    outcomes = [(row["workflow_id"], row["state"]) for row in await stage.workflows.pool.fetch(OUTCOMES)]
    effects = {
        table: [Effect(**row) for row in await stage.databases[database].pool.fetch(query)]
        for table, (database, query) in EFFECTS.items()
    }
    return judge(run, outcomes, effects)


def judge(run: SagaRun, outcomes: Iterable[tuple[UUID, str]], effects: Mapping[str, Sequence[Effect]]) -> SagaVerdict:
    """Compare each saga's outcome with its effects in each table."""
    states = defaultdict(list)
    for workflow_id, state in outcomes:
        states[workflow_id].append(state)
    ends = {workflow_id: found[0] for workflow_id, found in states.items() if len(found) == 1 and found[0] in ENDS}
    culprits: dict[Fault, list[str]] = {fault: [] for fault in Fault}
    for workflow_id in run.asked | states.keys():
        if workflow_id not in ends or workflow_id not in run.asked:
            culprits[Fault.SAGA_OPEN].append(f"{workflow_id}: {' and '.join(states[workflow_id]) or 'none'}")
    for table, rows in effects.items():
        found: defaultdict[UUID, list[bool]] = defaultdict(list)
        for workflow_id, kept in rows:
            found[workflow_id].append(kept)
        for workflow_id in found.keys() | ends.keys():
            for fault in _faults(ends.get(workflow_id), found[workflow_id], is_ours=workflow_id in run.asked):
                culprits[fault].append(f"{table} of workflow {workflow_id}")
    everything = Counter(effect.kept for rows in effects.values() for effect in rows)
    return SagaVerdict(
        run=run,
        ends={end: Counter(ends.values())[end] for end in ENDS},
        kept=everything[True],
        undone=everything[False],
        findings={fault: Finding(len(texts), tuple(texts[:EXAMPLES_MAX])) for fault, texts in culprits.items()},
    )


def _faults(end: str | None, kept: list[bool], *, is_ours: bool) -> Iterator[Fault]:
    """What is wrong with the effects of one workflow in one table."""
    if kept and not is_ours:
        yield Fault.EFFECT_STRAY
        return
    if len(kept) > 1:
        yield Fault.EFFECT_TWICE
    if end == "completed":
        if not kept:
            yield Fault.EFFECT_LOST
        elif not any(kept):
            yield Fault.EFFECT_UNDONE
    elif end is not None and any(kept):
        yield Fault.EFFECT_LEFT
