"""The verdict: the audit trail against the topic, the source against the cache, and the sagas (`saga_verdict`).

The judge is the checker of the test suite, tests/support/checker.py. The demo imports it from the tests on purpose: it
is the one that judges every run with injected faults, not a friendlier copy.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from examples.agents import saga_verdict
from examples.agents.observer import OVERDUE_SECONDS, PROBE_SECONDS
from examples.agents.saga_verdict import SagaRun, SagaVerdict
from examples.agents.stage import TOPIC, Stage
from outbox import limits
from outbox.wire import Envelope
from tests.support.checker import Anomaly, History, Sample, Verdict, judge
from tests.support.history import read_changes, read_rows, topic_reader

CHANGES: Final = """
    select agent_id as key, version,
           concat_ws(' ', agent_id, action, coalesce(agent_name, '-'), 'tx', transaction_id) as identity,
           case when agent_name is not null then jsonb_build_object('agent_name', agent_name) end as row
      from agent_changes"""
SOURCE: Final = """
    select id as key, jsonb_build_object('agent_name', name) as row
      from agents where deleted_at is null and status <> 'archived'"""
CACHE: Final = """
    select agent_id as key, jsonb_build_object('agent_name', agent_name) as row from workflow_agent_cache"""

MEANING: Final[Mapping[Anomaly, str]] = {
    Anomaly.LOST: "committed, but not published",
    Anomaly.SKIP: "of these, passed by a later event of the same key",
    Anomaly.PHANTOM: "published, but not committed",
    Anomaly.NONMONOTONIC: "out of order within a key",
    Anomaly.OVERTAKEN: "below a position that was passed already",
    Anomaly.DUPLICATE: "published again, beyond what failures allow",
    Anomaly.WRONG_PARTITION: "in another partition than their key's",
    Anomaly.POSITION_REUSED: "positions used twice",
    Anomaly.CACHE_DIVERGENCE: "cached rows that differ from the source",
    Anomaly.CACHE_REGRESSION: "cached rows seen going back",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the processes of one run reported."""

    done: Mapping[str, int]
    rolled_back: list[tuple[str, str, str]]
    latencies: list[tuple[float, float]]
    overdue: int
    samples: list[tuple[str, str | None]]
    load: "Load"
    kills: int
    """Of the relay, with what was in flight."""


@dataclass(frozen=True, slots=True)
class Load:
    """The part of a run in which the writers wrote: from their start to the last of their events in the cache."""

    started_at: float
    ended_at: float
    events: int

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at

    @property
    def events_per_second(self) -> float:
        return self.events / self.seconds


class Latencies(list[float]):
    """Seconds from COMMIT to the cache, of some probes."""

    def ms(self, percent: float) -> float | None:
        """The smallest that this part of the probes does not exceed, in milliseconds."""
        ordered = sorted(self)
        return round(1000 * ordered[min(len(self) - 1, int(len(self) * percent / 100))], 1) if self else None

    def as_json(self) -> dict[str, float | None]:
        return {"p50": self.ms(50), "p99": self.ms(99), "max": self.ms(100), "probes": len(self)}

    def __str__(self) -> str:
        return f"p50 {self.ms(50)} ms, p99 {self.ms(99)} ms, {len(self):,} probes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The verdict and the figures of one run."""

    verdict: Verdict
    sagas: SagaVerdict
    run: Run

    @property
    def valid(self) -> bool:
        return self.verdict.valid and self.sagas.valid and not self.run.overdue

    @property
    def under_load(self) -> Latencies:
        """While the writers wrote as fast as they could."""
        load = self.run.load
        return Latencies(late for at, late in self.run.latencies if load.started_at <= at < load.ended_at)

    @property
    def quiet(self) -> Latencies:
        """Afterwards, when the probes were the only traffic."""
        return Latencies(late for at, late in self.run.latencies if at >= self.run.load.ended_at)

    def as_json(self) -> str:
        verdict = self.verdict
        body: dict[str, Any] = {
            "valid": self.valid,
            "committed": verdict.committed,
            "published": verdict.published,
            "records": verdict.records,
            "duplicates": verdict.duplicates,
            "rolled_back": verdict.rolled_back,
            "agents": verdict.keys,
            "cached": verdict.cached,
            "samples": verdict.samples,
            "anomalies": {anomaly: finding.count for anomaly, finding in verdict.findings.items()},
            "examples": {anomaly: finding.examples for anomaly, finding in verdict.findings.items() if finding.count},
            "did_not_happen": verdict.did_not_happen,
            "exercised": self.run.done,
            "kills": self.run.kills,
            "seconds": round(self.run.load.seconds, 2),
            "events_per_second": round(self.run.load.events_per_second),
            "commit_to_cache_ms": {"under_load": self.under_load.as_json(), "quiet": self.quiet.as_json()},
            "overdue": self.run.overdue,
            "sagas": self.sagas.as_json(),
        }
        return json.dumps(body, indent=2)


