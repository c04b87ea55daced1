"""The demo: two services, two databases, one topic, and an exact verdict on what arrived.

    agent service (writers)  ->  llm_agent_db  ->  relay  ->  Kafka  ->  workflow service  ->  workflow_agent_cache

`make demo` runs it on embedded servers. Every box with an arrow is a process of its own.
"""

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console

from examples.agents import agent_service
from examples.agents.progress import Display, Standing, display
from examples.agents.stage import OUTBOX, TOPIC, DemoError, OverdueError, Stage, stage
from examples.agents.traffic import POPULAR
from examples.agents.verdict import Load, Report, Run, print_report, reach
from tests.support.history import TopicReader, topic_reader

if TYPE_CHECKING:
    from outbox.embedded.process import ServerProcess

PROCESSES: Final = 2
WRITERS: Final = 8
QUIET_PROBES_MAX: Final = 200
START_TIMEOUT_SECONDS: Final = 30.0
WRITE_TIMEOUT_SECONDS: Final = 300.0
ARRIVE_TIMEOUT_SECONDS: Final = 30.0

EXAMPLES: Final = """
examples:
  python -m examples.agents.demo                     15,000 events, then the verdict
  python -m examples.agents.demo --events 100000     longer
  python -m examples.agents.demo --json | jq .valid  for programs; progress goes to stderr
  python -m examples.agents.demo --sabotage cache    see the verdict fail: a row of the cache is deleted first

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
    parser.add_argument("--events", type=int, default=15_000, metavar="N", help="events to commit (default 15,000)")
    parser.add_argument("--seed", type=int, default=1, help="of the writers' choices; what interleaves is up to chance")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    parser.add_argument("--sabotage", choices=["cache", "record"], help="spoil one row, or hide one record")
    options = parser.parse_args()
    if options.events < 1:
        parser.error("--events must be at least 1")
    return options


class Demo:
    """One run: every service in its process, the writers, the wait for the last event, the verdict."""

    def __init__(self, set_up: Stage, options: argparse.Namespace, console: Console, reports: Path) -> None:
        self._set_up = set_up
        self._options = options
        self._console = console
        self._reports = reports
        self._services: list[ServerProcess] = []

    async def run(self) -> Report:
        say = self._console.print
        say("starting relay, workflow service and observer, each in a process of its own ...")
        await self.start_services()
        async with topic_reader(self._set_up.kafka, TOPIC) as reader:
            say(f"{PROCESSES} processes with {WRITERS} writers each commit {self._options.events:,} events ...")
            with display(self._console, self._options.events) as screen:
                load = await self.write(Watch(self._set_up, reader, screen))
            say("the writers are done; the probes go on alone for a while ...")
            await self.rest(Watch(self._set_up, reader, None))
        say("comparing what was committed with what arrived ...\n")
        return await self.judge(load)

    async def start_services(self) -> None:
        """Relay, workflow service and observer; returns when events go all the way."""
        set_up = self._set_up
        relay = set_up.start("relay", OUTBOX, "relay", database_url=set_up.owner_url)
        workflows = set_up.start_python(
            "workflow-service", "examples.agents.workflow_service", database_url=set_up.cache_url
        )
        for number, agent_id in enumerate(POPULAR):
            await agent_service.create(set_up.owner, agent_id, f"popular {number}")
        cached = "select count(*) from workflow_agent_cache"
        await set_up.wait_until(
            "the first agents are in the cache",
            lambda: set_up.holds(set_up.cache, cached, at_least=len(POPULAR)),
            START_TIMEOUT_SECONDS,
        )
        observer = set_up.start_python(
            "observer", "examples.agents.observer", "--report", self._reports / "observer",
            database_url=set_up.owner_url,
        )  # fmt: skip
        await set_up.wait_until(
            "the first probe is in the cache",
            lambda: set_up.holds(set_up.cache, cached, at_least=len(POPULAR) + 1),
            START_TIMEOUT_SECONDS,
        )
        self._services = [observer, relay, workflows]

    async def write(self, watch: "Watch") -> Load:
        """Run the writers, and wait until the last of their events is in the cache."""
        set_up = self._set_up
        writers = [
            set_up.start_python(
                f"writers-{number}", "examples.agents.traffic", "--name", f"w{number}", "--writers", str(WRITERS),
                "--events", str(-(-self._options.events // PROCESSES)), "--seed", str(self._options.seed + number),
                "--report", self._reports / f"writers-{number}", database_url=set_up.owner_url,
            )
            for number in range(PROCESSES)
        ]  # fmt: skip
        await set_up.wait_until(
            "the writers begin",
            lambda: set_up.holds(set_up.owner, "select count(*) from agents where name like 'agent w%'", at_least=1),
            START_TIMEOUT_SECONDS,
        )
        before = await watch.look()

        async def writers_ended() -> bool:
            await watch.look()
            return not any(process.running for process in writers)

        await set_up.wait_until("the writers are done", writers_ended, WRITE_TIMEOUT_SECONDS)
        after = await watch.look()

        async def arrived() -> bool:
            return (await watch.look()).applied >= after.committed

        await self._wait_for_arrival("their last event is in the cache", arrived)
        return Load(before.at, time.perf_counter(), after.committed - before.committed)

    async def rest(self, watch: "Watch") -> None:
        """Let the probes have everything to themselves, then stop them and wait for the last one."""
        after = await watch.look()
        probes: int = min(QUIET_PROBES_MAX, self._options.events // 10)

        async def enough_probes() -> bool:
            return (await watch.look()).committed >= after.committed + probes

        await self._set_up.wait_until(f"{probes} more probes", enough_probes, ARRIVE_TIMEOUT_SECONDS)
        observer, relay, workflows = self._services
        await self._set_up.stop(observer)

        async def all_arrived() -> bool:
            now = await watch.look()
            return now.committed <= now.published <= now.applied

        await self._wait_for_arrival("every event is in the cache", all_arrived)
        await self._set_up.stop(relay)
        await self._set_up.stop(workflows)

    async def _wait_for_arrival(self, what: str, holds: Callable[[], Awaitable[bool]]) -> None:
        """Wait, but not for ever: what does not arrive is for the verdict to name."""
        try:
            await self._set_up.wait_until(what, holds, ARRIVE_TIMEOUT_SECONDS)
        except OverdueError as error:
            self._console.print(str(error), style="red", markup=False, soft_wrap=True)

    async def judge(self, load: Load) -> Report:
        """Compare what was committed with what arrived."""
        if self._options.sabotage == "cache":
            await self._set_up.cache.execute("delete from workflow_agent_cache where agent_id = $1", POPULAR[0])
        done: Counter[str] = Counter()
        rolled_back: list[tuple[str, str, str]] = []
        for path in sorted(self._reports.glob("writers-*")):
            report: dict[str, Any] = json.loads(path.read_text())
            done.update(report["done"])
            rolled_back += [tuple(entry) for entry in report["rolled_back"]]
        seen: dict[str, Any] = json.loads((self._reports / "observer").read_text())
        run = Run(done=done, rolled_back=rolled_back, load=load, **seen)
        return await reach(self._set_up, run, hide_record=self._options.sabotage == "record")


class Watch:
    """Shows how far everybody is."""

    def __init__(self, set_up: Stage, reader: TopicReader, screen: Display | None) -> None:
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
    sys.exit(asyncio.run(main(arguments())))
