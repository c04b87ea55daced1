"""`saga worker` as a supervisor meets it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from outbox import Pool
from tests.support.saga_worker import SERVICE, Order, effects, shop

SAGA = str(Path(sys.executable).with_name("saga"))
ROOT = Path(__file__).parents[2]


def environment(url: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SAGABOX_", "PG"))}
    return {**inherited, "DATABASE_URL": url, "COLUMNS": "80", "PYTHONWARNINGS": "error", "PYTHONPATH": str(ROOT)}


@pytest.fixture
def command(database: str) -> Iterator["subprocess.Popen[str]"]:
    arguments = [SAGA, "worker", "--app", "tests.support.saga_process:make"]
    with subprocess.Popen(arguments, env=environment(database), stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process
        process.kill()


async def test_the_command_runs_sagas_and_hands_over_at_sigterm(
    saga_pool: Pool, command: "subprocess.Popen[str]"
) -> None:
    await saga_pool.execute(SERVICE)
    handle = await shop.start(saga_pool, Order())
    assert await handle.result(timeout=30) == "A1 paid sent"
    command.send_signal(signal.SIGTERM)
    _, log = command.communicate(timeout=20)
    assert command.returncode == 0
    assert "handing over what is in flight" in log
    assert "worker stopped" in log
    assert await effects(saga_pool) == ["reserve", "charge", "ship"]
    assert await saga_pool.fetchval("select count(*) from saga.workers") == 0


@pytest.mark.parametrize(
    ("app", "status", "text"),
    [
        ("tests.support.nowhere", 2, "there is no module"),
        ("tests.support.saga_process:nothing", 2, "has no nothing"),
        ("tests.support.saga_process:SETTINGS", 2, "neither sagas or participants"),
        ("tests.support.saga_worker", 4, "saga migrate up"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(database: str, app: str, status: int, text: str) -> None:
    import asyncio

    from outbox.upkeep import migrate

    async def prepare() -> None:
        connection = await asyncpg.connect(database)
        await migrate.up(connection)
        if status == 2:
            await migrate.up(connection, package="saga")
        await connection.close()

    asyncio.run(prepare())
    done = subprocess.run(
        [SAGA, "worker", "--app", app], env=environment(database), capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert (done.returncode, len(done.stderr.splitlines())) == (status, 1), done.stderr
    assert text in done.stderr
