"""How much of everything one run measures, and the progress that it shows meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.report import Report
from benchmarks.servers import Servers


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes; `quick` is enough to see that everything works and for nothing else."""

    events: int = 400_000
    repeat: int = 3
    backlog_small: int = 100_000
    backlog_large: int = 1_000_000
    peer_events: int = 40_000
    plain_events: int = 10_000
    inbox_events: int = 60_000
    debezium_events: int = 2_000_000
    keys_few: int = 10_000
    owner_rows: int = 1_000_000
    owner_rate: int = 1_000
    keys_many: int = 100_000
    warm_up_events: int = 2_000
    rate: int = 2_000
    warm_up_seconds: float = 5.0
    load_seconds: float = 20.0
    after_kill_seconds: float = 15.0
    idle_seconds: float = 10.0
    first_events: int = 40
    emits: int = 5_000

    def quick(self) -> "Plan":
        """Everything at a size that takes seconds."""
        return replace(
            self,
            events=6_000,
            repeat=1,
            backlog_small=4_000,
            backlog_large=12_000,
            peer_events=400,
            plain_events=400,
            inbox_events=1_200,
            keys_few=100,
            owner_rows=12_000,
            owner_rate=100,
            keys_many=4_000,
            warm_up_events=200,
            rate=200,
            warm_up_seconds=0.5,
            load_seconds=1.5,
            after_kill_seconds=6.5,
            idle_seconds=1.0,
            first_events=3,
            emits=200,
        )


class Bench:
    """What every measurement gets: servers, sizes, a place for figures, a way to say how far it is."""

    def __init__(self, servers: Servers, plan: Plan, report: Report, console: Console) -> None:
        """For one run."""
        self.servers = servers
        self.plan = plan
        self.report = report
        self.console = console
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<46}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
            transient=True,
        )

    @contextmanager
    def step(self, title: str, total: float) -> Iterator[Callable[[float], None]]:
        """A bar for the length of the block; call what it yields with how much is done."""
        if not self.console.is_terminal:
            self.console.print(f"{title} ...", highlight=False)
        task = self.progress.add_task(title, total=int(total))
        try:
            yield lambda done: self.progress.update(task, completed=int(done))
        finally:
            self.progress.remove_task(task)
