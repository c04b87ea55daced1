"""What every command does: find its settings, connect, work, and end with a code that says how it went."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

import pydantic
import typer
from pydantic import SecretStr
from rich.console import Console

from outbox import postgres
from outbox.cli.exits import EXPLAINED, NotReachable, UsageProblem, explain
from outbox.cli.visible import visible
from outbox.postgres import Pool
from outbox.settings import Settings

DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database-url", metavar="URL", help="PostgreSQL, instead of $DATABASE_URL.", show_default=False),
]
Kafka = Annotated[
    str | None,
    typer.Option(
        "--kafka", metavar="HOST:PORT", help="Brokers, instead of $KAFKA_BOOTSTRAP_SERVERS.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

S = TypeVar("S", bound=Settings)

out: Final = Console(highlight=False, markup=False, emoji=False)
err: Final = Console(highlight=False, markup=False, emoji=False, stderr=True)

_URL_HELP: Final = "postgresql://user:password@host:5432/database, special characters percent-encoded"
_COMMAND_CONNECTIONS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options given in front of the command; the same ones given behind it win."""

    database_url: str | None = None
    kafka: str | None = None
    package: str = "outbox"
    """Whose migrations `migrate` is about."""


def settings_of(context: typer.Context, *, database_url: str | None = None, kafka: str | None = None) -> Settings:
    """Settings from the environment, then from the flags.

    Raises:
        UsageProblem: a value cannot be used; says which, never what it was.
    """
    return settings_of_kind(Settings, context, database_url=database_url, kafka=kafka)


def settings_of_kind(kind: type[S], context: typer.Context, *, database_url: str | None, kafka: str | None) -> S:
    """The same, where another package has settings of its own.

    Raises:
        UsageProblem: a value cannot be used; says which, never what it was.
    """
    given = context.obj if isinstance(context.obj, Options) else Options()
    flags: dict[str, Any] = {}
    if url := database_url or given.database_url:
        flags["database_url"] = SecretStr(url)
    if servers := kafka or given.kafka:
        flags["kafka"] = servers
    try:
        return kind(**flags)
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_context=False, include_input=False)
        )
        raise UsageProblem(f"settings: {problems}; correct the flag or the SAGABOX_* variable") from None


@asynccontextmanager
async def connected(
    settings: Settings, *, application: str, max_size: int = _COMMAND_CONNECTIONS
) -> AsyncIterator[Pool]:
    """A pool on the database of the settings.

    Raises:
        NotReachable: it cannot be reached, or does not let us in.
        UsageProblem: the URL is none.
    """
    url = settings.database_url.get_secret_value()
    where = _describe(url)
    opening = postgres.open_pool(url, max_size=max_size, application=application)
    try:
        pool = await opening.__aenter__()
    except (postgres.PostgresError, *postgres.CONNECTION_ERRORS) as error:
        reason = visible(str(error)) or type(error).__name__
        raise NotReachable(
            f"cannot connect to {where}: {reason}; check DATABASE_URL, and that PostgreSQL runs and lets you in"
        ) from error
    try:
        yield pool
    except BaseException:
        pool.terminate()
        raise
    await opening.__aexit__(None, None, None)


def _describe(url: str) -> str:
    """A database without its password. A URL that cannot be read is not repeated: the password may be what broke it."""
    try:
        parts = urlsplit(url)
        port = parts.port or 5432
    except ValueError:
        raise UsageProblem(f"DATABASE_URL cannot be read; write {_URL_HELP}") from None
    if "@" in parts.path:
        raise UsageProblem(f"DATABASE_URL has a / or another special character in its password; write {_URL_HELP}")
    if parts.scheme not in ("postgresql", "postgres"):
        raise UsageProblem(f"DATABASE_URL is not a PostgreSQL URL; write {_URL_HELP}")
    user = f"{parts.username}@" if parts.username else ""
    return visible(f"{user}{parts.hostname or 'localhost'}:{port}{parts.path}")


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a command to its end; an error that an operator can act on becomes one message and an exit code."""
    try:
        asyncio.run(work)
    except EXPLAINED as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Say what is wrong and what to do, and end with the code that fits."""
    code, text = explain(error)
    err.print("error:", style="bold red", end=" ")
    err.print(visible(text), soft_wrap=True)
    raise typer.Exit(code) from error


def print_json(value: object) -> None:
    """One JSON document; ASCII, so that nothing in it can address the terminal."""
    json.dump(value, sys.stdout, indent=2, default=_plain)
    sys.stdout.write("\n")


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"no JSON for {type(value).__name__}")
