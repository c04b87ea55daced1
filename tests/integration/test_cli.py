"""The command as a person or a supervisor meets it: output, exit codes, signals."""

import asyncio
import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

OUTBOX = str(Path(sys.executable).with_name("outbox"))
EVIL = "evil \x1b[31mred\x1b[0m [bold]markup[/bold]"


@pytest.fixture
def environment(database: str) -> dict[str, str]:
    """The process's own, without settings of the machine it runs on."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SAGABOX_", "PG"))}
    return {**inherited, "DATABASE_URL": database, "COLUMNS": "80", "PYTHONWARNINGS": "error"}


@pytest.fixture
def migrated(environment: dict[str, str]) -> dict[str, str]:
    assert outbox(environment, "migrate", "up").returncode == 0
    return environment


def outbox(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [OUTBOX, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def sql(environment: dict[str, str], statement: str, *arguments: object) -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(environment["DATABASE_URL"])
        try:
            return await connection.fetchval(statement, *arguments)
        finally:
            await connection.close()

    return asyncio.run(run())


def park(
    environment: dict[str, str], key: str, *payloads: bytes, parker: str = "relay", topic: str = "llm.agents"
) -> None:
    sql(
        environment,
        """with k as (insert into outbox.parked_keys (parker, topic, key, shard, reason, detail)
                      values ($1, $2, $3, 0, 'TooLarge', 'larger than the topic takes') returning key)
           insert into outbox.parked_events (parker, topic, key, shard, window_no, ordinal, event_type, schema_version,
                                             headers, payload, created_at)
           select $1, $2, k.key, 0, (select count(*) from outbox.parked_keys), p.n, 'agent.renamed', 1, '{"h": "v"}',
                  p.payload, now()
             from k, unnest($4::bytea[]) with ordinality as p(payload, n)""",
        parker, topic, key, list(payloads),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- migrate


def test_migrate_up_status_and_down(environment: dict[str, str]) -> None:
    before = outbox(environment, "migrate", "status")
    assert (before.returncode, "pending" in before.stdout) == (1, True)
    assert "applied outbox 0001_log" in outbox(environment, "migrate", "up", "--to", "1").stdout
    assert outbox(environment, "migrate", "up").returncode == 0
    assert outbox(environment, "migrate", "up").stdout == "nothing to do\n"
    after = outbox(environment, "migrate", "status", "--json")
    assert after.returncode == 0
    assert {row["state"] for row in json.loads(after.stdout)} == {"applied"}
    assert "took back outbox 0001_log" in outbox(environment, "migrate", "down", "--to", "0", "--yes").stdout
    assert outbox(environment, "migrate", "down").stdout == "nothing to do\n"


def test_migrate_up_and_down_tell_programs_what_they_did(environment: dict[str, str]) -> None:
    done = json.loads(outbox(environment, "migrate", "up", "--to", "1", "--json").stdout)
    assert done == [{"migration": "outbox 0001_log", "done": "applied"}]
    assert json.loads(outbox(environment, "migrate", "up", "--to", "1", "--json").stdout) == []
    refused = outbox(environment, "migrate", "down", "--json")
    assert (refused.returncode, "repeat with --yes" in refused.stderr, refused.stdout) == (2, True, "")
    back = json.loads(outbox(environment, "migrate", "down", "--yes", "--json").stdout)
    assert back == [{"migration": "outbox 0001_log", "done": "took back"}]


def test_down_tells_what_would_be_lost_and_does_nothing_unasked(migrated: dict[str, str]) -> None:
    sql(migrated, "select outbox.emit('t', 'topic', 'k', '{}')")
    refused = outbox(migrated, "migrate", "down", "--to", "0")
    assert refused.returncode == 2
    assert "1 events that are not published yet" in refused.stdout
    assert "--yes" in refused.stderr
    assert sql(migrated, "select count(*) from outbox.events") == 1


def test_printed_sql_goes_through_another_client(environment: dict[str, str]) -> None:
    script = outbox({**environment, "DATABASE_URL": "postgresql://127.0.0.1:1/none"}, "migrate", "sql")
    assert script.returncode == 0, "no database is needed"

    async def run() -> None:
        connection = await asyncpg.connect(environment["DATABASE_URL"])
        await connection.execute(f"begin;\n{script.stdout}\ncommit")
        await connection.close()

    asyncio.run(run())
    assert outbox(environment, "migrate", "status").returncode == 0


def test_a_migration_that_does_not_exist_is_a_usage_error(environment: dict[str, str]) -> None:
    for command in (("up", "--to", "77"), ("down", "--to", "77"), ("sql", "--to", "77")):
        done = outbox(environment, "migrate", *command)
        assert (done.returncode, "no migration 77" in done.stderr) == (2, True), command


# --------------------------------------------------------------------------------------------- status


def test_status_says_what_needs_a_person(migrated: dict[str, str]) -> None:
    healthy = outbox(migrated, "status")
    assert (healthy.returncode, healthy.stdout.rstrip().split("\n")[-1]) == (0, "ok")
    sql(migrated, "select outbox.emit('t', 'topic', 'k', '{}')")
    park(migrated, "k1", b"{}")
    sick = outbox(migrated, "status")
    assert sick.returncode == 1
    assert "problem: shard 0 has events to publish and no relay: start one (outbox relay)" in sick.stdout
    assert "problem: relay has parked 1 key" in sick.stdout
    as_json = json.loads(outbox(migrated, "status", "--json").stdout)
    assert (as_json["shards"][0]["lag_events"], len(as_json["problems"])) == (1, 2)


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(migrated: dict[str, str], columns: int) -> None:
    sql(
        migrated,
        """insert into outbox.positions (consumer, topic, partition, next_offset, owner)
           select 'agents-cache', 'llm.agents', p, 1234567 * p, 'worker-7f9c6d.services.cluster.local/4711'
             from generate_series(0, 12) p""",
    )
    park(migrated, "0197a2b4-aaaa-7bbb-8ccc-1234567890ab", b"{}")
    for command in (("status",), ("parked", "list"), ("migrate", "status")):
        lines = outbox({**migrated, "COLUMNS": str(columns)}, *command).stdout.split("\n")
        assert max(map(len, lines)) <= columns, command


def test_watch_draws_until_interrupted(migrated: dict[str, str]) -> None:
    with on_a_terminal(migrated, "status", "--watch", "--interval", "0.2") as (process, terminal):
        seen = read_until(terminal, b"ok")
        assert b"Shard" in seen
        sql(migrated, "select outbox.emit('t', 'topic', 'k', '{}')")
        read_until(terminal, b"no relay")
        process.send_signal(signal.SIGINT)
        read_until(terminal, None)
        assert process.wait(timeout=20) == 0


def test_watch_without_a_terminal_is_refused(migrated: dict[str, str]) -> None:
    assert outbox(migrated, "status", "--watch").returncode == 2


@contextlib.contextmanager
def on_a_terminal(environment: dict[str, str], *arguments: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    ours, theirs = pty.openpty()
    environment = {**environment, "TERM": "xterm", "LINES": "40"}
    process = subprocess.Popen(
        [OUTBOX, *arguments],
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - else ignored behind `&`
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(terminal: int, wanted: bytes | None) -> bytes:
    """What the terminal shows until these bytes, or its end; the test's own timeout bounds the wait."""
    seen = b""
    with contextlib.suppress(OSError):  # how a pseudo-terminal says that nobody is at the other end
        while wanted is None or wanted not in seen:
            if not (chunk := os.read(terminal, 65_536)):
                break
            seen += chunk
    assert wanted is None or wanted in seen, seen
    return seen


