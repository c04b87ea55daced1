"""Generations: a cache is rebuilt into a second table, which then takes the first one's name.

    begin    an empty table like the live one is made and registered as `spare`; from then on every batch of the
             consumer feeds both, in the same transaction
    (fill)   `rebuild` merges the owner's pages into it
    swap     two tables exchange names and roles, in one short transaction under the cache's lock
    rollback the same once more: the former table is still fed, so it is as new as the other one
    finish   the spare table is dropped

Guarantees:

* **No reader sees a missing or older row.** Both tables get the same events in the same transactions, and pages only
  after that began, so at the swap the new table holds whatever the old one does. Before the swap we wait until no
  snapshot is open that is older than the pages, for it would not see their rows.
* **Nobody waits for long.** The swap gives way when it does not get its locks within a quarter of a second, and tries
  again; batches in flight end first, later ones look up the tables anew.
* **A crash at any line** leaves a state that the same command goes on from: no spare table; one that is being filled;
  one that is full; or the swap, which is one transaction.

What hangs on a table by its identity, and not by its name, would stay with the old table: views, foreign keys,
triggers, policies, rules. A cache with any of those is refused and rebuilt in place instead.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from outbox import clock, limits, postgres, retry
from outbox.cache.rebuild import Progress, Rebuild, Report
from outbox.errors import CacheNotFed, GenerationUnfit
from outbox.postgres import Connection, Pool

if TYPE_CHECKING:
    from outbox.cache import Cache

SQL: Final = postgres.Statements("outbox", "cache/generations.sql")

_NAME_MAX_BYTES: Final = 63
_SPARE: Final = "_spare"


@dataclass(frozen=True, slots=True)
class Generations:
    """The tables of a cache.

    Attributes:
        live: identity of the table that has the cache's name.
        spare: identity of the other one, if there is one.
        spare_name: what that is called.
        is_former: the spare one has been live; otherwise it is being filled, or full.
    """

    live: int
    spare: int | None = None
    spare_name: str | None = None
    is_former: bool = False


async def find(db: Pool | Connection, name: str) -> Generations:
    """The tables of the cache declared for table `name`.

    Raises:
        CacheNotFed: no consumer feeds it.
    """
    rows = {row["role"]: row for row in await SQL.found.fetch(db, name)}
    if "live" not in rows:
        raise CacheNotFed(f"no consumer has fed the table of cache {name} yet: start the consumer, then rebuild it")
    live, spare = rows["live"], rows.get("spare")
    if spare is None:
        return Generations(live["oid"])
    return Generations(live["oid"], spare["oid"], spare["name"], is_former=not spare["rebuilding"])


async def renew(db: Pool, cache: "Cache[Any]", *, report: Report | None = None) -> Progress:
    """Rebuild a cache into a new generation and swap; goes on where it was interrupted.

    Raises:
        GenerationUnfit: something hangs on the table, or a former generation is still there.
        CacheNotFed, RebuildBusy, OwnerError, OwnerRowInvalid: see `Rebuild.run`.
    """
    rebuild = Rebuild(db, cache)  # refuses a cache without owner before anything is made
    found = await find(db, cache.table)
    if found.is_former:
        raise GenerationUnfit(
            f"{found.spare_name} is the former generation of {cache.table}: drop it with --finish, or go back to it "
            "with --rollback"
        )
    spare = found.spare or await _begin(db, cache.table, found.live)
    rebuild = Rebuild(db, cache, oid=spare)
    progress = await rebuild.run(report=report, free=True)
    await _wait_for_old_snapshots(db, cache.table)
    await swap(db, cache.table)
    return progress


async def swap(db: Pool, name: str) -> None:
    """Exchange the two tables of a cache.

    Raises:
        GenerationUnfit: there is no other one, or a lock could not be had for two minutes.
    """
    if (await find(db, name)).spare is None:
        raise GenerationUnfit(f"cache {name} has one table only; make another: outbox cache rebuild --new-generation")
    await _shortly(db, name, lambda connection: SQL.swap.execute(connection, name))


async def rollback(db: Pool, name: str) -> None:
    """Go back to the former generation; raises as `swap`, and GenerationUnfit where the spare table never was live."""
    found = await find(db, name)
    if found.spare is not None and not found.is_former:
        raise GenerationUnfit(
            f"{found.spare_name} has not been live: fill it and swap with --new-generation, or drop it with --finish"
        )
    await swap(db, name)


async def finish(db: Pool, name: str) -> str:
    """Drop the spare table of a cache; returns what it was called.

    Raises:
        GenerationUnfit: there is none.
    """
    found = await find(db, name)
    if found.spare_name is None:
        raise GenerationUnfit(f"cache {name} has no spare table; there is nothing to drop")
    await _shortly(db, name, lambda connection: SQL.drop.execute(connection, name))
    return found.spare_name


def spare_of(name: str) -> str:
    """What the spare table of a cache's is called, in as many bytes as PostgreSQL takes."""
    return name.rpartition(".")[2].encode()[: _NAME_MAX_BYTES - len(_SPARE)].decode(errors="ignore") + _SPARE


