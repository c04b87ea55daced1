"""Which error ends in which code, and that nothing printed holds a secret."""

import logging

import asyncpg
import pytest
import typer
from aiokafka.errors import KafkaConnectionError

from outbox import errors
from outbox.cli import app, main, run
from outbox.cli.exits import Exit, NotReachable, UsageProblem, explain
from outbox.cli.logs import KeyValue
from outbox.cli.run import Options, settings_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageProblem("x"), Exit.USAGE),
        (errors.RestoreDetected("x"), Exit.REFUSED),
        (errors.NotMigrated("x"), Exit.NOT_READY),
        (NotReachable("x"), Exit.NOT_READY),
        (errors.MigrationChanged("x"), Exit.PROBLEM),
        (errors.MigrationBusy("x"), Exit.PROBLEM),
        (KafkaConnectionError("x"), Exit.NOT_READY),
        (asyncpg.UndefinedTableError("x"), Exit.NOT_READY),
        (asyncpg.InsufficientPrivilegeError("x"), Exit.PROBLEM),
        (asyncpg.DivisionByZeroError("x"), Exit.PROBLEM),
        (asyncpg.ConnectionDoesNotExistError("x"), Exit.NOT_READY),
        (ConnectionRefusedError("x"), Exit.NOT_READY),
        (TimeoutError(), Exit.NOT_READY),
    ],
)
def test_each_error_has_its_code_and_says_something(error: Exception, code: Exit) -> None:
    found, text = explain(error)
    assert found is code
    assert text


def test_a_bug_keeps_its_traceback() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run.run(broken())


def test_the_flag_behind_the_command_wins_over_the_one_in_front(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://env/env")
    context = typer.Context(typer.main.get_command(typer.Typer(callback=lambda: None)))
    context.obj = Options(database_url="postgresql://front/db", kafka="front:1")
    settings = settings_of(context, database_url="postgresql://behind/db")
    assert (settings.database_url.get_secret_value(), settings.kafka) == ("postgresql://behind/db", "front:1")
    context.obj = None
    assert settings_of(context).database_url.get_secret_value() == "postgresql://env/env"


def test_a_setting_that_cannot_be_used_is_named_and_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGABOX_LEASE_SECONDS", "hunter2")
    context = typer.Context(typer.main.get_command(typer.Typer(callback=lambda: None)))
    with pytest.raises(UsageProblem, match="lease_seconds") as caught:
        settings_of(context)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:hun/ter2@host/db",
        "postgresql://user:12/hunter2@host/db",
        "postgresql://user:99999/hunter2@host/db",
        "mysql://user:hunter2@host/db",
        "host=here password=hunter2",
    ],
)
def test_a_broken_url_is_not_repeated(url: str) -> None:
    with pytest.raises(UsageProblem, match="postgresql://user:password@host") as caught:
        run._describe(url)
    assert "hunter2" not in str(caught.value)
    assert "ter2" not in str(caught.value)


def test_a_good_url_is_described_without_its_password() -> None:
    assert run._describe("postgresql://user:hunter2@host/shop?password=hunter2") == "user@host:5432/shop"


def line(*, error: Exception | None = None, message: str = "hello") -> str:
    info = (type(error), error, None) if error else None
    return KeyValue().format(logging.LogRecord("outbox.x", logging.INFO, "", 1, message, None, info))


def test_a_log_line_is_one_line_of_pairs() -> None:
    text = line(message='one\ntwo "quoted" \x1b[0m')
    assert text.endswith(" level=info logger=outbox.x message=\"one\\ntwo 'quoted' \\u001b[0m\"")
    assert text.startswith("at=20")
    assert "\n" not in text


def test_a_foreseen_error_has_no_traceback_and_a_bug_has_one() -> None:
    assert line(error=errors.NotMigrated("x")).endswith(" error=NotMigrated")
    assert line(error=ZeroDivisionError("x")).endswith("error=ZeroDivisionError\nZeroDivisionError: x")


def test_other_distributions_join_by_an_entry_point(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = typer.Typer()

    @theirs.command()
    def one() -> None:
        typer.echo("hello from one")

    @theirs.command()
    def two() -> None: ...

    class Entry:
        name = "theirs"

        def load(self) -> typer.Typer:
            return theirs

    monkeypatch.setattr(app, "app", typer.Typer(callback=lambda: None))
    monkeypatch.setattr(app, "entry_points", lambda group: [Entry()] if group == "outbox.cli" else [])
    monkeypatch.setattr("sys.argv", ["outbox", "theirs", "one"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0
    assert capsys.readouterr().out == "hello from one\n"
