"""`outbox migrate` and `saga migrate`: up, down, status, sql; `Options.package` says whose migrations."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from outbox.cli.exits import Exit, UsageProblem
from outbox.cli.run import AsJson, DatabaseUrl, Options, connected, fail, out, print_json, run, settings_of
from outbox.postgres import Pool
from outbox.settings import Settings
from outbox.upkeep import migrate
from outbox.upkeep import status as overview

app = typer.Typer(no_args_is_help=True, help="Create, change and remove our tables.")

_STATE_STYLES = {"applied": "green", "pending": "yellow", "changed": "bold red", "unknown": "magenta"}


def _package(context: typer.Context) -> str:
    return context.obj.package if isinstance(context.obj, Options) else Options().package


@app.command(epilog="Examples: `outbox migrate up --database-url postgresql://owner@db/shop`; `saga migrate up`")
def up(
    context: typer.Context,
    *,
    to: Annotated[int | None, typer.Option("--to", metavar="N", help="Stop after migration N.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Apply what is missing; does nothing where nothing is. `saga migrate up` applies those of `outbox` first."""
    run(_up(settings_of(context, database_url=database_url), _package(context), to, as_json=as_json))


async def _up(settings: Settings, package: str, to: int | None, *, as_json: bool) -> None:
    async with connected(settings, application="outbox migrate") as pool:
        try:
            applied = () if package == "outbox" else await migrate.up(pool)  # what all others stand on
            applied += await migrate.up(pool, package=package, to=to)
        except ValueError as error:
            raise UsageProblem(str(error)) from error
    _say("applied", applied, as_json=as_json)


def _say(what: str, migrations: Sequence[migrate.Migration], *, as_json: bool) -> None:
    """What was done to which of them."""
    if as_json:
        print_json([{"migration": str(migration), "done": what} for migration in migrations])
        return
    for migration in migrations:
        out.print(f"{what} {migration}")
    if not migrations:
        out.print("nothing to do")


@app.command(epilog="Examples: `outbox migrate down`, `saga migrate down --to 0 --yes`")
def down(
    context: typer.Context,
    *,
    to: Annotated[
        int | None, typer.Option("--to", metavar="N", help="Take back all above N; 0 takes back everything.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Take back the newest migration, and **the data in its tables**; stop relays, consumers and workers first."""
    if as_json and not yes:
        fail(UsageProblem("--json cannot ask; nothing was done, repeat with --yes to go ahead"))
    run(_down(settings_of(context, database_url=database_url), _package(context), to, yes=yes, as_json=as_json))


async def _down(settings: Settings, package: str, to: int | None, *, yes: bool, as_json: bool) -> None:
    async with connected(settings, application="outbox migrate") as pool:
        try:
            planned = await migrate.planned_down(pool, package=package, to=to)
        except ValueError as error:
            raise UsageProblem(str(error)) from error
        if planned and not yes:
            await _confirm(pool, package, planned)
        done = await migrate.down(pool, package=package, to=planned[-1].number - 1) if planned else []
    _say("took back", done, as_json=as_json)


async def _confirm(pool: Pool, package: str, planned: tuple[migrate.Migration, ...]) -> None:
    """Say what would be lost, and ask."""
    out.print(f"This takes back {', '.join(map(str, planned))}, with all data in their tables.")
    if planned[-1].number == 1 and package == "outbox":
        found = await overview.read(pool)
        events = f"{found.lag_events:,}{'' if all(s.lag_exact for s in found.shards) else ' or more'}"
        out.print(f"The log holds {events} events that are not published yet; they would be lost.")
    if not out.is_terminal:
        raise UsageProblem("cannot ask without a terminal; nothing was done, repeat with --yes to go ahead")
    if not typer.confirm("Go ahead?"):
        out.print("nothing was done")
        raise typer.Exit(Exit.USAGE)


@app.command(epilog="Exits 1 while something is pending or changed. Example: `outbox migrate status --json`")
def status(context: typer.Context, *, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """List the migrations and whether this database has them."""
    run(_status(settings_of(context, database_url=database_url), _package(context), as_json=as_json))


async def _status(settings: Settings, package: str, *, as_json: bool) -> None:
    async with connected(settings, application="outbox migrate") as pool:
        rows = await migrate.status(pool, package=package)
    if as_json:
        print_json([asdict(row) for row in rows])
    else:
        out.print(status_table(rows))
    if any(row.state in ("pending", "changed") for row in rows):
        raise typer.Exit(Exit.PROBLEM)


def status_table(rows: list[migrate.MigrationStatus]) -> Table:
    """Migrations as a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for heading in ("Migration", "State", "Applied", "SHA-256"):
        table.add_column(heading, no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.number:04d}_{row.name}",
            Text(row.state, style=_STATE_STYLES[row.state]),
            f"{row.applied_at:%Y-%m-%d %H:%M:%S}" if row.applied_at else "",
            row.checksum[:12],
        )
    return table


@app.command(epilog="Example: `outbox migrate sql | psql --single-transaction -v ON_ERROR_STOP=1 shop`")
def sql(
    context: typer.Context,
    *,
    first: Annotated[int, typer.Option("--from", metavar="N", min=1, help="Start with migration N.")] = 1,
    to: Annotated[int | None, typer.Option("--to", metavar="N", help="End with migration N.")] = None,
    reverse: Annotated[bool, typer.Option("--down", help="The way back, newest migration first.")] = False,
) -> None:
    """Print the statements, bookkeeping included, for Alembic and other tools; needs no database."""
    try:
        statements = migrate.statements(_package(context), first=first, to=to, reverse=reverse)
    except ValueError as error:
        fail(UsageProblem(str(error)))
    for statement in statements:
        typer.echo(f"{statement};\n")
