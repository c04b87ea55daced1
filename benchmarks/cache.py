"""`python -m benchmarks.cache`: what a consumer costs and how fast it is, next to its floor and to a plain handler."""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Annotated, Final

import typer
from rich.console import Console

from benchmarks import backlog, caching, command, rebuilding, servers
from benchmarks.plan import Bench, Plan
from benchmarks.report import Report

_EPILOG: Final = """
[b]Examples[/b]

python -m benchmarks.cache\n
python -m benchmarks.cache --json figures.json --repeat 5\n
python -m benchmarks.cache --kafka --only cache\n
python -m benchmarks.cache --quick
"""
_DEFAULTS: Final = Plan()


class Part(StrEnum):
    """What can be measured by itself."""

    CACHE = "cache"
    PLAIN = "plain"
    INBOX = "inbox"
    REBUILD = "rebuild"


_PARTS: Final[dict[Part, Callable[[Bench], Awaitable[None]]]] = {
    Part.CACHE: caching.throughput,
    Part.PLAIN: caching.plain,
    Part.INBOX: caching.inbox,
    Part.REBUILD: rebuilding.rebuild,
}


async def measure(parts: list[Part], plan: Plan, report: Report, console: Console, *, kafka: bool) -> None:
    """All parts, one after the other, on servers of their own."""
    await command.other_load(report)
    with servers.running(real_kafka=kafka, logical=False) as running:
        bench = Bench(running, plan, report, console)
        with bench.progress:
            if kafka:
                await backlog.warm_up_broker(bench)
            for part in parts:
                await _PARTS[part](bench)
    await command.other_load(report)
    command.warn_of_noise(report, console)


app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.command(epilog=_EPILOG)
def main(
    *,
    events: Annotated[int, typer.Option(help="Events in the topic.", min=1_000)] = _DEFAULTS.events,
    repeat: command.Repeat = _DEFAULTS.repeat,
    json_file: command.JsonFile = None,
    kafka: command.Kafka = False,
    only: Annotated[list[Part] | None, typer.Option(help="Measure this part; may be repeated.")] = None,
    quick: command.Quick = False,
) -> None:
    """Measure a consumer: events of about 200 bytes from Kafka into a cache; the upsert alone; a plain handler.

    Servers are started for the run, or taken from DATABASE_URL and KAFKA_BOOTSTRAP_SERVERS.
    """
    plan = Plan(events=events, repeat=repeat)
    plan = plan.quick() if quick else plan
    console, report = command.console(), Report()
    measurement = measure(command.chosen(_PARTS, only), plan, report, console, kafka=kafka)
    command.finish(measurement, report, console, json_file, command.title(quick=quick))


if __name__ == "__main__":
    app()
