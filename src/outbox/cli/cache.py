"""`outbox cache`: rebuild a cache from its owner, compare the two, see how caches are."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from outbox import clock, limits
from outbox.cache import Cache, generations
from outbox.cache import rebuild as rebuilding
from outbox.cache.http import HttpOwner
from outbox.cache.reconcile import Comparison, Reconcile
from outbox.cli.cache_explain import explain_key
from outbox.cli.exits import Exit, UsageProblem
from outbox.cli.loading import cache_of
from outbox.cli.run import AsJson, DatabaseUrl, connected, err, fail, out, print_json, run, settings_of
from outbox.cli.status import age
from outbox.cli.visible import visible
from outbox.errors import OutboxError
from outbox.postgres import Pool
from outbox.settings import Settings
from outbox.upkeep import caches, migrate

app = typer.Typer(no_args_is_help=True, help="Rebuild caches, compare them with their owners, see how they are.")

TableName = Annotated[str, typer.Argument(metavar="TABLE", help="As the cache is declared.", show_default=False)]
App = Annotated[
    str | None,
    typer.Option(
        "--app",
        metavar="MODULE[:NAME]",
        help="Where the cache is declared: a module, a cache in it, or a function that returns the cache.",
        show_default=False,
    ),
]


# ------------------------------------------------------------------------------------------------------------ rebuild


@app.command(epilog="Examples: `outbox cache rebuild agents --app shop.caches`, `outbox cache rebuild agents --finish`")
def rebuild(
    context: typer.Context,
    table: TableName,
    *,
    app_name: App = None,
    new_generation: Annotated[
        bool, typer.Option("--new-generation", help="Fill a second table, then swap; readers see no change before.")
    ] = False,
    rollback: Annotated[bool, typer.Option("--rollback", help="Swap back to the former generation, at once.")] = False,
    finish: Annotated[bool, typer.Option("--finish", help="Drop the generation that is not in use.")] = False,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Copy all rows of the owner into the cache, while events go on arriving; rows that the owner lacks go.

    Partitions that stand still because Kafka lost records are set free. When interrupted, by whatever means, the same
    command goes on after the last page.
    """
    settings = settings_of(context, database_url=database_url)
    try:
        if sum((new_generation, rollback, finish)) > 1:
            fail(UsageProblem("--new-generation, --rollback and --finish are different steps; give one of them"))
        if rollback or finish:
            run(_generation(settings, table, finish=finish, as_json=as_json))
            return
        run(_rebuild(settings, table, app_name, new_generation=new_generation, as_json=as_json))
    except KeyboardInterrupt:
        err.print("stopped; the same command goes on from here")
        raise typer.Exit(Exit.PROBLEM) from None


async def _rebuild(
    settings: Settings, table: str, app_name: str | None, *, new_generation: bool, as_json: bool
) -> None:
    async with connected(settings, application="outbox cache rebuild", max_size=4) as pool:
        await migrate.check(pool)
        cache = await _declared(table, app_name)
        started = clock.monotonic()
        if cache.owner is None:
            await _free_only(pool, cache, as_json=as_json)
            return
        with _progress(table, await _estimate(pool, cache)) as report:
            if new_generation:
                done = await generations.renew(pool, cache, report=report)
            else:
                done = await rebuilding.Rebuild(pool, cache).run(report=report, free=True)
        seconds = clock.monotonic() - started
        await _close(cache)
    if as_json:
        print_json({"table": table, "swapped": new_generation, "seconds": seconds, **asdict(done)})
        return
    out.print(
        f"{visible(table)}: {done.rows:,} rows in {done.pages:,} pages, "
        f"{done.changed:,} written, {done.removed:,} removed"
    )
    if new_generation:
        out.print("swapped; the former generation is kept and fed: go back with --rollback, or drop it with --finish")


async def _free_only(pool: Pool, cache: Cache[Any], *, as_json: bool) -> None:
    freed = await rebuilding.free(pool, cache)
    if not freed:
        raise OutboxError(
            f"cache {cache.table} has no owner to copy rows from, and no partition stands still: nothing to do; "
            "declare an owner: Cache(..., owner=...)"
        )
    if as_json:
        print_json({"table": cache.table, "freed": freed})
        return
    out.print(f"{visible(cache.table)}: its topic is read from the oldest record that Kafka has")
    out.print("the cache has no owner, so what Kafka has lost stays lost")


async def _generation(settings: Settings, table: str, *, finish: bool, as_json: bool) -> None:
    async with connected(settings, application="outbox cache rebuild") as pool:
        await migrate.check(pool)
        if finish:
            dropped = await generations.finish(pool, table)
            text = f"dropped {visible(dropped)}"
        else:
            await generations.rollback(pool, table)
            text = f"{visible(table)} is the former generation again; --rollback once more undoes that"
    if as_json:
        print_json({"table": table, "step": "finish" if finish else "rollback"})
    else:
        out.print(text)


class _Rate(ProgressColumn):
    def render(self, task: "Task") -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:,.0f} rows/s")


