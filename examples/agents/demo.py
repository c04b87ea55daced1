"""The demo: four services, each with a database, and an exact verdict on what arrived and on what sagas left.

    agent service (writers)  ->  llm_agent_db  ->  relay  ->  Kafka  ->  workflow service  ->  workflow_agent_cache

`make demo` runs it on embedded servers. Every box with an arrow is a process of its own. When the events have arrived
the sagas begin, see `workflows`.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from rich.console import Console

from examples.agents import agent_service, sabotage
from examples.agents.progress import Events, Watch, display
from examples.agents.saga_verdict import SagaRun
from examples.agents.stage import OUTBOX, TOPIC, DemoError, Stage, stage
from examples.agents.traffic import POPULAR
from examples.agents.verdict import Load, Report, Run, print_report, reach
from examples.agents.workflows import Workflows
from outbox.embedded.process import ServerProcess
from tests.support.history import topic_reader

PROCESSES: Final = 2
WRITERS: Final = 8
QUIET_PROBES_MAX: Final = 200
SAGAS_MIN: Final = 40
START_TIMEOUT_SECONDS: Final = 30.0
WRITE_TIMEOUT_SECONDS: Final = 3600.0
ARRIVE_TIMEOUT_SECONDS: Final = 30.0

EXAMPLES: Final = """
examples:
  python -m examples.agents.demo                     10,000 events or 20 seconds, 300 sagas, then the verdict
  python -m examples.agents.demo --events 100000     more events, however long it takes
  python -m examples.agents.demo --kill              kill -9 the relay and the consumer halfway, start others
  python -m examples.agents.demo --json | jq .valid  for programs; progress goes to stderr
  python -m examples.agents.demo --sabotage cache    see the verdict fail: a row of the cache is deleted first
  python -m examples.agents.demo --sabotage effect_twice  the same with an effect of a saga

exit codes: 0 every check holds, 1 one does not or something failed, 2 wrong arguments
servers of your own: set DATABASE_URL and KAFKA_BOOTSTRAP_SERVERS
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.agents.demo",
        description=(__doc__ or "").partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--events", type=int, metavar="N", help="commit N events, however long it takes (default: 10,000 or 20 s)"
    )
    parser.add_argument("--sagas", type=int, default=300, metavar="N", help="run N sagas (default: 300)")
    parser.add_argument("--seed", type=int, default=1, help="of the writers' choices; what interleaves is up to chance")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.add_argument("--kill", action="store_true", help="kill -9 relay and workflow service halfway, start others")
    parser.add_argument(
        "--sabotage",
        action="append",
        default=[],
        choices=[sabotage.RECORD, *sabotage.STATEMENTS],
        help="hide a record, or spoil a row",
    )
    options = parser.parse_args()
    options.seconds = WRITE_TIMEOUT_SECONDS
    if options.events is None:
        options.events, options.seconds = 10_000, 20.0
    if options.events < 1:
        parser.error("--events must be at least 1")
    if options.sagas < SAGAS_MIN:
        parser.error(f"--sagas must be at least {SAGAS_MIN}: fewer do not run into every trouble")
    return options


