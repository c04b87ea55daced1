"""What the commands share: options, the console, how busy the machine is, errors that end a run in one line."""

import asyncio
from collections.abc import Awaitable, Iterable
from pathlib import Path
from typing import Annotated, Final, TypeVar

import psutil
import typer
from rich.console import Console

from benchmarks.processes import ProcessFailedError
from benchmarks.real_kafka import UnavailableError
from benchmarks.report import Report
from outbox.embedded import EmbeddedServerError

Repeat = Annotated[int, typer.Option(help="Repetitions of each rate; medians are shown.", min=1)]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Kafka = Annotated[bool, typer.Option("--kafka", help="Apache Kafka instead of the embedded broker.")]
Quick = Annotated[bool, typer.Option("--quick", help="Small sizes: seconds instead of minutes, no result.")]

P = TypeVar("P")

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


def chosen(parts: Iterable[P], only: list[P] | None) -> list[P]:
    """The parts that were asked for, in their own order; all of them where none was."""
    return [part for part in parts if part in (only or [part])]


def title(*, quick: bool) -> str:
    """Above the figures."""
    return "Medians" + (" of small sizes: not a result" if quick else "")


def finish(
    measurement: Awaitable[None], report: Report, console: Console, json_file: Path | None, heading: str
) -> None:
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
        report.show(console, heading)
