"""The `saga` command."""

from importlib.metadata import version
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


def _print_version(requested: bool) -> None:  # noqa: FBT001 - the shape typer calls
    if requested:
        print(f"sagabox {version('sagabox')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main_options(
    *,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Sagas over PostgreSQL and Kafka."""


def main() -> None:
    """Run the command line."""
    app()
