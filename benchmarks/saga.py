"""`python -m benchmarks.saga`: how fast sagas are, next to the bare statement that each step cannot do without."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import command, saga_floor, saga_processes, saga_size, saga_takeover, sagas
from benchmarks.peer_workflows import ABSURD, DBOS, EDDA
from benchmarks.real_kafka import UnavailableError
from benchmarks.report import Report
from benchmarks.saga_ground import Ground, Plan, fresh
from outbox import embedded
from outbox.embedded import Databases, Postgres

_EPILOG: Final = """
[b]Examples[/b]

python -m benchmarks.saga\n
python -m benchmarks.saga --json figures.json --repeat 5\n
python -m benchmarks.saga --only happy --only floor\n
python -m benchmarks.saga --quick
"""


class Part(StrEnum):
    """What can be measured by itself."""

    HAPPY = "happy"
    FLOOR = "floor"
    LONG = "long"
    COMPENSATING = "compensating"
    PROCESSES = "processes"
    DBOS = "dbos"
    ABSURD = "absurd"
    EDDA = "edda"
    TAKEOVER = "takeover"
    SIZE = "size"


_PEERS: Final = {Part.DBOS: DBOS, Part.ABSURD: ABSURD, Part.EDDA: EDDA}
_PARTS: Final[dict[Part, Callable[[Ground, Plan, Report], Awaitable[None]]]] = {
    Part.HAPPY: sagas.happy,
    Part.FLOOR: saga_floor.floor,
    **{part: peer.measure for part, peer in _PEERS.items()},
    Part.LONG: sagas.long,
    Part.COMPENSATING: sagas.compensating,
    Part.PROCESSES: saga_processes.processes,
    Part.TAKEOVER: saga_takeover.takeover,
    Part.SIZE: saga_size.size,
}


async def measure(parts: list[Part], plan: Plan, report: Report, console: Console) -> None:
    """All parts by turns, each on a database of its own, as often as the plan says."""
    parts = await _available(parts, console)
    await command.other_load(report)
    with ExitStack() as stack:
        url = os.environ.get(embedded.DATABASE_URL)
        databases = Databases(url) if url else stack.enter_context(Postgres())
        for number in range(plan.repeat):
            for part in parts:
                if part is Part.SIZE and number > 0:
                    continue  # it repeats its measurements itself, beside what it has filled in once
                console.print(f"{part} ({number + 1} of {plan.repeat}) ...", highlight=False)
                async with fresh(databases) as ground:
                    await _PARTS[part](ground, plan, report)
    _shares(plan, report)
    await command.other_load(report)
    command.warn_of_noise(report, console)


async def _available(parts: list[Part], console: Console) -> list[Part]:
    """Without the peers that cannot be installed; says which, and why.

    Raises:
        UnavailableError: nothing is left.
    """
    found = []
    for part in parts:
        try:
            if (peer := _PEERS.get(part)) is not None:
                await asyncio.to_thread(peer.prepare)
            found.append(part)
        except UnavailableError as error:
            if parts == [part]:
                raise
            console.print(f"[yellow]without {part}:[/] {escape(str(error))}")
    return found


def _shares(plan: Plan, report: Report) -> None:
    """Of the floor of the same run, and against the peers."""
    report.section("Sagas as a share of the floor")
    for name, kind in (("share_of_floor", "saga"), ("two_services_share_of_floor", "two_services")):
        for concurrent in (1, *plan.concurrent):
            rate, limit = f"{kind}_per_second_c{concurrent}", f"checkpoint_floor_per_second_c{concurrent}"
            if rate in report and limit in report:
                share = report[rate] / report[limit]
                report.add(f"{name}_c{concurrent}", share, "ratio", plan.count(plan.sagas, concurrent))
    for kind, of_peer in (("saga", ""), ("two_services", "_two_processes")):
        rates = [report[rate] for c in plan.concurrent if (rate := f"{kind}_per_second_c{c}") in report]
        for peer in _PEERS.values():
            if rates and (rate := f"{peer.name}{of_peer}_per_second") in report:
                report.section("Sagas beside peers, each at its best, in one process and in two")
                report.add(f"{kind}_to_{peer.name}", max(rates) / report[rate], "ratio", plan.sagas)


app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(epilog=_EPILOG)
def main(
    *,
    count: Annotated[int, typer.Option("--sagas", help="Sagas of each measurement.", min=100)] = Plan().sagas,
    repeat: Annotated[int, typer.Option(help="Repetitions; medians are shown.", min=1)] = Plan().repeat,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    only: Annotated[list[Part] | None, typer.Option(help="Measure this part; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: seconds instead of minutes, no result.")] = False,
) -> None:
    """Measure sagas whose steps do nothing: what is left is what their durability costs.

    Clients start sagas and wait for their results in one process with the worker, 1, 20, 200 and 1,000 at a time. The
    floor is the statements that such a saga cannot do without (start, claim, checkpoints), for as many at a time.
    DBOS, Absurd and Edda run on the same server; each is installed into .cache/peers when it is measured first.
    PostgreSQL is started for the run, or taken from DATABASE_URL.
    """
    plan = Plan(sagas=count, repeat=repeat)
    plan = plan.quick() if quick else plan
    parts = [part for part in _PARTS if part in (only or _PARTS)]
    console, report = command.console(), Report()
    title = "Medians" + (" of small sizes: not a result" if quick else "")
    command.finish(measure(parts, plan, report, console), report, console, json_file, title)


if __name__ == "__main__":
    app()