def identity(envelope: Envelope, value: bytes) -> str:
    """What a record says about the change it reports, in the words of the audit trail."""
    try:
        event = json.loads(value)
        name = event.get("agent_name", "-")
        return f"{event['agent_id']} {envelope.event_type} {name} tx {envelope.position and envelope.position[-1]}"
    except (ValueError, KeyError, AttributeError):
        return f"unreadable {value[:40]!r}"


async def reach(stage: Stage, run: Run, sagas: SagaRun, *, hide_record: bool = False) -> Report:
    """Read everything and judge it."""
    async with topic_reader(stage.kafka, TOPIC) as reader:
        records = await reader.records(identity)
        history = History(
            changes=await read_changes(stage.agents.pool, CHANGES),
            records=records[1:] if hide_record else records,
            partition_of=reader.partition_of,
            rolled_back={f"{key} agent.renamed {name} tx {transaction}" for key, name, transaction in run.rolled_back},
            source=await read_rows(stage.agents.pool, SOURCE),
            cache=await read_rows(stage.workflows.pool, CACHE),
            samples=[Sample(key, None if name is None else {"agent_name": name}) for key, name in run.samples],
            duplicates_max=run.kills * limits.WINDOWS_IN_FLIGHT * limits.WINDOW_MAX_EVENTS,
            happened={**run.done, "probes": len(run.latencies), "samples of the cache": len(run.samples)},
        )
    return Report(verdict=judge(history), sagas=await saga_verdict.reach(stage, sagas), run=run)


def print_report(console: Console, report: Report) -> None:
    """For people."""
    console.print(Group(_checks(report), Text(), _figures(report)))
    if report.valid:
        console.print("\n[bold green]VALID[/]: every promise was kept")
        return
    console.print("\n[bold red]NOT VALID[/]")
    for part in (report.verdict, report.sagas):
        if not part.valid:
            console.print(part.explain(), markup=False, soft_wrap=True)


def _checks(report: Report) -> RenderableType:
    verdict = report.verdict
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(width=1)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(" ", f"{verdict.committed:,}", f"events of {verdict.keys:,} agents committed")
    table.add_row(" ", f"{verdict.rolled_back:,}", "events emitted and rolled back")
    table.add_row(" ", f"{verdict.duplicates:,}", "duplicates")
    table.add_row(" ", f"{verdict.cached:,}", "rows in the cache")
    table.add_row(" ", f"{verdict.samples:,}", "samples taken of them meanwhile")
    published = verdict.published == verdict.committed
    table.add_row(_mark(good=published), f"{verdict.published:,}", "of the committed events published")
    for anomaly, meaning in MEANING.items():
        count = verdict.count(anomaly)
        table.add_row(_mark(good=not count), f"{count:,}", meaning)
    overdue = report.run.overdue
    table.add_row(_mark(good=not overdue), f"{overdue:,}", f"probes not in the cache after {OVERDUE_SECONDS:.0f} s")
    sagas = report.sagas
    table.add_row()
    table.add_row(" ", f"{len(sagas.run.asked):,}", "sagas over four services, each with its own database")
    for end, count in sagas.ends.items():
        table.add_row(" ", f"{count:,}", end)
    table.add_row(" ", f"{sagas.kept:,}", "effects kept, in the tables of those services")
    table.add_row(" ", f"{sagas.undone:,}", "effects undone there")
    for fault, finding in sagas.findings.items():
        table.add_row(_mark(good=not finding.count), f"{finding.count:,}", saga_verdict.MEANING[fault])
    return table


def _figures(report: Report) -> RenderableType:
    load = report.run.load
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "throughput", f"{load.events_per_second:,.0f} events/s for {load.seconds:.1f} s, from COMMIT to the cache"
    )
    table.add_row("COMMIT to cache", f"{report.under_load}, under this load")
    table.add_row("", f"{report.quiet}, at {1 / PROBE_SECONDS:.0f} events/s")
    if report.run.kills:
        table.add_row("killed", "relay and workflow service, halfway, with SIGKILL")
    takeover = report.sagas.run.takeover
    table.add_row(
        "killed", f"the worker of {takeover.sagas:,} sagas; another one had them {takeover.seconds:.1f} s later"
    )
    table.add_row("exercised", ", ".join(f"{count:,} {what}" for what, count in report.run.done.items()))
    table.add_row("troubles", ", ".join(f"{count:,} {what}" for what, count in report.sagas.run.happened.items()))
    return table


def _mark(*, good: bool) -> Text:
    return Text("✓", style="green") if good else Text("✗", style="bold red")
