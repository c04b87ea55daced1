"""Figures: repetitions collected by name, shown to a person, written for a program."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(slots=True)
class Figure:
    """One metric and its repetitions."""

    metric: str
    unit: str
    n: int
    section: str
    values: list[float] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.values)


class Report:
    """All figures of one run, in the order in which they were first measured."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._figures: dict[str, Figure] = {}
        self._section = ""

    def section(self, title: str) -> None:
        """The heading under which what follows is shown."""
        self._section = title

    def add(self, metric: str, value: float, unit: str, n: int) -> None:
        """One repetition of a metric; `n` is how many events (or seconds, for a share of CPU) it is made of."""
        figure = self._figures.setdefault(metric, Figure(metric, unit, n, self._section))
        figure.values.append(value)

    def __getitem__(self, metric: str) -> float:
        """The median of a metric measured before."""
        return self._figures[metric].value

    def __contains__(self, metric: str) -> bool:
        return metric in self._figures

    def write(self, file: Path) -> None:
        """A JSON list, one object a metric."""
        rows = [
            {"metric": f.metric, "value": round(f.value, 6), "unit": f.unit, "n": f.n} for f in self._figures.values()
        ]
        file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")

    def show(self, console: Console, title: str) -> None:
        """A table; with several repetitions, the median and the extremes."""
        table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
        for name in ("", "median", "unit", "lowest", "highest", "n"):
            table.add_column(name, justify="left" if name in {"", "unit"} else "right", no_wrap=True)
        section = None
        sections = list(dict.fromkeys(figure.section for figure in self._figures.values()))
        for figure in sorted(self._figures.values(), key=lambda figure: sections.index(figure.section)):
            if figure.section != section:
                section = figure.section
                table.add_row(f"\n[bold cyan]{section}[/]")
            spread = [_text(min(figure.values)), _text(max(figure.values))] if len(figure.values) > 1 else ["", ""]
            table.add_row(f"  {figure.metric}", _text(figure.value), figure.unit, *spread, f"{figure.n:,}")
        console.print(table)


def _text(value: float) -> str:
    if abs(value) >= 1_000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value else "0"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, min(len(ordered) - 1, round(share * len(ordered) + 0.5) - 1))]
