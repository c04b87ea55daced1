"""How far everybody is, for the person who watches: bars on a terminal, a line a second elsewhere."""

import time
from collections import deque
from dataclasses import dataclass
from typing import Final, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from examples.agents.stage import Stage
from tests.support.history import TopicReader

RATE_OVER_SECONDS: Final = 2.0
LINE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Standing:
    """How many events have got how far."""

    at: float
    committed: int
    published: int
    applied: int

    @property
    def behind(self) -> int:
        return self.committed - self.applied


class Watch:
    """Shows how far everybody is."""

    def __init__(self, set_up: Stage, reader: TopicReader, screen: "Display | None" = None) -> None:
        self._set_up = set_up
        self._reader = reader
        self._screen = screen

    async def look(self) -> Standing:
        """The last in the chain is asked first, so that nobody appears to be ahead of his source."""
        applied = await self._set_up.cache.fetchval(
            "select coalesce(sum(next_offset), 0)::bigint from outbox.positions"
        )
        published = await self._reader.count()
        committed = await self._set_up.owner.fetchval("select count(*) from agent_changes")
        standing = Standing(time.perf_counter(), committed, published, applied)
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
        self._console.print(
            f"{standing.at - self._start:5.0f} s  committed {standing.committed:,}  published {standing.published:,}  "
            f"in the cache {standing.applied:,}  behind {standing.behind:,}"
        )


class Bars:
    """Three bars that race."""

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
        total = max(self._expected, now.committed)
        rows = Table.grid(padding=(0, 2), expand=False)
        rows.add_column()
        rows.add_column(width=36)
        rows.add_column(justify="right", width=9)
        rows.add_column(justify="right", width=10, style="dim")
        for name, count, colour in (
            ("committed", now.committed, "cyan"),
            ("published", now.published, "blue"),
            ("in the cache", now.applied, "green"),
        ):
            bar = ProgressBar(total=total, completed=count, complete_style=colour, finished_style=colour)
            rows.add_row(name, bar, f"{count:,}", f"{self._rate(name):,.0f}/s")
        elapsed = Text(f"{now.at - self._start:.0f} s, {now.behind:,} events on the way", style="dim")
        rows.add_row("", elapsed, "", "")
        return rows

    def _rate(self, name: str) -> float:
        field = {"committed": "committed", "published": "published", "in the cache": "applied"}[name]
        first, last = self._recent[0], self._recent[-1]
        gained: int = getattr(last, field) - getattr(first, field)
        return gained / (last.at - first.at) if last.at > first.at else 0.0
