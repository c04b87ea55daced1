"""`saga start|signal|cancel|pause|resume`: what persons tell sagas."""

import sys
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer
from rich.text import Text

from outbox.cli.exits import UsageProblem
from outbox.cli.run import AsJson, DatabaseUrl, fail, out
from outbox.cli.visible import visible
from outbox.postgres import Pool
from saga import inspection, operate
from saga.cli.common import App, Place, Reason, database, go, print_value, saga_named, settings_for
from saga.cli.signals import checked_signal
from saga.errors import NotPossible
from saga.operate import Done
from saga.settings import Settings

_EFFECTS = {
    "requested": "a cancel is asked for: what has happened is undone",
    "recorded": "the cancel is recorded; nothing follows: the saga is past its pivot, or is being undone already",
    "paused": "paused",
    "pausing": "pauses as soon as the calls under way have ended",
    "resumed": "goes on",
    "accepted": "the signal is sent",
    "duplicate": "this signal was sent before, under the same dedupe key; nothing was done",
}


def start(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="SAGA", help="The saga's name.", show_default=False)],
    request: Annotated[
        str, typer.Argument(metavar="REQUEST", help="The request as JSON; - reads standard input.", show_default=False)
    ],
    *,
    app: Annotated[
        str, typer.Option("--app", metavar="MODULE", help="The module with the saga's code.", show_default=False)
    ],
    key: Annotated[
        str | None,
        typer.Option(
            "--key", metavar="KEY", help="Another start under the same key finds this one.", show_default=False
        ),
    ] = None,
    version: Annotated[int | None, typer.Option("--version", metavar="N", help="Not the newest version.")] = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Start a saga; a worker takes it. Under a key it is safe to repeat."""
    go(
        _start(settings_for(context, database_url), app, (name, version), _text(request), key, as_json=as_json),
    )


async def _start(
    settings: Settings, app: str, wanted: tuple[str, int | None], request: str, key: str | None, *, as_json: bool
) -> None:
    one = saga_named(app, *wanted)
    async with database(settings, "start") as pool:
        handle = await operate.start(pool, one, request, key)
    if as_json:
        print_value({"id": handle.id, "name": one.name, "version": one.version, "key": handle.key})
    else:
        out.print(Text(f"{handle.id}  {one.name} {visible(handle.key)} is started"), soft_wrap=True)


def _text(argument: str) -> str:
    if argument != "-":
        return argument
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        fail(UsageProblem("standard input is not UTF-8"))


def signal(
    context: typer.Context,
    instance: Place,
    name: Annotated[str, typer.Argument(metavar="SIGNAL", help="The name of the signal's class.", show_default=False)],
    payload: Annotated[str, typer.Argument(metavar="JSON", help="Its fields; - reads standard input.")] = "{}",
    *,
    dedupe_key: Annotated[
        str | None,
        typer.Option("--dedupe-key", metavar="KEY", help="A second one under it changes nothing.", show_default=False),
    ] = None,
    app: App = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Send a signal to a saga.

    With `--app` the payload is checked against the signal's class first. Without it a payload that the class does not
    take pauses the saga once it reads it.
    """
    text = _text(payload)

    async def work(pool: Pool) -> Done:
        checked = checked_signal(app, name, text) if app is not None else text
        return await operate.signal(pool, await inspection.find(pool, instance), name, checked, dedupe_key)

    _order(context, "signal", work, database_url, as_json=as_json)


def cancel(
    context: typer.Context,
    instance: Place,
    *,
    reason: Reason,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Ask a saga to undo what it has done and to end as cancelled; calls under way end first.

    Past its pivot, or while it is being undone, the cancel is only recorded. A paused one acts on it once resumed.
    """

    async def work(pool: Pool) -> Done:
        return await operate.cancel(pool, await inspection.find(pool, instance), reason)

    _order(context, "cancel", work, database_url, as_json=as_json)


def pause(
    context: typer.Context,
    instance: Place,
    *,
    reason: Reason,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Stop a saga until it is resumed. Calls under way end first and their results are kept; nothing new begins."""

    async def work(pool: Pool) -> Done:
        return await operate.pause(pool, await inspection.find(pool, instance), reason)

    _order(context, "pause", work, database_url, as_json=as_json)


def resume(  # noqa: PLR0913 - each is an option
    context: typer.Context,
    instance: Place,
    *,
    reason: Annotated[str | None, typer.Option("--reason", metavar="TEXT", help="Why.", show_default=False)] = None,
    skip: Annotated[
        str | None,
        typer.Option("--skip", metavar="STEP", help="Take the undoing of this step for done.", show_default=False),
    ] = None,
    step: Annotated[
        str | None,
        typer.Option("--step", metavar="STEP", help="The open call that --result is of.", show_default=False),
    ] = None,
    result: Annotated[
        str | None, typer.Option("--result", metavar="JSON", help="What --step has returned.", show_default=False)
    ] = None,
    app: App = None,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Let a paused saga go on; what made it pause is tried again, so mend the cause first.

    `--skip STEP` when an undo keeps failing and you have seen to it by hand. `--step STEP --result JSON` when nobody
    but you knows what a call has brought; with `--app` the result is checked. Both need `--reason`.
    """
    if (step is None) != (result is None):
        fail(UsageProblem("--step and --result go together: which open call, and what it has returned"))
    if skip is not None and step is not None:
        fail(UsageProblem("give --skip or --result, one at a time"))
    if reason is None and (skip is not None or step is not None):
        fail(UsageProblem("--skip and --result need --reason: those who look at the saga later need to know"))
    why = reason or "resumed"

    async def work(pool: Pool) -> Done:
        found = await inspection.find(pool, instance)
        if skip is not None:
            return await operate.skip(pool, found, skip, why)
        if step is not None and result is not None:
            code = await _code(pool, found, app)
            return await operate.settle(pool, found, step, _text(result), why, saga=code)
        return await operate.resume(pool, found, why)

    _order(context, "resume", work, database_url, as_json=as_json)


async def _code(pool: Pool, instance_id: Any, app: str | None) -> Any:
    if app is None:
        return None
    one = await inspection.read(pool, instance_id)
    found = saga_named(app, one.name, one.version)
    if not found.reachable():
        raise NotPossible(f"the code of {one.name} names no steps; leave --app out")
    return found


def _order(
    context: typer.Context,
    command: str,
    work: Callable[[Pool], Awaitable[Done]],
    database_url: str | None,
    *,
    as_json: bool,
) -> None:
    go(_ordered(settings_for(context, database_url), command, work, as_json=as_json))


async def _ordered(settings: Settings, command: str, work: Callable[[Pool], Awaitable[Done]], *, as_json: bool) -> None:
    async with database(settings, command) as pool:
        done: Done = await work(pool)
    if as_json:
        print_value(done)
    else:
        out.print(
            Text.assemble((visible(f"{done.name} {done.key}"), "bold"), f": {_EFFECTS[done.effect]}"), soft_wrap=True
        )
