"""`saga check`: what can be seen to be wrong with sagas, and whether code goes on with what is in flight."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from outbox.cli.exits import Exit, UsageProblem
from outbox.cli.loading import imported
from outbox.cli.run import AsJson, DatabaseUrl, fail, out
from outbox.cli.visible import visible
from saga.check import findings
from saga.cli.common import print_value, sagas_of
from saga.cli.replay import replay_live

_TROUBLES_SHOWN = 50


def check(
    context: typer.Context,
    module: Annotated[
        str, typer.Argument(metavar="MODULE", help="The module with the sagas: shop.sagas.", show_default=False)
    ],
    *,
    live: Annotated[
        bool, typer.Option("--live", help="Replay what is in flight in the database, without doing anything.")
    ] = False,
    saga: Annotated[
        str | None, typer.Option("--saga", metavar="NAME", help="With --live: only of this saga.", show_default=False)
    ] = None,
    limit: Annotated[
        int,
        typer.Option("--limit", metavar="N", min=1, max=10_000, help="With --live: show at most so many, count all."),
    ] = _TROUBLES_SHOWN,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
) -> None:
    """Find what is wrong with sagas before they run. Exits 1 when something is found.

    Without a database: steps before the pivot that nothing undoes, replies that are waited for beyond the deadline, and
    what is not the same when a body is run again: clocks, random numbers, UUIDs, awaits of anything but `run`. What
    cannot be seen in the source is not found.

    With `--live`, before a deployment: whether this code goes on with every instance that is in flight. Their journals
    are replayed in read-only transactions: no step is called, nothing is written, no lease is taken. Workers may run.
    """
    try:
        named = sagas_of(module)
        if live:
            replay_live(context, named, saga, limit, database_url, as_json=as_json)
            return
        if saga is not None or database_url is not None:
            fail(UsageProblem("--saga and --database-url go with --live; without it no database is looked at"))
        found = findings(imported(module))
    except UsageProblem as error:
        fail(error)
    count = sum(map(len, named.values()))
    if as_json:
        print_value({"sagas": count, "findings": [asdict(one) for one in found]})
    else:
        for one in found:
            place = f"{_near(one.file)}:{one.line}"
            out.print(
                Text.assemble((visible(place), "bold"), visible(f": {one.saga}: {one.problem} [{one.rule}]")),
                soft_wrap=True,
            )
        out.print(f"{count} {'saga' if count == 1 else 'sagas'}, {len(found) or 'nothing'} found")
    if found:
        raise typer.Exit(Exit.PROBLEM)


def _near(file: str) -> str:
    """From here, if it lies below."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file
