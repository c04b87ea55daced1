"""The `saga` command: what all its commands share, and the list of them."""

import logging
from importlib.metadata import version

import typer

from outbox.cli import migrate
from outbox.cli.logs import log_to_stderr
from outbox.cli.run import DatabaseUrl, Kafka, Options
from saga.cli import check, look, orders, worker

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
    """Sagas over PostgreSQL and Kafka."""
    assert not show_version, "the eager callback has left"
    log_to_stderr("critical")  # an error becomes the command's own message; `worker` says what it logs
    context.obj = Options(database_url=database_url, kafka=kafka, package="saga")


app.add_typer(migrate.app, name="migrate")
app.command(epilog="Examples: `saga worker --app shop.sagas`, `saga worker --app shop.main:make --log-level warning`")(
    worker.worker
)
app.command(
    "list", epilog="Examples: `saga list --state paused`, `saga list --saga place_order --older-than 3600 --json`"
)(look.list_instances)
app.command(epilog="Examples: `saga show place_order/order-42`, `saga show 0199f0c2-... --json`")(look.show)
app.command(epilog="Example: `saga why place_order/order-42`")(look.why)
app.command(epilog="Example: `saga plan place_order/order-42`")(look.plan)
app.command(epilog='Example: `saga start place_order \'{"sku": "A1"}\' --app shop.sagas --key order-42`')(orders.start)
app.command(epilog='Example: `saga signal place_order/order-42 Approved \'{"by": "ada"}\' --app shop.sagas`')(
    orders.signal
)
app.command(epilog="Example: `saga cancel place_order/order-42 --reason 'the customer called'`")(orders.cancel)
app.command(epilog="Example: `saga pause place_order/order-42 --reason 'the bank is being migrated'`")(orders.pause)
app.command(
    epilog="Examples: `saga resume place_order/order-42`, `saga resume ID --skip charge --reason 'paid back by hand'`, "
    "`saga resume ID --step ship --result '\"sent\"' --reason 'the carrier says so'`"
)(orders.resume)
app.command(epilog="Examples: `saga check shop.sagas`, `saga check shop.sagas --json`")(check.check)


def main() -> None:
    """Run the command line."""
    logging.captureWarnings(capture=True)
    app()
