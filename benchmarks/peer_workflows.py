"""DBOS, Absurd and Edda: workflows of three steps that do nothing, on the same server, in the same run.

Each runs in one process, with an environment and a database of its own. A few settings are tried each time; the best
one counts.
"""

import asyncio
from dataclasses import dataclass
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
        count, found = plan.peer_workflows * self.times, []
        for setting in self.settings:
            async with (
                empty_database(ground.databases) as url,
                asyncpg.create_pool(url, min_size=1, max_size=1) as pool,
            ):
                found.append(measured := await self._run(url, pool, setting, count))
            name = f"{self.name}_per_second_c{setting.concurrent}x{setting.connections}"
            report.add(name, measured.per_second, "sagas/s", count)
        best = max(found)
        report.add(f"{self.name}_per_second", best.per_second, "sagas/s", count)
        report.add(f"{self.name}_commits_per_saga", best.commits / count, "commits", count)
        report.add(f"{self.name}_wal_bytes_per_saga", best.wal_bytes / count, "bytes", count)
        report.add(f"{self.name}_cpu_ms_per_saga", best.cpu_seconds / count * 1_000, "ms", count)
        report.add(f"{self.name}_step_p50_ms", best.step_p50_seconds * 1_000, "ms", count)
        report.add(f"{self.name}_step_p99_ms", best.step_p99_seconds * 1_000, "ms", count)

    async def _run(self, url: str, pool: Pool, setting: Setting, count: int) -> "_Found":
        python = await asyncio.to_thread(peer_environment.interpreter, self.name)
        arguments = [url, str(setting.concurrent), str(setting.connections), str(count)]
        with Child(self.name, [str(python), "-m", f"benchmarks._{self.name}_app", *arguments]) as child:
            await child.says("begin", timeout_seconds=_START_SECONDS)
            before = await counters(pool)
            took = await child.result(timeout_seconds=_TIME_LIMIT_SECONDS)
            after = await counters(pool)
        completed, steps = await pool.fetchrow(self.recorded) or (0, 0)
        assert completed >= count, f"{self.title}: {completed} of {count} workflows are completed"
        assert steps == completed * _STEPS, f"{self.title}: {steps} results of {completed} workflows are recorded"
        return _Found(
            per_second=count / took["seconds"],
            commits=after.commits - before.commits,
            wal_bytes=after.wal_bytes - before.wal_bytes,
            cpu_seconds=took["cpu_seconds"],
            step_p50_seconds=took["step_p50"],
            step_p99_seconds=took["step_p99"],
        )


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
    settings=(Setting(20, 20), Setting(200, 20)),  # 20 is its default
    times=1,
    recorded="""
        select (select count(*) from dbos.workflow_status where status = 'SUCCESS'),
               (select count(*) from dbos.operation_outputs)""",
)
ABSURD: Final = Peer(
    name="absurd",
    title="Absurd",
    settings=(Setting(20, 1), Setting(20, 8), Setting(200, 8)),
    times=4,
    recorded="""
        select (select count(*) from absurd.t_default where state = 'completed'),
               (select count(*) from absurd.c_default where status = 'committed')""",
)
EDDA: Final = Peer(
    name="edda",
    title="Edda",
    settings=(Setting(20, 20), Setting(200, 20)),  # its guide's pool for production
    times=1,
    recorded="""
        select (select count(*) from workflow_instances where status = 'completed'),
               (select count(*) from workflow_history where event_type = 'ActivityCompleted')""",
)