@contextmanager
def _progress(table: str, estimate: int) -> Iterator[rebuilding.Report]:
    """A bar on the terminal; how long it is depends on what the cache held before, so it is a guess."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} rows"),
        _Rate(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task(visible(table), total=estimate if estimate > 0 else None)

        def report(progress: rebuilding.Progress) -> None:
            total = progress.rows if progress.finished else max(estimate, progress.rows)
            bar.update(task, completed=progress.rows, total=total if estimate > 0 else None)

        yield report


async def _estimate(pool: Pool, cache: Cache[Any]) -> int:
    merge = await cache.prepare(pool)
    rows: int = await rebuilding.SQL.estimate.fetchval(pool, merge.table.oid)
    return rows


async def _declared(table: str, app_name: str | None) -> Cache[Any]:
    if app_name is None:
        raise UsageProblem("say where the cache is declared: --app package.module")
    return await cache_of(app_name, table)


async def _close(cache: Cache[Any]) -> None:
    if isinstance(cache.owner, HttpOwner):
        await cache.owner.close()


# ---------------------------------------------------------------------------------------------------------- reconcile


@app.command(epilog="Examples: `outbox cache reconcile agents --app shop.caches`, the same with `--fix`")
def reconcile(
    context: typer.Context,
    table: TableName,
    *,
    app_name: App = None,
    fix: Annotated[bool, typer.Option("--fix", help="Repair what has drifted.")] = False,
    grace: Annotated[
        float, typer.Option("--grace", metavar="SECONDS", min=0, help="Between the two looks at a row that differs.")
    ] = limits.RECONCILE_GRACE_SECONDS,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Compare the cache with its owner by digests, and list the keys that have drifted; exits 1 if any are left."""
    run(
        _reconcile(
            settings_of(context, database_url=database_url), table, app_name, fix=fix, grace=grace, as_json=as_json
        )
    )


async def _reconcile(
    settings: Settings, table: str, app_name: str | None, *, fix: bool, grace: float, as_json: bool
) -> None:
    async with connected(settings, application="outbox cache reconcile") as pool:
        await migrate.check(pool)
        cache = await _declared(table, app_name)
        found = await Reconcile(pool, cache, grace_seconds=grace).run(fix=fix)
        await _close(cache)
    if as_json:
        print_json({"table": table, "fixed": fix, **asdict(found)})
    else:
        _print_comparison(table, found, fix=fix)
    if found.drifted > found.repaired:
        raise typer.Exit(Exit.PROBLEM)


def _print_comparison(table: str, found: Comparison, *, fix: bool) -> None:
    if found.drifts:
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for heading in ("Key", "Drift", "Columns"):
            shown.add_column(heading, overflow="fold")
        for drift in found.drifts:
            kind = f"{drift.kind} (parked)" if drift.parked else drift.kind
            shown.add_row(Text(visible(drift.key)), kind, Text(visible(", ".join(drift.columns))))
        out.print(shown)
        if found.drifted > len(found.drifts):
            out.print(f"and {found.drifted - len(found.drifts):,} more", style="dim")
    out.print(f"{visible(table)}: {found.rows:,} rows compared, {found.drifted:,} keys have drifted")
    if found.uncompared:
        out.print(f"not compared, the owner does not return them: {visible(', '.join(found.uncompared))}")
    if found.same:
        out.print(f"{found.same:,} keys differ as text only: cast in the owner's query as the table has it")
    if found.moving:
        out.print(f"{found.moving:,} keys changed while they were compared: run it again")
    if fix and found.drifted:
        out.print(f"{found.repaired:,} repaired")


# ------------------------------------------------------------------------------------------------------------- status


@app.command(epilog="Example: `outbox cache status --max-lag 60 --json`")
def status(
    context: typer.Context,
    *,
    max_lag: Annotated[
        float | None, typer.Option("--max-lag", metavar="SECONDS", min=0, help="A longer lag is a problem.")
    ] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Show the caches of the database; exits 1 when one needs a person.

    That is: partitions that stand still, parked keys, a rebuild that stopped, or a lag above --max-lag.
    """
    run(_status(settings_of(context, database_url=database_url), max_lag, as_json=as_json))


async def _status(settings: Settings, max_lag: float | None, *, as_json: bool) -> None:
    async with connected(settings, application="outbox cache status") as pool:
        await migrate.check(pool)
        found = await caches.read(pool)
    problems = [problem for cache in found for problem in cache.problems(max_lag_seconds=max_lag)]
    if as_json:
        print_json({"caches": [asdict(cache) for cache in found], "problems": problems})
    else:
        _print_status(found, problems)
    if problems:
        raise typer.Exit(Exit.PROBLEM)


def _print_status(found: list[caches.CacheStatus], problems: list[str]) -> None:
    if not found:
        out.print("no consumer has fed a cache in this database")
        return
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    shown.add_column("Cache", overflow="fold")
    for heading in ("Rows", "Behind", "Parked", "Owner's log"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for cache in found:
        behind = "unknown" if cache.lag_seconds is None else age(cache.lag_seconds)
        rows = "unknown" if cache.live_rows < 0 else f"{cache.live_rows:,}"
        shown.add_row(Text(visible(cache.name)), rows, behind, f"{cache.parked:,}", cache.complete_log or "none")
    out.print(shown)
    for cache in found:
        for line in _details(cache):
            out.print(Text(visible(f"{cache.name}: {line}"), style="dim"))
    for problem in problems:
        out.print(Text.assemble(("problem: ", "bold red"), visible(problem)), soft_wrap=True)
    if not problems:
        out.print("ok", style="green")


def _details(cache: caches.CacheStatus) -> Iterator[str]:
    if cache.spare is not None:
        yield f"a second generation is fed, {cache.spare}"
    for rebuild in cache.rebuilds:
        table = "the spare table" if rebuild.role == "spare" else "the table"
        done = f"{rebuild.rows:,} rows in {rebuild.pages:,} pages"
        if rebuild.finished_at is not None:
            yield f"rebuild of {table} ended {rebuild.finished_at:%Y-%m-%d %H:%M:%S} UTC: {done}"
        elif rebuild.working:
            yield f"rebuild of {table} by {rebuild.worker}: {done} so far"


# ------------------------------------------------------------------------------------------------------------ explain


app.command("explain", epilog="Example: `outbox cache explain agents 0b6f... --app shop.caches --newest 1000000`")(
    explain_key
)
