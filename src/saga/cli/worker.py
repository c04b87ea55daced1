"""`saga worker`: a worker as a process of its own."""

import asyncio
import contextlib
import gc
import inspect
import logging
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Annotated, Any, Final

import typer

from outbox.cli.exits import UsageProblem
from outbox.cli.loading import imported
from outbox.cli.logs import log_to_stderr
from outbox.cli.relay import Level
from outbox.cli.run import DatabaseUrl, Kafka, connected, run, settings_of_kind
from outbox.postgres import Pool
from outbox.upkeep import migrate
from saga.definition import Saga
from saga.errors import SagaError
from saga.participant import Participant
from saga.settings import Settings
from saga.worker import Worker

log = logging.getLogger(__name__)

_SERVED: Final = (Saga, Participant)
_CONNECTIONS: Final = 32
"""A connection is opened when it is needed."""
_HELP: Final = "write --app package.module, or --app package.module:attribute"


def worker(
    context: typer.Context,
    *,
    app: Annotated[
        str,
        typer.Option(
            "--app",
            metavar="MODULE[:NAME]",
            help="A module with sagas or participants; or one, a list of them, a function (pool, settings) that makes "
            "the Worker.",
        ),
    ],
    database_url: DatabaseUrl = None,
    kafka: Kafka = None,
    log_level: Annotated[
        Level, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
    ] = "info",
) -> None:
    """Run sagas, and serve participants, until SIGTERM or SIGINT, which hand over what is in flight.

    Start as many as you like: they share the work, and one that is lost is replaced within seconds. Steps that need
    clients (`ctx.deps`) are served by a function of your own, which may be an async context manager:

        @asynccontextmanager
        async def worker(pool, settings):
            async with httpx.AsyncClient() as client:
                yield Worker(pool, settings.kafka, place_order, deps=client, settings=settings)
    """
    log_to_stderr(log_level)
    run(_worker(settings_of_kind(Settings, context, database_url=database_url, kafka=kafka), app))


async def _worker(settings: Settings, app: str) -> None:
    made = _found(app)
    async with connected(settings, application="saga worker", max_size=_CONNECTIONS) as pool:
        await migrate.check(pool)
        await migrate.check(pool, package="saga")
        async with _made(app, made, pool, settings) as ready, ready as running:
            _stop_on_signals(running)
            # What is loaded now stays for good; without it each full collection looks at all of it.
            gc.collect()
            gc.freeze()
            log.info("worker started")
            await running.run()
            log.info("worker stopped")


def _found(app: str) -> Any:
    """What `--app` names.

    Raises:
        UsageProblem: there is no such thing.
    """
    module_name, _, attribute = app.partition(":")
    module = imported(module_name)
    if not attribute:
        served = list({id(value): value for value in vars(module).values() if isinstance(value, _SERVED)}.values())
        if not served:
            raise UsageProblem(f"module {module_name} has no sagas and no participants; {_HELP}")
        return served
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise UsageProblem(f"module {module_name} has no {attribute}; {_HELP}")
        found = getattr(found, name)
    return found


@asynccontextmanager
async def _made(app: str, found: Any, pool: Pool, settings: Settings) -> AsyncIterator[Worker]:
    """The worker, not entered yet, and whatever it lives on."""
    async with contextlib.AsyncExitStack() as stack:
        if callable(found) and not isinstance(found, _SERVED):
            found = found(pool, settings)
            if inspect.isawaitable(found):
                found = await found
            if isinstance(found, AbstractAsyncContextManager) and not isinstance(found, Worker):
                found = await stack.enter_async_context(found)
            if not isinstance(found, Worker):
                raise UsageProblem(f"{app} makes a {type(found).__name__}, not a Worker")
            yield found
            return
        served = list(found) if isinstance(found, Iterable) else [found]
        if not all(isinstance(one, _SERVED) for one in served):
            raise UsageProblem(f"{app} is neither sagas or participants nor a function that makes a Worker; {_HELP}")
        try:
            ready = Worker(pool, settings.kafka, *served, settings=settings)
        except SagaError as error:
            raise UsageProblem(f"{app}: {error}") from error
        yield ready


def _stop_on_signals(running: Worker) -> None:
    """The first signal hands over; a second one ends the process as if there were no handler."""
    loop = asyncio.get_running_loop()

    def hand_over(name: str) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        log.info("%s: handing over what is in flight", name)
        running.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, hand_over, number.name)
