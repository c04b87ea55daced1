"""What the commands share: the console, how busy the machine is without us, errors that end a run in one line."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Final

import psutil
import typer
from rich.console import Console

from benchmarks.processes import ProcessFailedError
from benchmarks.real_kafka import UnavailableError
from benchmarks.report import Report
from outbox.embedded import EmbeddedServerError

_PLAIN_WIDTH: Final = 120
_QUIET_PERCENT: Final = 10.0


def console() -> Console:
    """Wide enough for the figures where the output is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=_PLAIN_WIDTH)


async def other_load(report: Report) -> None:
    """How busy the machine is without us; called before and after."""
    report.section("Machine")
    report.add("other_cpu_percent", await asyncio.to_thread(psutil.cpu_percent, 2.0), "%", 2)


def warn_of_noise(report: Report, console: Console) -> None:
    """Say so where other programs took part of the machine."""
    if report["other_cpu_percent"] > _QUIET_PERCENT:
        console.print("[yellow]Other programs kept this machine busy: trust CPU an event, not rates or latency.[/]")


def finish(measurement: Awaitable[None], report: Report, console: Console, json_file: Path | None, title: str) -> None:
    """Measure, then show and write what there is, also where it ended early.

    Raises:
        typer.Exit: with status 1, after saying why.
    """

    async def measure() -> None:
        await measurement

    try:
        asyncio.run(measure())
    except (EmbeddedServerError, ProcessFailedError, TimeoutError, UnavailableError) as error:
        Console(stderr=True).print(f"[bold red]stopped:[/] {error}")
        raise typer.Exit(1) from error
    finally:
        if json_file is not None:
            report.write(json_file)
        report.show(console, title)
