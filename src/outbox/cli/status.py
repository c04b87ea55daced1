"""`outbox status`: the state of the log, the relay and the consumers on one screen."""

import asyncio
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from outbox import postgres
from outbox.cli.exits import Exit, UsageProblem, explain
from outbox.cli.run import AsJson, DatabaseUrl, connected, out, print_json, run, settings_of
from outbox.cli.visible import visible
from outbox.settings import Settings
from outbox.upkeep import status as overview


def status(
    context: typer.Context,
    *,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", metavar="SECONDS", min=0.2, help="Between two refreshes.")
    ] = 2.0,
    max_lag: Annotated[
        float | None, typer.Option("--max-lag", metavar="SECONDS", min=0, help="A longer lag is a problem.")
    ] = None,
    database_url: DatabaseUrl = None,
) -> None:
    """Show lag, leases, parked keys and consumers' positions.

    Exits 1 when something needs a person: parked keys, events to publish and no relay, a restored database, partitions
    that stand still, or a lag above --max-lag.
    """
    settings = settings_of(context, database_url=database_url)
    if not watch:
        run(_status(settings, max_lag, as_json=as_json))
        return
    try:
        run(_watch(settings, max_lag, interval, as_json=as_json))
    except KeyboardInterrupt:
        raise typer.Exit(Exit.OK) from None


async def _status(settings: Settings, max_lag: float | None, *, as_json: bool) -> None:
    async with connected(settings, application="outbox status") as pool:
        found = await overview.read(pool)
    problems = found.problems(max_lag_seconds=max_lag)
    if as_json:
        print_json({**asdict(found), "problems": problems})
    else:
        out.print(screen(found, problems))
    if problems:
        raise typer.Exit(Exit.PROBLEM)


async def _watch(settings: Settings, max_lag: float | None, interval: float, *, as_json: bool) -> None:
    """Refresh until interrupted; a server that is away for a while is reported and asked again."""
    if as_json or not out.is_terminal:
        raise UsageProblem("--watch draws on a terminal; leave it out to print once, or for --json")
    async with connected(settings, application="outbox status") as pool:
        with Live(console=out, screen=True, auto_refresh=False) as live:
            while True:
                try:
                    found = await overview.read(pool)
                    picture: RenderableType = screen(found, found.problems(max_lag_seconds=max_lag))
                except (postgres.PostgresError, *postgres.CONNECTION_ERRORS) as error:
                    picture = _problem(explain(error)[1])
                live.update(picture, refresh=True)
                await asyncio.sleep(interval)


def screen(found: overview.Status, problems: list[str]) -> Group:
    """Everything on one screen, the problems last, where the eye ends."""
    parts: list[RenderableType] = [_headline(found), Text(""), _shards(found)]
    if found.parked:
        parts += [Text(""), _parked(found)]
    if found.positions:
        parts += [Text(""), _positions(found)]
    parts.append(Text(""))
    parts += [_problem(problem) for problem in problems] or [Text("ok", style="bold green")]
    return Group(*parts)


def _headline(found: overview.Status) -> Text:
    role = "  standby" if found.standby else ""
    return Text.assemble(
        (visible(found.database), "bold"),
        f"  log {found.log_id} since {found.log_since:%Y-%m-%d %H:%M}{role}",
        (f"  {found.at:%Y-%m-%d %H:%M:%S} UTC", "dim"),
    )


def _problem(text: str) -> Text:
    return Text.assemble(("problem: ", "bold red"), visible(text))


def _table(*headings: str, right: tuple[str, ...] = ()) -> Table:
    """A table whose last column gives way first where the terminal is narrow."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(
            heading,
            justify="right" if heading in right else "left",
            no_wrap=heading != headings[-1],
            overflow="ellipsis",
        )
    return table


def _shards(found: overview.Status) -> Table:
    right = ("Shard", "Lag", "Oldest", "Logged", "Done", "In flight", "Epoch", "Lease")
    table = _table(*right, "Relay", right=right)
    for shard in found.shards:
        more = "" if shard.lag_exact else "+"
        table.add_row(
            str(shard.shard),
            Text(f"{shard.lag_events:,}{more}", style="yellow" if shard.lag_events else ""),
            f"{age(shard.lag_seconds)}{more}" if shard.lag_events else "-",
            f"{shard.windows_logged:,}",
            f"{shard.windows_done:,}",
            f"{shard.windows_in_flight:,}",
            f"{shard.epoch:,}",
            "none" if shard.lease_seconds is None else f"{shard.lease_seconds:.1f} s",
            "-" if shard.owner is None else shard.owner[:8],
        )
    return table


def _parked(found: overview.Status) -> Table:
    table = _table("Parked by", "Keys", "Events", "Oldest", right=("Keys", "Events", "Oldest"))
    for parked in found.parked:
        table.add_row(
            Text(visible(parked.parker)),
            Text(f"{parked.keys:,}", style="red"),
            f"{parked.events:,}",
            age((found.at - parked.since).total_seconds()),
        )
    return table


def _positions(found: overview.Status) -> Table:
    right = ("Partition", "Next offset", "Moved")
    table = _table("Consumer", "Topic", *right, "State", "Owner", right=right)
    for position in found.positions:
        table.add_row(
            Text(visible(position.consumer)),
            Text(visible(position.topic)),
            str(position.partition),
            f"{position.next_offset:,}",
            f"{age((found.at - position.updated_at).total_seconds())} ago",
            Text(position.state.replace("_", " "), style="" if position.state == "running" else "bold red"),
            "-" if position.owner is None else Text(visible(position.owner)),
        )
    return table


def age(seconds: float) -> str:
    """A duration in the unit that reads best."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{max(seconds, 0.0):.1f} s"