# --------------------------------------------------------------------------------------------- parked


def test_parked_keys_are_listed_and_shown_in_order(migrated: dict[str, str]) -> None:
    assert outbox(migrated, "parked", "list").stdout == "no key is parked\n"
    park(migrated, "k1", b'{"n": 1}', b'{"n": 2, "big": 1e400}', b"\x00\xff")
    park(migrated, "k2", b"{}", parker="agents")
    listed = outbox(migrated, "parked", "list").stdout
    assert listed.index("agents") < listed.index("relay")
    assert "more" in outbox(migrated, "parked", "list", "--limit", "1").stdout
    only = json.loads(outbox(migrated, "parked", "list", "--parker", "relay", "--json").stdout)
    assert [(key["key"], key["events"]) for key in only["keys"]] == [("k1", 3)]
    shown = outbox(migrated, "parked", "show", "k1").stdout
    assert shown.index('"n": 1') < shown.index('"big": 1e400') < shown.index("00ff")
    assert "TooLarge: larger than the topic takes" in shown
    assert "1 more: raise --limit 2" in outbox(migrated, "parked", "show", "k1", "--limit", "2").stdout
    (key,) = json.loads(outbox(migrated, "parked", "show", "k1", "--json").stdout)
    assert [event.get("payload") for event in key["waiting"]] == [{"n": 1}, None, None]
    assert key["waiting"][2]["payload_base64"] == "AP8="
    missing = outbox(migrated, "parked", "show", "k3")
    assert (missing.returncode, "not parked" in missing.stderr) == (1, True)


