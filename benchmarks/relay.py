"""`python -m benchmarks.relay`: what the relay costs and how fast it is, next to its limits and its peers."""

from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Annotated, Final

import typer
from rich.console import Console

from benchmarks import backlog, command, emitting, latency, peer_debezium, peer_faststream, servers
from benchmarks.plan import Bench, Plan
from benchmarks.report import Report

_EPILOG: Final = """
[b]Examples[/b]

python -m benchmarks.relay\n
python -m benchmarks.relay --json figures.json --repeat 5\n
python -m benchmarks.relay --kafka --only throughput --only latency\n
python -m benchmarks.relay --debezium --only debezium\n
python -m benchmarks.relay --quick
"""
_DEFAULTS: Final = Plan()


class Part(StrEnum):
    """What can be measured by itself."""

    THROUGHPUT = "throughput"
    FASTSTREAM = "faststream"
    GROWTH = "growth"
    LATENCY = "latency"
    KILL = "kill"
    IDLE = "idle"
    EMIT = "emit"
    DEBEZIUM = "debezium"


_PARTS: Final[dict[Part, Callable[[Bench], Awaitable[None]]]] = {
    Part.THROUGHPUT: backlog.throughput,
    Part.FASTSTREAM: peer_faststream.relay,
    Part.LATENCY: latency.steady,
    Part.KILL: latency.kill,
    Part.IDLE: latency.idle,
    Part.EMIT: emitting.wal,
    Part.GROWTH: backlog.growth,
    Part.DEBEZIUM: peer_debezium.relay,
}


async def measure(parts: list[Part], plan: Plan, report: Report, console: Console, *, kafka: bool) -> None:
    """All parts, one after the other, on servers of their own."""
    debezium = Part.DEBEZIUM in parts
    await command.other_load(report)
    with servers.running(real_kafka=kafka, logical=debezium) as running:
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
    events: Annotated[int, typer.Option(help="Events of a backlog.", min=1_000)] = _DEFAULTS.events,
    repeat: command.Repeat = _DEFAULTS.repeat,
    json_file: command.JsonFile = None,
    kafka: command.Kafka = False,
    debezium: Annotated[
        bool, typer.Option("--debezium", help="Add Debezium (Java 17, Maven); implies --kafka.")
    ] = False,
    only: Annotated[list[Part] | None, typer.Option(help="Measure this part; may be repeated.")] = None,
    quick: command.Quick = False,
) -> None:
    """Measure the relay: a backlog of events of about 200 bytes, a steady rate, kill -9, idle; its limits; its peers.

    Servers are started for the run, or taken from DATABASE_URL and KAFKA_BOOTSTRAP_SERVERS.
    """
    plan = Plan(events=events, repeat=repeat)
    plan = plan.quick() if quick else plan
    parts = [part for part in command.chosen(_PARTS, only) if debezium or part is not Part.DEBEZIUM]
    console, report = command.console(), Report()
    measurement = measure(parts, plan, report, console, kafka=kafka or debezium)
    command.finish(measurement, report, console, json_file, command.title(quick=quick))


if __name__ == "__main__":
    app()
