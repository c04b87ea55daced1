"""`saga list|show|why|plan`: what there is, and where it stands."""

import json
from dataclasses import asdict
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from outbox.cli.exits import UsageProblem
from outbox.cli.run import AsJson, DatabaseUrl, fail, out
from outbox.cli.status import age
from outbox.cli.visible import visible
from saga import inspection
from saga.cli.common import Place, database, go, leave_with_problem, print_value, settings_for
from saga.cli.timeline import STYLES, screen, sentence
from saga.inspection import Instance, Summary, Undo
from saga.settings import Settings
from saga.why import Why
from saga.why import why as reason_of

_LIST_ROWS: Final = 50
_NAME_COLUMNS: Final = 48
_NAME_MIN_COLUMNS: Final = 24
_ID_COLUMNS: Final = 38
_OTHER_COLUMNS: Final = 25
_WHY_MIN_COLUMNS: Final = 12

StateNames = Annotated[
    list[str] | None,
    typer.Option("--state", metavar="STATE", help=f"{', '.join(inspection.STATES)}; may be given more than once."),
]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, max=10_000, help="At most so many.")]


def list_instances(
    context: typer.Context,
    *,
    state: StateNames = None,
    saga: Annotated[str | None, typer.Option("--saga", metavar="NAME", help="Only of this saga.")] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", metavar="SECONDS", min=0, help="Only started so long ago.")
    ] = None,
    limit: Limit = _LIST_ROWS,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """List sagas, newest first.

    `--state paused` shows those that need a person; they, and compensating, failed and cancelled ones, are found by an
    index. For others the table is read, which takes a while where there are millions.
    """
    settings = settings_for(context, database_url)
    states = state or []
    for one in states:
        if one not in inspection.STATES:
            fail(UsageProblem(f"--state {one}: there is no such state; it is one of {', '.join(inspection.STATES)}"))
    go(_list(settings, states, saga, older_than, limit, as_json=as_json))


async def _list(
    settings: Settings, states: list[str], name: str | None, older_than: float | None, limit: int, *, as_json: bool
) -> None:
    async with database(settings, "list") as pool:
        found = await inspection.instances(
            pool, states=states, name=name, older_than_seconds=older_than, limit=limit + 1
        )
    shown = found[:limit]
    if as_json:
        print_value({"instances": [asdict(one) for one in shown], "more": len(found) > limit})
        return
    if not shown:
        out.print("there are no such sagas")
        return
    out.print(_listed(shown, out.width))
    if len(found) > limit:
        out.print(f"there are more: raise --limit {limit}, or narrow with --state and --saga", style="dim")


def _listed(shown: list[Summary], width: int) -> Table:
    """As much as the terminal has room for: the name of each can be pasted, so the id is shown where it fits."""
    names = [visible(f"{one.name}/{one.key}") for one in shown]
    usual = sorted(map(len, names))[(len(names) - 1) * 9 // 10]  # a few long ones are folded, or all lose room
    name_width = min(max(map(len, names)), max(usual, _NAME_MIN_COLUMNS), _NAME_COLUMNS)
    with_id = width >= name_width + _OTHER_COLUMNS + _ID_COLUMNS + _WHY_MIN_COLUMNS
    why_width = width - name_width - _OTHER_COLUMNS - (_ID_COLUMNS if with_id else 0)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    if with_id:
        table.add_column("Id", no_wrap=True)
    table.add_column("Saga/key", overflow="fold", min_width=name_width, max_width=name_width)
    table.add_column("State", no_wrap=True)
    table.add_column("Age", justify="right", no_wrap=True)
    table.add_column("Why", overflow="ellipsis", no_wrap=True, max_width=max(why_width, _WHY_MIN_COLUMNS))
    for one, name in zip(shown, names, strict=True):
        cells = (
            Text(name),
            Text(one.state, style=STYLES.get(one.state, "")),
            age((one.now - one.created_at).total_seconds()),
            Text(visible(_short(one)), style="dim"),
        )
        table.add_row(*(Text(str(one.id)), *cells) if with_id else cells)
    return table


def _short(one: Summary) -> str:
    return one.paused_reason or one.error or (f"cancel: {one.cancel_reason}" if one.cancel_reason else "")


def show(context: typer.Context, instance: Place, *, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """Draw the timeline of one saga: steps, what was undone, signals, late results, locks, and what persons did.

    Exits 1 when it needs a person.
    """
    go(_show(settings_for(context, database_url), instance, as_json=as_json))


async def _show(settings: Settings, place: str, *, as_json: bool) -> None:
    found = await _read(settings, "show", place)
    because = reason_of(found)
    if as_json:
        print_value({**_as_json(found), "why": asdict(because)})
    else:
        out.print(screen(found, out.width))
        _say(because)
    if because.needs_person:
        leave_with_problem()


def why(context: typer.Context, instance: Place, *, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """Say in one sentence what a saga waits for, why it is paused or how it ended, and what to do.

    Exits 1 when it needs a person.
    """
    go(_why(settings_for(context, database_url), instance, as_json=as_json))


async def _why(settings: Settings, place: str, *, as_json: bool) -> None:
    found = await _read(settings, "why", place)
    because = reason_of(found)
    if as_json:
        print_value({"id": found.id, "name": found.name, "key": found.key, "state": found.state, **asdict(because)})
    else:
        _say(because)
    if because.needs_person:
        leave_with_problem()


def _say(because: Why) -> None:
    for line in sentence(because):
        out.print(line, soft_wrap=True)


def plan(context: typer.Context, instance: Place, *, as_json: AsJson = False, database_url: DatabaseUrl = None) -> None:
    """Show the plan by which a saga is undone, in the order of execution; it is made when undoing begins."""
    go(_plan(settings_for(context, database_url), instance, as_json=as_json))


async def _plan(settings: Settings, place: str, *, as_json: bool) -> None:
    found = await _read(settings, "plan", place)
    if as_json:
        print_value({"id": found.id, "ending": found.ending, "plan": [asdict(row) for row in found.plan]})
        return
    if not found.plan:
        out.print("there is nothing to undo" if found.ending else "nothing of it is being undone")
        return
    out.print(_table(found.plan))


def _table(rows: tuple[Undo, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("#", "Step", "Undone by", "Status"):
        table.add_column(heading, no_wrap=True)
    table.add_column("Attempts", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in rows:
        again = f" (again, {row.round})" if row.round else ""
        needed = "" if row.required else " (need not be)"
        table.add_row(
            str(row.position),
            Text(visible(row.path) + again),
            Text(visible(row.action)),
            Text(row.status + needed, style=STYLES.get(row.status, "")),
            f"{row.attempts:,}",
            Text(visible(f"skipped: {row.resolution}" if row.resolution else row.error or ""), style="dim"),
        )
    return table


async def _read(settings: Settings, command: str, place: str) -> Instance:
    async with database(settings, command) as pool:
        return await inspection.read(pool, await inspection.find(pool, place))


_JSON: Final = ("input", "output", "payload")


def _as_json(found: Instance) -> dict[str, Any]:
    """Everything, with payloads as JSON rather than text."""
    return {name: _parsed(value) for name, value in asdict(found).items()}


def _parsed(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: json.loads(item) if name in _JSON and isinstance(item, str) else _parsed(item)
            for name, item in value.items()
        }
    return [_parsed(item) for item in value] if isinstance(value, list | tuple) else value