def test_parked_keys_are_retried_one_or_all(migrated: dict[str, str]) -> None:
    """The command only sets the flag; see test_parking_relay and test_parking_consumer for what becomes of it."""
    flags = (
        "select array_agg(parker || ' ' || key order by parker, key) from outbox.parked_keys where retry_at <= now()"
    )
    park(migrated, "k1", b"{}", b"{}")
    park(migrated, "k1", b"{}", parker="agents")
    park(migrated, "k2", b"{}")
    done = outbox(migrated, "parked", "retry", "k1", "--parker", "relay")
    assert (done.returncode, done.stdout) == (0, "k1 in llm.agents, parked by relay: 2 events are tried again\n")
    assert sql(migrated, flags) == ["relay k1"]
    assert "now" in outbox(migrated, "parked", "list", "--parker", "relay").stdout
    both = json.loads(outbox(migrated, "parked", "retry", "k1", "--json").stdout)
    assert (both["retried"], [key["parker"] for key in both["keys"]]) == (2, ["agents", "relay"])
    assert sql(migrated, flags) == ["agents k1", "relay k1"]
    nobody = outbox(migrated, "parked", "retry", "--all", "--reason", "TopicMissing")
    assert nobody.stdout == "0 parked keys are tried again\n"
    assert json.loads(outbox(migrated, "parked", "retry", "--all", "--reason", "TooLarge", "--json").stdout) == {
        "retried": 3
    }
    assert sql(migrated, flags) == ["agents k1", "relay k1", "relay k2"]
    missing = outbox(migrated, "parked", "retry", "k3")
    assert (missing.returncode, "not parked" in missing.stderr) == (1, True)
    for wrong in ((), ("k1", "--all"), ("k1", "--reason", "TooLarge")):
        assert outbox(migrated, "parked", "retry", *wrong).returncode == 2


def test_discarding_asks_first_and_then_frees_the_key(migrated: dict[str, str]) -> None:
    park(migrated, "k1", b"{}", b"{}")
    park(migrated, "k1", b"{}", parker="agents")
    refused = outbox(migrated, "parked", "discard", "k1")
    assert (refused.returncode, "--yes" in refused.stderr) == (2, True)
    assert "parked by relay: 2 events would be lost" in refused.stdout
    assert sql(migrated, "select count(*) from outbox.parked_keys") == 2
    with on_a_terminal(migrated, "parked", "discard", "k1") as (process, terminal):
        os.write(terminal, b"n\n")
        assert process.wait(timeout=30) == 2
    assert sql(migrated, "select count(*) from outbox.parked_keys") == 2
    done = outbox(migrated, "parked", "discard", "k1", "--parker", "agents", "--yes")
    assert (done.returncode, done.stdout) == (0, "k1 in llm.agents, parked by agents: 1 event discarded\n")
    assert sql(migrated, "select count(*) from outbox.parked_events where parker = 'agents'") == 0
    (gone,) = json.loads(outbox(migrated, "parked", "discard", "k1", "--yes", "--json").stdout)["discarded"]
    assert (gone["parker"], gone["events"]) == ("relay", 2)
    assert sql(migrated, "select count(*) from outbox.parked_events where state = 'discarded'") == 2
    assert sql(migrated, "select count(*) from outbox.parked_keys") == 0
    assert outbox(migrated, "parked", "discard", "k1", "--yes").returncode == 1


def test_untrusted_text_is_neither_markup_nor_control(migrated: dict[str, str]) -> None:
    park(migrated, EVIL, b"\x1b[2J [red]not red[/red]")
    pasted = EVIL.replace("\x1b", "\\u001b")
    for command in (
        ("list",), ("show", EVIL), ("show", pasted), ("show", EVIL, "--json"),
        ("retry", pasted), ("retry", EVIL, "--json"),
    ):  # fmt: skip
        done = outbox(migrated, "parked", *command)
        assert done.returncode == 0
        assert "\x1b" not in done.stdout, command
    shown = outbox(migrated, "parked", "show", EVIL).stdout
    assert "evil \\u001b[31mred\\u001b[0m [bold]markup[/bold]" in shown
    assert "\\u001b[2J [red]not red[/red]" in shown
    discarded = outbox(migrated, "parked", "discard", pasted, "--yes")
    assert (discarded.returncode, "\x1b" in discarded.stdout) == (0, False)


