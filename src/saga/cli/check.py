"""`saga check`: what can be seen to be wrong with sagas."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from outbox.cli.exits import Exit, UsageProblem
from outbox.cli.loading import imported
from outbox.cli.run import AsJson, fail, out
from outbox.cli.visible import visible
from saga.check import findings
from saga.cli.common import print_value, sagas_of


def check(
    module: Annotated[
        str, typer.Argument(metavar="MODULE", help="The module with the sagas: shop.sagas.", show_default=False)
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Find what is wrong with sagas before they run; needs no database. Exits 1 when something is found.

    Steps before the pivot that nothing undoes, replies that are waited for beyond the deadline, and what is not the
    same when a body is run again: clocks, random numbers, UUIDs, awaits of anything but `run`. What cannot be seen in
    the source is not found.
    """
    try:
        found = findings(imported(module))
        count = len(sagas_of(module))
    except UsageProblem as error:
        fail(error)
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
