"""`outbox cache` as a person meets it."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio

from outbox import Pool
from tests.support.caching import TABLE, TOPIC, make_engine, rows
from tests.support.owning import create_agents, owned, owned_cache

ROOT = Path(__file__).parents[2]
OUTBOX = str(Path(sys.executable).with_name("outbox"))
APP = """
import os

import asyncpg

from outbox import Cache, SqlOwner
from tests.support.caching import make_cache
from tests.support.owning import QUERY, owned_cache

without_owner = make_cache()
number = 7


async def agents():
    pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], max_size=1, min_size=1)
    return owned_cache(pool)
"""


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> Pool:
    await create_agents(log_pool)
    await log_pool.execute("insert into agents select gen_random_uuid(), 'agent ' || n from generate_series(1, 300) n")
    await make_engine(log_pool, owned_cache(log_pool))
    return log_pool


@pytest.fixture
def environment(pool: Pool, database: str, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "service.py").write_text(APP)
    (tmp_path / "broken.py").write_text("import nothing_that_exists\n")
    (tmp_path / "raising.py").write_text("1 / 0\n")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SAGABOX_", "PG"))}
    return {**inherited, "DATABASE_URL": database, "COLUMNS": "100", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


class Run:
    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder

    async def __call__(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return await asyncio.to_thread(
            subprocess.run,
            [OUTBOX, "cache", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )


@pytest.fixture
def outbox(environment: dict[str, str], tmp_path: Path) -> Run:
    return Run(environment, tmp_path)


REBUILD = ("rebuild", TABLE, "--app", "service:agents")


async def test_rebuild_in_place_and_into_generations(pool: Pool, outbox: Run) -> None:
    done = await outbox(*REBUILD)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{TABLE}: 300 rows in 1 pages, 300 written, 0 removed\n"
    done = await outbox(*REBUILD, "--new-generation", "--json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert (found["rows"], found["swapped"], found["finished"]) == (300, True, True)
    done = await outbox(*REBUILD, "--new-generation")
    assert (done.returncode, "--finish" in done.stderr) == (1, True)
    done = await outbox("rebuild", TABLE, "--rollback")
    assert (done.returncode, "former generation again" in done.stdout) == (0, True)
    done = await outbox("rebuild", TABLE, "--finish", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"table": TABLE, "step": "finish"})
    assert await rows(pool) == await owned(pool)
    done = await outbox("rebuild", TABLE, "--finish")
    assert (done.returncode, "nothing to drop" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("app", "code", "says"),
    [
        ("service", 1, "has no owner"),
        ("service:number", 2, "is a int, not a Cache"),
        ("service:without_owner", 1, "no partition stands still"),
        ("service:missing", 2, "has no missing"),
        ("nowhere", 2, "there is no module nowhere"),
        ("nowhere.deep", 2, "there is no module nowhere"),
        ("broken", 2, "needs nothing_that_exists, which is not installed"),
        ("raising", 2, "ZeroDivisionError"),
        ("not a module", 2, "is no module"),
        (None, 2, "--app package.module"),
    ],
)
async def test_an_app_that_cannot_be_used_is_explained(outbox: Run, app: str | None, code: int, says: str) -> None:
    done = await outbox("rebuild", TABLE, *(["--app", app] if app else []))
    assert says in " ".join(done.stderr.split())
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)


async def test_steps_exclude_each_other(outbox: Run) -> None:
    done = await outbox(*REBUILD, "--rollback", "--finish")
    assert (done.returncode, "different steps" in done.stderr) == (2, True)


async def test_a_cache_without_owner_goes_on_with_what_kafka_has(pool: Pool, outbox: Run) -> None:
    engine = await make_engine(pool, owned_cache(pool))
    await engine.claim(TOPIC, 0, 0)
    await pool.execute("update outbox.positions set state = 'needs_rebuild'")
    status = await outbox("status")
    assert (status.returncode, "partition 0: needs_rebuild stands still" in status.stdout) == (1, True)
    done = await outbox("rebuild", TABLE, "--app", "service")
    assert (done.returncode, "what Kafka has lost stays lost" in done.stdout) == (0, True)
    assert await pool.fetchval("select state from outbox.positions") == "restarting"
    assert (await outbox("status")).returncode == 0


async def test_a_cache_that_nobody_feeds_is_explained(pool: Pool, outbox: Run) -> None:
    await pool.execute("delete from outbox.caches")
    done = await outbox(*REBUILD)
    assert (done.returncode, "start the consumer" in done.stderr) == (4, True)


async def test_reconcile_reports_and_repairs(pool: Pool, outbox: Run) -> None:
    assert (await outbox(*REBUILD)).returncode == 0
    arguments = ("reconcile", TABLE, "--app", "service:agents", "--grace", "0")
    done = await outbox(*arguments)
    assert (done.returncode, done.stdout) == (0, f"{TABLE}: 300 rows compared, 0 keys have drifted\n")
    await pool.execute(f"update {TABLE} set agent_name = 'wrong' where agent_name = 'agent 7'")
    await pool.execute(f"delete from {TABLE} where agent_name = 'agent 8'")
    done = await outbox(*arguments, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["drifted"], found["repaired"]) == (1, 2, 0)
    assert {drift["kind"]: drift["columns"] for drift in found["drifts"]} == {
        "missing": [],
        "different": ["agent_name"],
    }
    done = await outbox(*arguments)
    assert done.returncode == 1
    assert "different  agent_name" in done.stdout
    done = await outbox(*arguments, "--fix")
    assert (done.returncode, "2 repaired" in done.stdout) == (0, True)
    assert await rows(pool) == await owned(pool)


async def test_status_shows_caches_rebuilds_and_what_needs_a_person(pool: Pool, outbox: Run) -> None:
    assert (await outbox(*REBUILD, "--new-generation")).returncode == 0
    done = await outbox("status")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"a second generation is fed, {TABLE}_spare" in done.stdout
    assert "300 rows in 1 pages" in done.stdout
    assert done.stdout.endswith("ok\n")
    await pool.execute("update outbox.rebuilds set finished_at = null, lease_until = null, rows = 1234")
    await pool.execute(
        "insert into outbox.parked_keys (parker, topic, key, reason, detail) values ($1, $2, 'k', 'r', 'd')",
        TABLE,
        TOPIC,
    )
    done = await outbox("status", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert [cache["name"] for cache in found["caches"]] == [TABLE]
    assert (found["caches"][0]["parked"], len(found["problems"])) == (1, 2)
    assert "stopped after 1,234 rows" in " ".join(found["problems"])
    await pool.execute("delete from outbox.caches")
    assert "no consumer has fed" in (await outbox("status")).stdout


async def test_a_rebuild_goes_on_after_kill_9(
    pool: Pool, outbox: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    """Killed between two pages; the same command waits for the lease and goes on behind the last committed page."""
    await pool.execute("insert into agents select gen_random_uuid(), 'more ' || n from generate_series(1, 60000) n")
    process = await asyncio.create_subprocess_exec(
        OUTBOX, "cache", *REBUILD, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    pages = 0
    while not pages:
        pages = await pool.fetchval("select coalesce(max(pages), 0) from outbox.rebuilds")
    process.send_signal(signal.SIGKILL)
    await process.wait()
    killed_at = await pool.fetchrow("select pages, finished_at from outbox.rebuilds")
    assert killed_at["pages"] >= 1
    assert killed_at["finished_at"] is None
    await pool.execute("update outbox.rebuilds set lease_until = clock_timestamp() + interval '0.5 s'")
    done = await outbox(*REBUILD, "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["rows"], found["pages"]) == (0, 60_300, 13)
    assert await rows(pool) == await owned(pool)


async def test_the_terminal_gets_a_bar(pool: Pool, environment: dict[str, str], tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        OUTBOX, "cache", *REBUILD, env={**environment, "TERM": "xterm"}, cwd=tmp_path, stderr=follower,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    os.close(follower)
    drawn = b""

    def read() -> bytes:
        found = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:
                return found
            if not part:
                return found
            found += part

    drawn = await asyncio.to_thread(read)
    os.close(leader)
    await process.wait()
    assert b"rows/s" in drawn
    assert process.returncode == 0