# --------------------------------------------------------------------------------------------- relay, adopt


@contextlib.contextmanager
def relay(environment: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    environment = {name: value for name, value in environment.items() if name != "PYTHONWARNINGS"}
    process = subprocess.Popen([OUTBOX, "relay"], env=environment, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_line(process: "subprocess.Popen[str]", wanted: str) -> str:
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if wanted in line:
            return seen
    raise AssertionError(seen)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_relay_publishes_and_drains_on_a_signal(
    migrated: dict[str, str], broker: str, topic: str, number: signal.Signals
) -> None:
    with relay({**migrated, "KAFKA_BOOTSTRAP_SERVERS": broker}) as process:
        assert "at=20" in wait_for_line(process, "lease taken")
        sql(migrated, "select outbox.emit('t', $1, 'k', '{}')", topic)
        deadline = time.monotonic() + 30
        while json.loads(outbox(migrated, "status", "--json").stdout)["shards"][0]["lag_events"]:
            assert time.monotonic() < deadline
        process.send_signal(number)
        wait_for_line(process, f"{number.name}: finishing what is in flight")
        assert process.wait(timeout=20) == 0
    assert sql(migrated, "select lease_owner is null from outbox.shards"), "the lease was handed back"


def test_the_relay_refuses_a_restored_database_until_it_is_adopted(migrated: dict[str, str], broker: str) -> None:
    environment = {**migrated, "KAFKA_BOOTSTRAP_SERVERS": broker}
    sql(migrated, "update outbox.logs set timeline = 'FFFFFFFF'")
    with relay(environment) as process:
        seen = wait_for_line(process, "error: ")
        assert process.wait(timeout=20) == 3
        assert "outbox adopt" in seen
        assert "Traceback" not in seen
    assert outbox(migrated, "status").returncode == 1
    unasked = outbox(environment, "adopt")
    assert (unasked.returncode, "--yes" in unasked.stderr) == (2, True)
    adopted = outbox(environment, "adopt", "--yes", "--json")
    assert adopted.returncode == 0, adopted.stderr
    assert json.loads(adopted.stdout)["log_id"] == sql(migrated, "select log_id from outbox.logs where is_current")
    assert outbox(migrated, "status").returncode == 0


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("command", [("relay",), ("status",), ("adopt", "--yes")])
def test_a_database_that_is_not_migrated_is_exit_4(environment: dict[str, str], command: tuple[str, ...]) -> None:
    done = outbox(environment, *command)
    assert done.returncode == 4
    assert "run: outbox migrate up" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_not_there_is_exit_4_and_no_secret_is_told(environment: dict[str, str]) -> None:
    done = outbox(environment, "--database-url", "postgresql://user:hunter2@127.0.0.1:1/db", "status")
    assert done.returncode == 4
    assert "cannot connect to user@127.0.0.1:1/db" in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_kafka_that_is_not_there_is_exit_4(migrated: dict[str, str]) -> None:
    sql(migrated, "insert into outbox.topics (topic, partition_count) values ('t', 1)")
    done = outbox(migrated, "adopt", "--yes", "--kafka", "127.0.0.1:1")
    assert done.returncode == 4
    assert "KAFKA_BOOTSTRAP_SERVERS" in done.stderr


def test_help_shows_no_secret_and_an_example(environment: dict[str, str]) -> None:
    secret = {**environment, "DATABASE_URL": "postgresql://user:hunter2@host/db"}
    for command in ((), ("migrate",), ("migrate", "up"), ("relay",), ("status",), ("parked", "show"), ("adopt",)):
        done = outbox(secret, *command, "--help")
        assert done.returncode == 0
        assert "hunter2" not in done.stdout
    assert "Example" in outbox(environment, "migrate", "up", "--help").stdout
    assert outbox(environment, "--version").stdout.startswith("sagabox ")
    assert outbox(environment, "nonsense").returncode == 2
