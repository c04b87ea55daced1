"""`outbox relay`: the relay as a process of its own."""

import asyncio
import gc
import logging
import signal
from typing import Annotated, Final, Literal

import typer

from outbox.cli.logs import log_to_stderr
from outbox.cli.run import DatabaseUrl, Kafka, connected, run, settings_of
from outbox.relay import Relay
from outbox.settings import Settings
from outbox.upkeep import migrate

log = logging.getLogger(__name__)

_CONNECTIONS: Final = 256
"""Four for each of 64 shards; a connection is opened when it is needed."""

Level = Literal["debug", "info", "warning", "error"]


def relay(
    context: typer.Context,
    *,
    database_url: DatabaseUrl = None,
    kafka: Kafka = None,
    log_level: Annotated[
        Level, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Publish committed events to Kafka until SIGTERM or SIGINT, which finish what is in flight.

    Start as many as you like: one works on each shard, the others stand by and take over within seconds. Exits 3
    when the database turns out to be a restored or copied one; restarting does not help then, a person must decide.
    """
    log_to_stderr(log_level)
    run(_relay(settings_of(context, database_url=database_url, kafka=kafka)))


async def _relay(settings: Settings) -> None:
    async with connected(settings, application="outbox relay", max_size=_CONNECTIONS) as pool:
        await migrate.check(pool)
        async with Relay(pool, settings.kafka, settings=settings) as running:
            _stop_on_signals(running)
            # What is loaded now stays for good; without it each full collection is a quarter of the work.
            gc.collect()
            gc.freeze()
            log.info("relay started, publishing to %s", settings.kafka)
            await running.run()
            log.info("relay stopped")


def _stop_on_signals(running: Relay) -> None:
    """The first signal drains; a second one ends the process as if there were no handler."""
    loop = asyncio.get_running_loop()

    def drain(name: str) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        log.info("%s: finishing what is in flight", name)
        running.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain, number.name)
