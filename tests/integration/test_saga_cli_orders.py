"""`saga list|show|why|plan|start|signal|cancel|pause|resume` as a person types them."""

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from outbox import Pool
from saga.cli import app
from tests.integration.test_saga_cli import ROOT, environment
from tests.support.saga_cases import asks, pivoted, sleeps, undone
from tests.support.saga_worker import Order, reaches, working

SAGA = str(Path(sys.executable).with_name("saga"))
EVIL = "evil\x1b[31m\u202ekey"


@dataclass
class Said:
    """What a command said."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


async def saga(url: str, *arguments: str, status: int = 0, stdin: str | None = None) -> Said:
    process = await asyncio.create_subprocess_exec(
        SAGA,
        *arguments,
        env=environment(url),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate(stdin.encode() if stdin is not None else None)
    assert process.returncode == status, (out.decode(), err.decode())
    return Said(status, out.decode(), err.decode())


async def test_the_life_of_a_saga_from_the_command_line(saga_pool: Pool, database: str) -> None:
    where = ("--app", "tests.support.saga_cases")
    started = (await saga(database, "start", "asks", '{"sku": "A"}', *where, "--key", "k", "--json")).json
    again = (await saga(database, "start", "asks", "-", *where, "--key", "k", "--json", stdin='{"sku": "A"}')).json
    assert started == again == {"id": started["id"], "name": "asks", "version": 1, "key": "k"}
    wants = await saga(database, "why", "asks/k", status=1)
    assert "no living worker serves asks version 1" in wants.out
    assert "what to do: start a worker" in wants.out
    async with working(saga_pool, asks):
        handle = asks.handle(saga_pool, "k")
        await reaches(saga_pool, started["id"], "waiting")
        assert "waits for the signal Approval" in (await saga(database, "why", "asks/k")).out
        paused = await saga(database, "pause", "asks/k", "--reason", "lunch")
        assert paused.out == "asks k: paused\n"
        listed = (await saga(database, "list", "--state", "paused", "--json")).json
        assert [one["paused_reason"] for one in listed["instances"]] == ["paused by a person: lunch"]
        assert listed["more"] is False
        assert (await saga(database, "resume", started["id"], "--json")).json["effect"] == "resumed"
        sent = await saga(
            database, "signal", "asks/k", "Approval", '{"approved": true}', "--app", "tests.support.saga_worker"
        )
        assert sent.out == "asks k: the signal is sent\n"
        assert await handle.result(timeout=10) == "approved"
    shown = await saga(database, "show", "asks/k")
    for text in ("asks/1", "completed", "▶ request", "✓ reserve#1", "✉ signal Approval", "☞ pause", "lunch", "■"):
        assert text in shown.out
    whole = (await saga(database, "show", "asks/k", "--json")).json
    assert [task["path"] for task in whole["tasks"]] == ["", "reserve#1", "Approval#1"]
    assert whole["mail"][0]["payload"] == {"approved": True}
    assert whole["why"]["needs_person"] is False


async def test_show_plan_and_resume_of_what_is_stuck(saga_pool: Pool, database: str) -> None:
    async with working(saga_pool, undone, pivoted):
        failing = await undone.start(saga_pool, Order(fails="unbook fails 99"), key="u")
        stuck = await pivoted.start(saga_pool, Order(fails="certain lands"), key="p")
        await reaches(saga_pool, failing.id, "paused")
        await reaches(saga_pool, stuck.id, "paused")
        assert "what to do: mend the cause and try unbook again" in (
            (await saga(database, "show", "undone/u", status=1)).out.replace("\n", " ")
        )
        rows = (await saga(database, "plan", "undone/u", "--json")).json["plan"]
        assert [(row["path"], row["status"]) for row in rows] == [("book#1", "failed"), ("reserve#1", "pending")]
        assert "unbook" in (await saga(database, "plan", "undone/u")).out
        await saga(database, "resume", "undone/u", "--skip", "book", "--reason", "by hand")
        await reaches(saga_pool, failing.id, "failed")
        wrong = ("--step", "certain#1", "--result", "1", "--reason", "x", "--app", "tests.support.saga_cases")
        assert "does not fit" in (await saga(database, "resume", "pivoted/p", *wrong, status=1)).err
        await saga(database, "resume", "pivoted/p", "--step", "certain#1", "--result", '"s"', "--reason", "seen")
        assert await stuck.result(timeout=10) == "s"


async def test_what_others_wrote_does_nothing_to_the_terminal(saga_pool: Pool, database: str) -> None:
    """Red where a key, a payload or a reason is printed without `visible`."""
    handle = await sleeps.start(saga_pool, Order(sku=EVIL), key=EVIL)
    said = [
        await saga(database, "pause", str(handle.id), "--reason", EVIL),
        await saga(database, "list"),
        await saga(database, "show", str(handle.id), status=1),
        await saga(database, "why", f"sleeps/{EVIL}", status=1),
        await saga(database, "resume", str(handle.id), "--skip", EVIL, "--reason", "x", status=1),
        await saga(database, "cancel", str(handle.id), "--reason", EVIL),
        await saga(database, "show", str(handle.id), "--json", status=1),
    ]
    for one in said:
        assert "\x1b" not in one.out + one.err
        assert "\u202e" not in one.out + one.err


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["why", "nothing"], 1, "give its id, or SAGA/KEY"),
        (["show", "shop/nothing"], 1, "no shop was started under the key"),
        (["list", "--state", "asleep"], 2, "there is no such state"),
        (["resume", "shop/k", "--skip", "x"], 2, "need --reason"),
        (["resume", "shop/k", "--step", "x"], 2, "go together"),
        (["start", "nothing", "{}", "--app", "tests.support.saga_cases"], 2, "has no saga nothing"),
        (["start", "asks", "{}", "--app", "tests.support.saga_cases", "--version", "7"], 2, "it has: version 1"),
        (["start", "asks", "{", "--app", "tests.support.saga_cases"], 1, "does not fit"),
        (["start", "asks", "{}", "--app", "tests.support.nowhere"], 2, "there is no module"),
    ],
)
async def test_what_is_wrong_is_one_line(
    saga_pool: Pool, database: str, arguments: list[str], status: int, text: str
) -> None:
    said = await saga(database, *arguments, status=status)
    assert text in said.err
    assert len(said.err.splitlines()) == 1


async def test_a_database_without_the_tables_says_how_to_get_them_and_gets_them(log_pool: Pool, database: str) -> None:
    """Red where `migrate` does not take the package from the options: it finds nothing to do."""
    said = await saga(database, "list", status=4)
    assert "run: saga migrate up" in said.err
    assert (await saga(database, "migrate", "up")).out.startswith("applied saga 0001_saga\n")
    assert {one["state"] for one in (await saga(database, "migrate", "status", "--json")).json} == {"applied"}
    assert (await saga(database, "list")).out == "there are no such sagas\n"
    assert "drop schema saga cascade;" in (await saga(database, "migrate", "sql", "--down")).out
    assert (await saga(database, "migrate", "down", "--to", "0", "--yes")).out.endswith("took back saga 0001_saga\n")
    assert await log_pool.fetchval("select to_regclass('outbox.events') is not null")


async def test_an_empty_database_gets_the_tables_of_the_outbox_first(database: str) -> None:
    """Red where only the tables of sagas are made: their statements fail later, when they emit."""
    done = (await saga(database, "migrate", "up", "--json")).json
    assert [one["migration"].split()[0] for one in done] == sorted(one["migration"].split()[0] for one in done)
    assert {one["migration"] for one in done} >= {"outbox 0001_log", "saga 0001_saga"}
    assert (await saga(database, "check", "tests.support.deployment", "--live")).out == "nothing of it is in flight\n"


@pytest.mark.parametrize("command", [name for name in get_command(app).commands if name != "migrate"])  # type: ignore[attr-defined]
async def test_every_command_has_help_with_an_example(command: str) -> None:
    said = await saga("postgresql://nowhere/nothing", command, "--help")
    assert "Example" in said.out
    assert ("--json" in said.out) == (command != "worker"), "a worker says what it does in its log"
