"""`saga check --live` on the terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from outbox.cli.exits import UsageProblem
from outbox.cli.run import err, out
from outbox.cli.visible import visible
from saga import live
from saga.cli.common import database, go, leave_with_problem, print_value, settings_for
from saga.cli.timeline import STYLES
from saga.definition import Saga
from saga.live import Report, Trouble
from saga.settings import Settings

_STYLES: Final[dict[live.Kind, str]] = {
    "diverged": "bold red",
    "unreadable": "red",
    "no-undo": "bold magenta",
    "breaks": "red",
    "no-code": "yellow",
}


def replay_live(
    context: typer.Context,
    named: dict[str, list[Saga[Any, Any]]],
    name: str | None,
    limit: int,
    database_url: str | None,
    *,
    as_json: bool,
) -> None:
    """Replay, report, and leave with 1 where the code cannot go on with something.

    Raises:
        UsageProblem: the module has no sagas, or none of this name.
    """
    if not named or (name is not None and name not in named):
        raise UsageProblem(f"the module has no saga {name or 'at all'}; it has: {', '.join(sorted(named)) or 'none'}")
    sagas = [one for versions in named.values() for one in versions]
    go(_replay(settings_for(context, database_url), sagas, name, limit, as_json=as_json))


async def _replay(
    settings: Settings, sagas: list[Saga[Any, Any]], name: str | None, limit: int, *, as_json: bool
) -> None:
    async with database(settings, "check") as pool:
        # What a body prints is not what this command says.
        with _bar(shown=err.is_terminal and not as_json) as progress, redirect_stdout(sys.stderr):
            report = await live.check(pool, sagas, name=name, keep=limit, progress=progress)
    if as_json:
        print_value(_as_json(report))
    else:
        _show(report)
    if report.counts:
        leave_with_problem()


@contextmanager
def _bar(*, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal that goes when it is done."""
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=err, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=None)

        def progress(seen: int, total: int) -> None:
            bar.update(task, completed=seen, total=total)

        yield progress


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "checked": report.checked,
        "troubles": [asdict(one) for one in report.troubles],
        "counts": dict(report.counts),
        "more": report.counts.total() > len(report.troubles),
        "not_in_module": dict(report.others),
    }


def _show(report: Report) -> None:
    if report.troubles:
        out.print(_table(report.troubles))
        hidden = report.counts.total() - len(report.troubles)
        if hidden:
            out.print(f"and {hidden:,} more: raise --limit, or narrow with --saga", style="dim")
        out.print()
    for kind, count in report.counts.most_common():
        out.print(
            Text.assemble((f"{count:,} {kind}", _STYLES[kind]), f": {live.REMEDIES[kind]}"),
            soft_wrap=not out.is_terminal,
        )
    if report.others:
        others = ", ".join(f"{visible(name)} ({count:,})" for name, count in sorted(report.others.items()))
        out.print(f"not looked at, as the module has no such sagas: {others}", style="dim")
    if not report.checked and not report.counts:
        out.print("nothing of it is in flight")
        return
    goes_on = report.checked - sum(count for kind, count in report.counts.items() if kind != "no-code")
    style = "green" if not report.counts else ""
    out.print(Text(f"{report.checked:,} in flight replayed, the code goes on with {goes_on:,}", style=style))


def _table(troubles: list[Trouble]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("Saga/key", "State", "Problem", "Step", "Expected", "Found"):
        table.add_column(heading, overflow="fold")
    for one in troubles:
        table.add_row(
            Text(visible(f"{one.saga}/{one.key}")),
            Text(one.state, style=STYLES.get(one.state, "")),
            Text(one.kind, style=_STYLES[one.kind]),
            Text(visible(one.step or "")),
            Text(visible(one.expected)),
            Text(visible(one.found)),
        )
    return table
