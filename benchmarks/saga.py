"""`python -m benchmarks.saga`: how fast sagas are, next to the bare statement that each step cannot do without."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final
from uuid import uuid4

import asyncpg
import typer
from rich.console import Console

from benchmarks import command, saga_floor, saga_takeover, sagas
from benchmarks.report import Report
from benchmarks.sagas import Ground, Plan
from outbox import embedded
from outbox.embedded import Databases, Postgres
from outbox.upkeep import migrate

_EPILOG: Final = """
[b]Examples[/b]

python -m benchmarks.saga\n
python -m benchmarks.saga --json figures.json --repeat 5\n
python -m benchmarks.saga --only happy --only floor\n
python -m benchmarks.saga --quick
"""
_CONNECTIONS: Final = 16


class Part(StrEnum):
    """What can be measured by itself."""

    HAPPY = "happy"
    FLOOR = "floor"
    LONG = "long"
    COMPENSATING = "compensating"
    TAKEOVER = "takeover"


_PARTS: Final[dict[Part, Callable[[Ground, Plan, Report], Awaitable[None]]]] = {
    Part.HAPPY: sagas.happy,
    Part.FLOOR: saga_floor.floor,
    Part.LONG: sagas.long,
    Part.COMPENSATING: sagas.compensating,
    Part.TAKEOVER: saga_takeover.takeover,
}


async def measure(parts: list[Part], plan: Plan, report: Report, console: Console) -> None:
    """All parts by turns, each on a database of its own, as often as the plan says."""
    await command.other_load(report)
    with ExitStack() as stack:
        url = os.environ.get(embedded.DATABASE_URL)
        databases = Databases(url) if url else stack.enter_context(Postgres())
        for number in range(plan.repeat):
            for part in parts:
                console.print(f"{part} ({number + 1} of {plan.repeat}) ...", highlight=False)
                async with fresh(databases) as ground:
                    await _PARTS[part](ground, plan, report)
    _shares(plan, report)
    await command.other_load(report)
    command.warn_of_noise(report, console)


def _shares(plan: Plan, report: Report) -> None:
    """Of the floor of the same run."""
    report.section("Sagas as a share of the floor")
    for concurrent in (1, *plan.concurrent):
        rate, limit = f"saga_per_second_c{concurrent}", f"checkpoint_floor_per_second_c{concurrent}"
        if rate in report and limit in report:
            share = report[rate] / report[limit]
            report.add(f"share_of_floor_c{concurrent}", share, "ratio", plan.count(plan.sagas, concurrent))


@asynccontextmanager
async def fresh(databases: Databases) -> AsyncIterator[Ground]:
    """A migrated database of its own for one measurement."""
    name = f"bench_{uuid4().hex[:12]}"
    url = await asyncio.to_thread(databases.create_database, name)
    try:
        async with asyncpg.create_pool(url, min_size=1, max_size=_CONNECTIONS) as pool:
            await migrate.up(pool)
            await migrate.up(pool, package="saga")
            yield Ground(url=url, pool=pool)
    finally:
        await asyncio.to_thread(databases.drop_database, name)


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
