"""The commands of `saga`."""

import logging

from outbox.cli import migrate
from outbox.cli.root import command_line
from saga.cli import check, look, orders, worker

app = command_line("saga", "Sagas over PostgreSQL and Kafka.")
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
app.command(epilog="Examples: `saga check shop.sagas`, `saga check shop.sagas --live --saga place_order --json`")(
    check.check
)


def main() -> None:
    """Run the command line."""
    logging.captureWarnings(capture=True)
    app()
