"""`outbox adopt`: a person's word that this restored, promoted or copied database goes on."""

from dataclasses import asdict
from typing import Annotated

import typer

from outbox.cli.exits import Exit, UsageProblem
from outbox.cli.run import AsJson, DatabaseUrl, Kafka, connected, err, out, print_json, run, settings_of
from outbox.relay import restore
from outbox.settings import Settings
from outbox.upkeep import migrate


def adopt(
    context: typer.Context,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
    database_url: DatabaseUrl = None,
    kafka: Kafka = None,
) -> None:
    """Let the relay publish from a database that was restored, promoted or copied.

    First make sure that **no relay publishes from another copy**: two databases with one log would
    contradict each other in the same topics. Adoption opens a new log. Events that were not logged yet are published
    by it, those that Kafka turns out to have are left out. Writers wait while it runs.
    """
    run(_adopt(settings_of(context, database_url=database_url, kafka=kafka), yes=yes, as_json=as_json))


async def _adopt(settings: Settings, *, yes: bool, as_json: bool) -> None:
    async with connected(settings, application="outbox adopt") as pool:
        await migrate.check(pool)
        if not yes:
            _confirm()
        adoption = await restore.adopt(pool, settings.kafka)
    if as_json:
        print_json(asdict(adoption))
        return
    out.print(f"adopted: the log is now {adoption.log_id}")
    out.print(f"{adoption.restamped:,} events will be published by it, {adoption.left_out:,} were in Kafka already")
    out.print("start the relay again: outbox relay")


def _confirm() -> None:
    err.print("No relay may publish from another copy of this database, now or later.")
    if not err.is_terminal:
        raise UsageProblem("cannot ask without a terminal; nothing was done, repeat with --yes to go ahead")
    if not typer.confirm("Is this so, and shall this database go on?", err=True):
        err.print("nothing was done")
        raise typer.Exit(Exit.USAGE)
