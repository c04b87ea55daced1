"""The commands of `outbox`."""

import logging
from importlib.metadata import entry_points

from outbox.cli import adopt, cache, migrate, parked, relay, status
from outbox.cli.root import command_line

app = command_line("outbox", "Transactional outbox: from PostgreSQL to Kafka, in order, without loss.")
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
