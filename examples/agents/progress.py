"""How far everybody is, for the person who watches: bars on a terminal, a line a second elsewhere."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from examples.agents.stage import TOPIC, Stage
from tests.support.history import TopicReader

RATE_OVER_SECONDS: Final = 2.0
LINE_SECONDS: Final = 1.0


class Count(NamedTuple):
    """One of the numbers that are watched."""

    name: str
    value: int
    colour: str


class Standing(Protocol):
    """How far everybody is at one moment."""

    @property
    def at(self) -> float: ...
    @property
    def counts(self) -> Sequence[Count]: ...
    @property
    def left(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Events:
    """How many events have got how far."""

    at: float
    committed: int
    published: int
    applied: int

    @property
    def counts(self) -> Sequence[Count]:
        return (
            Count("committed", self.committed, "cyan"),
            Count("published", self.published, "blue"),
            Count("in the cache", self.applied, "green"),
        )

    @property
    def left(self) -> str:
        # What is published twice is applied twice, as far as offsets tell.
        return f"{max(0, self.committed - self.applied):,} events on the way"


class Watch:
    """Shows how far the events are."""

    def __init__(self, set_up: Stage, reader: TopicReader, screen: "Display | None" = None) -> None:
        self._set_up = set_up
        self._reader = reader
        self._screen = screen

    async def look(self) -> Events:
        """The last in the chain is asked first, so that nobody appears to be ahead of his source."""
        applied = await self._set_up.workflows.pool.fetchval(
            "select coalesce(sum(next_offset), 0)::bigint from outbox.positions where topic = $1", TOPIC
        )
        published = await self._reader.count()
        committed = await self._set_up.agents.pool.fetchval("select count(*) from agent_changes")
        standing = Events(time.perf_counter(), committed, published, applied)
        if self._screen:
            self._screen.show(standing)
        return standing


class Display(Protocol):
    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...
    def show(self, standing: Standing) -> None: ...


def display(console: Console, expected: int) -> Display:
    """The display that fits the console."""
    return Bars(console, expected) if console.is_terminal else Lines(console)


class Lines:
    """One line a second."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start: float | None = None
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def show(self, standing: Standing) -> None:
        if standing.at < self._next:
            return
        self._start = self._start or standing.at
        self._next = standing.at + LINE_SECONDS
        counts = "  ".join(f"{count.name} {count.value:,}" for count in standing.counts)
        self._console.print(f"{standing.at - self._start:5.0f} s  {counts}  {standing.left}")


class Bars:
    """Bars that race."""

    def __init__(self, console: Console, expected: int) -> None:
        self._expected = expected
        self._recent: deque[Standing] = deque()
        self._live = Live(console=console, refresh_per_second=8)
        self._start = time.perf_counter()

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def show(self, standing: Standing) -> None:
        self._recent.append(standing)
        while standing.at - self._recent[0].at > RATE_OVER_SECONDS:
            self._recent.popleft()
        self._live.update(self._render(standing))

    def _render(self, now: Standing) -> Table:
        total = max(self._expected, *(count.value for count in now.counts))
        rows = Table.grid(padding=(0, 2), expand=False)
        rows.add_column()
        rows.add_column(width=36)
        rows.add_column(justify="right", width=9)
        rows.add_column(justify="right", width=10, style="dim")
        for place, (name, value, colour) in enumerate(now.counts):
            bar = ProgressBar(total=total, completed=value, complete_style=colour, finished_style=colour)
            rows.add_row(name, bar, f"{value:,}", f"{self._rate(place):,.0f}/s")
        rows.add_row("", Text(f"{now.at - self._start:.0f} s, {now.left}", style="dim"), "", "")
        return rows

    def _rate(self, place: int) -> float:
        first, last = self._recent[0], self._recent[-1]
        gained = last.counts[place].value - first.counts[place].value
        return gained / (last.at - first.at) if last.at > first.at else 0.0
