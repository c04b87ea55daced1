"""What the commands for persons share: how an instance is named, and errors without tracebacks."""

from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any
from uuid import UUID

import typer

from outbox.cli.exits import Exit, UsageProblem
from outbox.cli.loading import imported
from outbox.cli.run import connected, fail, print_json, run, settings_of_kind
from outbox.errors import OutboxError
from outbox.postgres import Pool
from outbox.upkeep import migrate
from saga.definition import Saga
from saga.errors import Rejected, SagaError
from saga.settings import Settings

Place = Annotated[
    str,
    typer.Argument(metavar="ID", help="The instance's id, or SAGA/KEY as in place_order/order-42.", show_default=False),
]
Reason = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why; it is kept with the instance.", show_default=False)
]
App = Annotated[
    str | None, typer.Option("--app", metavar="MODULE", help="The module with the saga's code.", show_default=False)
]


class SagaProblem(OutboxError):
    """What a saga's error says, for the command line."""


def go(work: "Coroutine[Any, Any, None]") -> None:
    """Run a command to its end; errors of sagas become one line each, like those of the outbox."""
    run(_explained(work))


async def _explained(work: "Coroutine[Any, Any, None]") -> None:
    try:
        await work
    except Rejected as error:
        raise SagaProblem(f"rejected: {error.reason}; nothing was started") from error
    except SagaError as error:
        raise SagaProblem(str(error)) from error


def settings_for(context: typer.Context, database_url: str | None) -> Settings:
    """The settings, or the end of the command."""
    try:
        return settings_of_kind(Settings, context, database_url=database_url, kafka=None)
    except UsageProblem as error:
        fail(error)


@asynccontextmanager
async def database(settings: Settings, command: str) -> AsyncIterator[Pool]:
    """A pool on a database that has the sagas' tables."""
    async with connected(settings, application=f"saga {command}") as pool:
        await migrate.check(pool, package="saga")
        yield pool


def sagas_of(module_name: str) -> dict[str, list[Saga[Any, Any]]]:
    """The sagas of a module by name, newest version first.

    Raises:
        UsageProblem: it cannot be imported.
    """
    found: dict[int, Saga[Any, Any]] = {
        id(value): value for value in vars(imported(module_name)).values() if isinstance(value, Saga)
    }
    named: dict[str, list[Saga[Any, Any]]] = {}
    for one in sorted(found.values(), key=lambda saga: -saga.version):
        named.setdefault(one.name, []).append(one)
    return named


def saga_named(module_name: str, name: str, version: int | None = None) -> Saga[Any, Any]:
    """One saga of a module: the newest version, or a given one.

    Raises:
        UsageProblem: the module has none of that name.
    """
    named = sagas_of(module_name)
    for one in named.get(name, []):
        if version in (None, one.version):
            return one
    wanted = name if version is None else f"{name} version {version}"
    known = [f"version {one.version}" for one in named.get(name, [])] or sorted(named) or ["none"]
    raise UsageProblem(f"module {module_name} has no saga {wanted}; it has: {', '.join(known)}")


def plain(value: Any) -> Any:
    """A value for `print_json`: ids as text."""
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def print_value(value: Any) -> None:
    """A dataclass, or a list or dict of plain values, as JSON."""
    print_json(plain(asdict(value) if hasattr(value, "__dataclass_fields__") else value))


def leave_with_problem() -> None:
    """Something needs a person."""
    raise typer.Exit(Exit.PROBLEM)
