"""The root of the command line: what all commands share, and the list of them."""

import logging
from importlib.metadata import entry_points, version

import typer

from outbox.cli import adopt, cache, migrate, parked, relay, status
from outbox.cli.logs import log_to_stderr
from outbox.cli.run import DatabaseUrl, Kafka, Options

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its tracebacks show the values of variables, and some of them are secrets
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:  # noqa: FBT001 - the shape typer calls
    if requested:
        print(f"sagabox {version('sagabox')}")
        raise typer.Exit


@app.callback(epilog="Settings come from SAGABOX_* environment variables; see docs/operations.md, also for exit codes.")
def options(
    context: typer.Context,
    *,
    database_url: DatabaseUrl = None,
    kafka: Kafka = None,
    show_version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Transactional outbox: from PostgreSQL to Kafka, in order, without loss."""
    assert not show_version, "the eager callback has left"
    log_to_stderr("critical")  # an error becomes the command's own message; `relay` says what it logs
    context.obj = Options(database_url=database_url, kafka=kafka)


app.add_typer(migrate.app, name="migrate")
app.command(epilog="Example: `SAGABOX_LEASE_SECONDS=10 outbox relay --log-level warning`")(relay.relay)
app.command(epilog="Examples: `outbox status --watch`, `outbox status --max-lag 30 --json`")(status.status)
app.add_typer(parked.app, name="parked")
app.add_typer(cache.app, name="cache")
app.command(epilog="Example: `outbox adopt --database-url postgresql://owner@db/shop`")(adopt.adopt)


def main() -> None:
    """Run the command line."""
    logging.captureWarnings(capture=True)
    for entry in entry_points(group="outbox.cli"):
        app.add_typer(entry.load(), name=entry.name)
    app()
