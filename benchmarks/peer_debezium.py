"""Debezium with its Outbox Event Router on the same events, the same PostgreSQL, the same Kafka, in the same run.

Both relays work off a backlog of one event a transaction. Debezium's clock starts when it says that it streams, so
that neither the start of its Java machine nor that of Connect counts. The first seconds after that are the compiler's:
what is compared is the second half of the run, for both; the whole run is shown beside it. Per repetition: Debezium
starts once to make its slot and store an offset and is stopped; the events are committed; it starts again.
"""

import asyncio
import fcntl
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Final
from urllib.parse import unquote, urlsplit

from benchmarks import backlog
from benchmarks.plan import Bench
from benchmarks.processes import Child
from benchmarks.real_kafka import UnavailableError
from benchmarks.servers import Ground
from outbox.embedded.process import free_port

_HERE: Final = Path(__file__).parent / "debezium"
_JARS: Final = Path(__file__).parents[1] / ".cache" / "debezium-jars"
_FETCH_TIMEOUT_SECONDS: Final = 900.0
_START_TIMEOUT_SECONDS: Final = 120.0
_OFFSET_SECONDS: Final = 6.0  # one flush of the offsets, and a little
_STREAMS: Final = "Starting streaming"
_FLAGS: Final = ("-Xms256m", "-Xmx2g")  # what Kafka's own start script gives Connect

_CREATE: Final = """
create table public.outbox (id uuid primary key, aggregatetype text not null, aggregateid text not null,
                            type text not null, payload jsonb not null);
create procedure bench.load_outbox(p_first bigint, p_last bigint) language plpgsql as $$
begin
    for i in p_first .. p_last loop
        insert into public.outbox
        values (outbox.uuid7(), 'agent', bench.key(i), 'agent.renamed', bench.payload(i)::jsonb);
        commit;
    end loop;
end $$;
"""
_LOAD: Final = "call bench.load_outbox($1, $2)"
_DROP_SLOT: Final = """
select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1 and not active
"""
_SLOT_IN_USE: Final = "select active from pg_replication_slots where slot_name = $1"


def jars() -> Path:
    """Connect and Debezium, fetched once by Maven.

    Raises:
        UnavailableError: no Java, no Maven, or Maven failed.
    """
    for program in ("java", "mvn"):
        if shutil.which(program) is None:
            raise UnavailableError(f"Debezium needs Java 17 and Maven, and there is no {program} on PATH")
    pom = _HERE / "pom.xml"
    _JARS.parent.mkdir(exist_ok=True)
    with (_JARS.parent / "debezium-jars.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetched = _JARS / "pom.xml"  # written last: the jars beside it are complete and of its versions
        if fetched.exists() and fetched.read_bytes() == pom.read_bytes():
            return _JARS
        shutil.rmtree(_JARS, ignore_errors=True)
        command = ["mvn", "-q", "-B", "-f", str(pom), "dependency:copy-dependencies", f"-DoutputDirectory={_JARS}"]
        done = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_FETCH_TIMEOUT_SECONDS,
        )  # fmt: skip
        if done.returncode != 0:
            raise UnavailableError(f"Maven could not fetch Debezium: {(done.stdout + done.stderr)[-500:]}")
        shutil.copyfile(pom, fetched)
    return _JARS


async def relay(bench: Bench) -> None:
    """Debezium and our relay in turn."""
    report, events = bench.report, bench.plan.debezium_events
    libraries = await asyncio.to_thread(jars)
    for _ in range(bench.plan.repeat):
        report.section("Debezium and the relay in turn, one event a transaction")
        async with bench.servers.fresh() as ground:
            run = await _debezium(bench, ground, libraries, events)
        _add(bench, "debezium", run)
        async with bench.servers.fresh() as ground:
            run = await backlog.singly(bench, ground, events)
        _add(bench, "relay_beside_debezium", run)
    factor = report["relay_beside_debezium_events_per_second"] / report["debezium_events_per_second"]
    report.add("relay_to_debezium", factor, "ratio", events)


def _add(bench: Bench, name: str, run: backlog.Run) -> None:
    report = bench.report
    report.add(f"{name}_events_per_second", run.second_half_rate, "events/s", run.events // 2)
    report.add(f"{name}_whole_run_events_per_second", run.rate, "events/s", run.events)
    report.add(f"{name}_cpu_us_per_event", run.cpu_us, "us", run.events)
    report.add(f"{name}_rss_peak_mib", run.rss_mib, "MiB", run.events)


async def _debezium(bench: Bench, ground: Ground, libraries: Path, events: int) -> backlog.Run:
    await ground.pool.execute(_CREATE)
    slot = f"dbz_{ground.database_url.rpartition('/')[2]}"
    with tempfile.TemporaryDirectory(prefix="sagabox-bench-debezium-") as directory:
        try:
            with (
                bench.step("Debezium: first start, slot and offset", 1),
                _connect(ground, libraries, directory, slot) as c,
            ):
                await c.says(_STREAMS, timeout_seconds=_START_TIMEOUT_SECONDS, where=c.log)
                await ground.pool.execute(_LOAD, 1, 1)
                await ground.ends.reach(1, timeout_seconds=_START_TIMEOUT_SECONDS, check=c.check)
                await asyncio.sleep(_OFFSET_SECONDS)
            with bench.step(f"loading {events:,} events for Debezium, one a transaction", events):
                async with ground.pool.acquire() as connection:
                    await connection.execute("set synchronous_commit = off")
                    await connection.execute(_LOAD, 2, events + 1, timeout=backlog.time_limit(2 * events))
                    await connection.execute("checkpoint")
            with _connect(ground, libraries, directory, slot) as child:
                await child.says(_STREAMS, timeout_seconds=_START_TIMEOUT_SECONDS, where=child.log)
                started, cpu, rss = time.perf_counter(), child.cpu_seconds(), child.rss_mib()
                with bench.step(f"Debezium relaying {events:,} events", events) as seen:
                    watch = await backlog.watch(ground, child, events + 1, seen)
                return backlog.Run.of(events, started, cpu, rss, watch)
        finally:
            await _drop_slot(ground, slot)


@contextmanager
def _connect(ground: Ground, libraries: Path, directory: str, slot: str) -> Iterator[Child]:
    """Connect, standalone, with files of its own in a directory that outlives it."""
    url = urlsplit(ground.database_url)
    values = {
        "kafka": ground.kafka, "rest_port": free_port(), "directory": directory, "name": slot.replace("_", "-"),
        "host": url.hostname, "port": url.port or 5432, "user": unquote(url.username or ""), "topic": ground.topic,
        "password": unquote(url.password or ""), "database": url.path.removeprefix("/"), "slot": slot,
    }  # fmt: skip
    files = [Path(directory) / name for name in ("worker.properties", "connector.properties")]
    for file in files:
        file.touch(mode=0o600)  # the password is in one of them
        file.write_text(Template((_HERE / file.name).read_text()).substitute(values))
    main = ["-cp", f"{libraries}/*", "org.apache.kafka.connect.cli.ConnectStandalone", *map(str, files)]
    with Child("debezium", ["java", *_FLAGS, *main]) as child:
        yield child


async def _drop_slot(ground: Ground, slot: str) -> None:
    """Or it keeps all WAL from now on, and the database cannot be dropped."""
    async with asyncio.timeout(_START_TIMEOUT_SECONDS):
        while await ground.pool.fetchval(_SLOT_IN_USE, slot):  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.1)
    await ground.pool.execute(_DROP_SLOT, slot)