class Demo:
    """One run: every service in its process, the writers, the wait for the last event, the verdict."""

    def __init__(self, set_up: Stage, options: argparse.Namespace, console: Console, reports: Path) -> None:
        self._set_up = set_up
        self._options = options
        self._console = console
        self._reports = reports
        self._kills = 0

    async def run(self) -> Report:
        say = self._console.print
        say("starting relay, workflow service and observer, each in a process of its own ...")
        relay, workflows = self._start_relay(), self._start_workflow_service()
        observer = await self._start_observer()
        async with topic_reader(self._set_up.kafka, TOPIC) as reader:
            say(f"{PROCESSES} processes with {WRITERS} writers each commit {self._options.events:,} events ...")
            with display(self._console, self._options.events) as screen:
                watch = Watch(self._set_up, reader, screen)
                writers = await self._start_writers()
                before = await watch.look()
                if self._options.kill:
                    await self._until_half(watch, before)
                    self._set_up.kill(relay)
                    self._set_up.kill(workflows)
                    relay, workflows = self._start_relay(), self._start_workflow_service()
                    self._kills = 1
                load = await self._until_all_is_cached(watch, writers, before)
            say("the writers are done; the probes go on alone for a while ...")
            await self._until_enough_probes(Watch(self._set_up, reader))
            await self._set_up.stop(observer)
            await self._until_nothing_is_on_the_way(Watch(self._set_up, reader))
        sagas = await Workflows(self._set_up, self._console, self._options.sagas).run()
        await self._set_up.stop(relay)
        await self._set_up.stop(workflows)
        say("comparing what was committed with what arrived, and outcomes with effects ...\n")
        return await self._judge(load, sagas)

    # ------------------------------------------------------------------------------------------ processes

    def _start_relay(self) -> ServerProcess:
        return self._set_up.start("relay", OUTBOX, "relay", database=self._set_up.agents)

    def _start_workflow_service(self) -> ServerProcess:
        return self._set_up.start_python(
            "workflow-service", "examples.agents.workflow_service", database=self._set_up.workflows
        )

    async def _start_observer(self) -> ServerProcess:
        """Returns when events go all the way, its own included."""
        set_up = self._set_up
        for number, agent_id in enumerate(POPULAR):
            await agent_service.create(set_up.agents.pool, agent_id, f"popular {number}")
        await self._until_cached(len(POPULAR))
        observer = set_up.start_python(
            "observer", "examples.agents.observer", "--report", self._reports / "observer",
            database=set_up.agents,
        )  # fmt: skip
        await self._until_cached(len(POPULAR) + 1)
        return observer

    async def _start_writers(self) -> list[ServerProcess]:
        """Returns when the first of them has written."""
        set_up = self._set_up
        writers = [
            set_up.start_python(
                f"writers-{number}", "examples.agents.traffic", "--name", f"w{number}", "--writers", str(WRITERS),
                "--events", str(-(-self._options.events // PROCESSES)), "--seconds", str(self._options.seconds),
                "--seed", str(self._options.seed + number),
                "--report", self._reports / f"writers-{number}", database=set_up.agents,
            )
            for number in range(PROCESSES)
        ]  # fmt: skip
        written = "select count(*) from agents where name like 'agent w%'"
        await set_up.wait_until(
            "the writers begin", lambda: set_up.holds(set_up.agents.pool, written, at_least=1), START_TIMEOUT_SECONDS
        )
        return writers

    # ------------------------------------------------------------------------------------------ waiting for states

    async def _until_cached(self, count: int) -> None:
        cached = "select count(*) from workflow_agent_cache"
        await self._set_up.wait_until(
            f"{count} agents are in the cache",
            lambda: self._set_up.holds(self._set_up.workflows.pool, cached, at_least=count),
            START_TIMEOUT_SECONDS,
        )

    async def _until_half(self, watch: Watch, before: Events) -> None:
        half: int = before.committed + self._options.events // 2

        async def reached() -> bool:
            return (await watch.look()).committed >= half

        await self._set_up.wait_until("half of the events are committed", reached, WRITE_TIMEOUT_SECONDS)

    async def _until_all_is_cached(self, watch: Watch, writers: list[ServerProcess], before: Events) -> Load:
        async def writers_ended() -> bool:
            await watch.look()
            return not any(process.running for process in writers)

        await self._set_up.wait_until("the writers are done", writers_ended, WRITE_TIMEOUT_SECONDS)
        after = await watch.look()

        async def arrived() -> bool:
            return (await watch.look()).applied >= after.committed

        await self._set_up.wait_in_hope(
            self._console, "the writers' last event is in the cache", arrived, ARRIVE_TIMEOUT_SECONDS
        )
        return Load(before.at, time.perf_counter(), after.committed - before.committed)

    async def _until_enough_probes(self, watch: Watch) -> None:
        probes: int = (await watch.look()).committed + min(QUIET_PROBES_MAX, self._options.events // 10)

        async def reached() -> bool:
            return (await watch.look()).committed >= probes

        await self._set_up.wait_until("there were enough probes", reached, ARRIVE_TIMEOUT_SECONDS)

    async def _until_nothing_is_on_the_way(self, watch: Watch) -> None:
        async def arrived() -> bool:
            now = await watch.look()
            return now.committed <= now.published <= now.applied

        await self._set_up.wait_in_hope(self._console, "every event is in the cache", arrived, ARRIVE_TIMEOUT_SECONDS)

    async def _judge(self, load: Load, sagas: SagaRun) -> Report:
        """Compare what was committed with what arrived, and what sagas came to with what they left."""
        await sabotage.spoil(self._set_up, self._options.sabotage)
        done: Counter[str] = Counter()
        rolled_back: list[tuple[str, str, str]] = []
        for path in sorted(self._reports.glob("writers-*")):
            report: dict[str, Any] = json.loads(path.read_text())
            done.update(report["done"])
            rolled_back += [tuple(entry) for entry in report["rolled_back"]]
        seen: dict[str, Any] = json.loads((self._reports / "observer").read_text())
        run = Run(done=done, rolled_back=rolled_back, load=load, kills=self._kills, **seen)
        return await reach(self._set_up, run, sagas, hide_record=sabotage.RECORD in self._options.sabotage)


async def main(options: argparse.Namespace) -> int:
    console = Console(stderr=options.json, highlight=False)
    console.print("starting PostgreSQL and a Kafka-compatible broker ...")
    try:
        with TemporaryDirectory(prefix="sagabox-reports-") as reports:
            async with stage() as set_up:
                report = await Demo(set_up, options, console, Path(reports)).run()
    except DemoError as error:
        console.print("[bold red]failed:[/]", end=" ")
        console.print(str(error), markup=False, soft_wrap=True)
        return 1
    if options.json:
        print(report.as_json())
    else:
        print_report(console, report)
    return 0 if report.valid else 1


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main(arguments())))
    except KeyboardInterrupt:
        sys.exit("interrupted; every process of the demo has been stopped")