async def _begin(db: Pool, name: str, live: int) -> int:
    """Make the spare table, and have it fed."""
    dependents = [row["what"] for row in await SQL.dependents.fetch(db, live)]
    if dependents:
        raise GenerationUnfit(
            f"cache {name} cannot change tables, because this would stay with the old one: {'; '.join(dependents)}. "
            "Rebuild it in place: outbox cache rebuild without --new-generation"
        )
    spare_name = spare_of(name)
    if await SQL.taken.fetchval(db, live, spare_name):
        raise GenerationUnfit(f"there is a {spare_name} already, which no cache knows; rename or drop it")
    made: int | None = None

    async def make(connection: Connection) -> None:
        nonlocal made
        made = await SQL.make.fetchval(connection, live, spare_name)
        await SQL.register.execute(connection, name, made)
        await SQL.filling.execute(connection, made)

    await _shortly(db, name, make)
    assert made is not None, "the transaction committed"
    return made


async def _shortly(db: Pool, name: str, work: Callable[[Connection], Awaitable[object]]) -> None:
    """A transaction that has the cache's lock alone, and gives way rather than make others wait."""
    milliseconds = str(int(limits.SWAP_LOCK_SECONDS * 1000))
    try:
        async for attempt in retry.attempts(when=_is_locked, within=limits.SWAP_TRY_SECONDS, maximum=2.0):
            with attempt:
                async with postgres.acquire(db) as connection, postgres.transact(connection):
                    await SQL.be_short.execute(connection, milliseconds)
                    await SQL.lock_alone.execute(connection, name)
                    await work(connection)
    except postgres.PostgresError as error:
        if _is_locked(error):
            raise GenerationUnfit(
                f"the tables of cache {name} were locked for {limits.SWAP_TRY_SECONDS:g} s: find the transaction that "
                "holds them (pg_locks), and try again"
            ) from error
        raise


def _is_locked(error: BaseException) -> bool:
    return postgres.sqlstate(error) in {"55P03", "40P01"}


async def _wait_for_old_snapshots(db: Pool, name: str) -> None:
    """Until every snapshot in use sees the pages that were merged."""
    horizon = await SQL.now.fetchval(db)
    deadline = clock.monotonic() + limits.SWAP_TRY_SECONDS
    while older := [str(row["pid"]) for row in await SQL.older.fetch(db, horizon)]:
        if clock.monotonic() > deadline:
            raise GenerationUnfit(
                f"transactions are open that would not see the new table of cache {name}: processes "
                f"{', '.join(older)}; end them, then go on: outbox cache rebuild --new-generation"
            )
        await asyncio.sleep(0.1)
