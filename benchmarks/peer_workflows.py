"""DBOS, Absurd and Edda: workflows of three steps that do nothing, on the same server, in the same run.

Each has an environment and a database of its own, and runs in one process, and then in two. A few settings are tried
each time; the best one counts.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, NamedTuple

import asyncpg

from benchmarks import peer_environment
from benchmarks.processes import Child
from benchmarks.report import Report
from benchmarks.saga_ground import Ground, Plan, counters, empty_database
from outbox import Pool

_STEPS: Final = 3
_START_SECONDS: Final = 60.0
_TIME_LIMIT_SECONDS: Final = 300.0


class Setting(NamedTuple):
    """What a peer runs with."""

    concurrent: int
    connections: int
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One of them."""

    name: str
    title: str
    settings: tuple[Setting, ...]
    times: int
    """As many workflows as of the slowest one, times this."""
    recorded: str
    """Query: workflows that are completed, and results of steps."""

    def prepare(self) -> None:
        """Install it, if that has not been done.

        Raises:
            UnavailableError: that is not possible.
        """
        peer_environment.interpreter(self.name)

    async def measure(self, ground: Ground, plan: Plan, report: Report) -> None:
        """All settings, one after the other."""
        report.section(f"{self.title}, 3 steps")
        count, found = plan.peer_workflows * self.times, dict[Setting, _Found]()
        for setting in self.settings:
            async with (
                empty_database(ground.databases) as url,
                asyncpg.create_pool(url, min_size=1, max_size=1) as pool,
            ):
                found[setting] = await self._run(url, pool, setting, count)
            name = "x".join(map(str, setting))
            report.add(f"{self.name}_per_second_c{name}", found[setting].per_second, "sagas/s", count)
        best = max(it for setting, it in found.items() if setting.processes == 1)
        report.add(f"{self.name}_per_second", best.per_second, "sagas/s", count)
        report.add(f"{self.name}_commits_per_saga", best.commits / count, "commits", count)
        report.add(f"{self.name}_wal_bytes_per_saga", best.wal_bytes / count, "bytes", count)
        report.add(f"{self.name}_cpu_ms_per_saga", best.cpu_seconds / count * 1_000, "ms", count)
        report.add(f"{self.name}_step_p50_ms", best.step_p50_seconds * 1_000, "ms", count)
        report.add(f"{self.name}_step_p99_ms", best.step_p99_seconds * 1_000, "ms", count)
        best = max(it for setting, it in found.items() if setting.processes > 1)
        report.add(f"{self.name}_two_processes_per_second", best.per_second, "sagas/s", count)

    async def _run(self, url: str, pool: Pool, setting: Setting, count: int) -> "_Found":
        with ExitStack() as stack:
            go = Path(stack.enter_context(TemporaryDirectory(prefix="sagabox-bench-"))) / "go"
            children = []
            for number in range(1, setting.processes + 1):
                children.append(child := stack.enter_context(self._child(url, setting, count, number, go)))
                await child.says("ready", timeout_seconds=_START_SECONDS)
            before = await counters(pool)
            go.touch()
            took = [await child.result(timeout_seconds=_TIME_LIMIT_SECONDS) for child in children]
            after = await counters(pool)
        completed, steps = await pool.fetchrow(self.recorded) or (0, 0)
        assert completed >= count, f"{self.title}: {completed} of {count} workflows are completed"
        assert steps == completed * _STEPS, f"{self.title}: {steps} results of {completed} workflows are recorded"
        seconds = max(one["ended"] for one in took) - min(one["began"] for one in took)
        return _Found(
            per_second=count / seconds,
            commits=after.commits - before.commits,
            wal_bytes=after.wal_bytes - before.wal_bytes,
            cpu_seconds=sum(one["cpu"] for one in took),
            step_p50_seconds=max(one["p50"] for one in took),
            step_p99_seconds=max(one["p99"] for one in took),
        )

    def _child(self, url: str, setting: Setting, count: int, number: int, go: Path) -> Child:
        numbers = (setting.concurrent, setting.connections, count // setting.processes, number, setting.processes)
        arguments = [f"benchmarks._{self.name}_app", url, *map(str, numbers), str(go)]
        return Child(self.name, [str(peer_environment.interpreter(self.name)), "-m", *arguments])


class _Found(NamedTuple):
    per_second: float
    commits: int
    wal_bytes: int
    cpu_seconds: float
    step_p50_seconds: float
    step_p99_seconds: float


DBOS: Final = Peer(
    name="dbos",
    title="DBOS",
    settings=(Setting(20, 20), Setting(200, 20), Setting(20, 20, 2)),  # 20 connections are its default
    times=1,
    recorded="""
        select (select count(*) from dbos.workflow_status where status = 'SUCCESS'),
               (select count(*) from dbos.operation_outputs)""",
)
ABSURD: Final = Peer(
    name="absurd",
    title="Absurd",
    settings=(Setting(20, 1), Setting(20, 8), Setting(200, 8), Setting(20, 4, 2), Setting(20, 8, 2)),
    times=4,
    recorded="""
        select (select count(*) from absurd.t_default where state = 'completed'),
               (select count(*) from absurd.c_default where status = 'committed')""",
)
EDDA: Final = Peer(
    name="edda",
    title="Edda",
    settings=(Setting(20, 20), Setting(200, 20), Setting(20, 20, 2)),  # its guide's pool for production
    times=1,
    recorded="""
        select (select count(*) from workflow_instances where status = 'completed'),
               (select count(*) from workflow_history where event_type = 'ActivityCompleted')""",
)
