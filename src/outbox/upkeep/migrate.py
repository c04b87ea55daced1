"""Migrations: numbered, reversible, each applied in one transaction together with the row that says so.

Files are `NNNN_name.up.sql` and `NNNN_name.down.sql` in the folder `migrations` of a package.
`sagabox.migrations` remembers what was applied. It lives in a schema of its own, because `down` of `outbox` 1
drops schema `outbox`, and because `saga` keeps its migrations there too.

Guarantees, and what a crash does to them:

* A migration and its row commit together. A crash, an error or a lost connection in the middle leaves the
  database as it was before that migration; earlier ones of the call stay. Call again to go on from there.
* Migrators exclude each other by an advisory lock held to the end of each transaction, so it works through a
  pooler, and nothing has to be released after a crash. What is applied is read again *after* that lock: a
  migrator that waited finds the other's work done and skips it.
* The checksum of every applied migration is compared first; a file changed afterwards stops everything.
* A migration waits at most `MIGRATION_LOCK_SECONDS` for a table, because every reader and writer of it waits
  behind. It then fails cleanly and can be tried again.
* Inside a caller's open transaction all of it is the caller's to commit, the lock included.
"""

import re
from collections.abc import Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final, Literal

from outbox import crash_sites, limits, postgres
from outbox.errors import MigrationBusy, MigrationChanged, NotMigrated
from outbox.upkeep.scripts import Migration, shipped, split

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from outbox.postgres import Connection, Pool, Record

__all__ = [
    "Migration",
    "MigrationStatus",
    "check",
    "down",
    "planned_down",
    "shipped",
    "statements",
    "status",
    "up",
]

SQL: Final = postgres.Statements("outbox", "upkeep/migrate.sql")
APPLY: Final = crash_sites.register("outbox.upkeep.migrate.apply")
LOCKED_OUT: Final = ("55P03", "40P01")
"""Lock not available in time; or a deadlock with a transaction that holds what we need, and waits for us."""

State = Literal["applied", "pending", "changed", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStatus:
    """One migration as this database has it.

    `changed`: applied from another text than this version ships. `unknown`: applied by a newer version.
    """

    package: str
    number: int
    name: str
    state: State
    applied_at: datetime | None
    checksum: str


async def up(db: "Pool | Connection", *, package: str = "outbox", to: int | None = None) -> tuple[Migration, ...]:
    """Apply what is missing, up to number `to` or all of it; returns what this call applied.

    Raises:
        MigrationChanged: an applied migration differs from the file shipped here; nothing was done.
        MigrationBusy: a lock could not be had in time; what was applied before stays.
        ValueError: there is no migration `to`.
    """
    wanted = [m for m in shipped(package) if m.number <= _bound(package, to, lowest=1)]
    applied: list[Migration] = []
    async with postgres.acquire(db) as connection:
        pending = _pending(package, await _history(connection, package))
        for migration in (m for m in wanted if m in pending):
            async with _exclusively(connection, migration):
                if migration not in _pending(package, await _history(connection, package)):
                    continue  # another migrator was faster
                if not await SQL.exists.fetchval(connection):
                    for bookkeeping in _BOOKKEEPING:
                        await bookkeeping.execute(connection)
                for statement in split(migration.up):
                    await _execute(connection, APPLY, statement)
                await SQL.record.execute(connection, package, migration.number, migration.name, migration.checksum)
            applied.append(migration)
    return tuple(applied)


async def down(db: "Pool | Connection", *, package: str = "outbox", to: int | None = None) -> tuple[Migration, ...]:
    """Take back every migration above number `to`, newest first; 0 takes back all, and no number the newest one.

    Data goes with its tables. Returns what this call took back.

    Raises:
        MigrationChanged: an applied migration is not the one shipped here, so its way back is not known.
        MigrationBusy: a table is in use; what was taken back before stays so.
        ValueError: there is no migration `to`.
    """
    reverted: list[Migration] = []
    async with postgres.acquire(db) as connection:
        for migration in await planned_down(connection, package=package, to=to):
            async with _exclusively(connection, migration):
                if migration not in _applied(package, await _history(connection, package)):
                    continue
                for statement in split(migration.down):
                    await _execute(connection, APPLY, statement)
                await SQL.forget.execute(connection, package, migration.number)
                await SQL.tidy.execute(connection)
            reverted.append(migration)
    return tuple(reverted)


async def planned_down(
    db: "Pool | Connection", *, package: str = "outbox", to: int | None = None
) -> tuple[Migration, ...]:
    """What `down` would take back, in that order; for asking before doing.

    Raises:
        MigrationChanged: as `down`.
        ValueError: as `down`.
    """
    bound = None if to is None else _bound(package, to, lowest=0)
    async with postgres.acquire(db) as connection:
        present = _applied(package, await _history(connection, package))
    newest_first = tuple(reversed(present))
    return newest_first[:1] if bound is None else tuple(m for m in newest_first if m.number > bound)


async def status(db: "Pool | Connection", *, package: str = "outbox") -> list[MigrationStatus]:
    """Every migration that this version ships or this database has, in order."""
    async with postgres.acquire(db) as connection:
        history = await _history(connection, package)
    rows = [_state_of(migration, history.get(migration.number)) for migration in shipped(package)]
    newest = rows[-1].number if rows else 0
    return rows + [
        MigrationStatus(
            package=package,
            number=row["number"],
            name=row["name"],
            state="unknown",
            applied_at=row["applied_at"],
            checksum=row["checksum"],
        )
        for row in history.values()
        if row["number"] > newest
    ]


async def check(db: "Pool | Connection", *, package: str = "outbox") -> None:
    """What a loop asks before it starts; a newer database is accepted, because migrations only add.

    Raises:
        NotMigrated: migrations are missing; names them and the command.
        MigrationChanged: an applied migration differs from the file shipped with this version.
    """
    async with postgres.acquire(db) as connection:
        pending = _pending(package, await _history(connection, package))
    if pending:
        missing = ", ".join(f"{m.number:04d}_{m.name}" for m in pending)
        raise NotMigrated(f"the database lacks migrations of {package}: {missing}; run: {package} migrate up")


def statements(package: str = "outbox", *, first: int = 1, to: int | None = None, reverse: bool = False) -> list[str]:
    """The single SQL statements of migrations `first` to `to`, for other migration tools.

    Run them in one transaction. They keep our bookkeeping as well, so that `status` and `check` agree. With
    `reverse` they are those of the way back, newest migration first.
    """
    last = _bound(package, to, lowest=first)
    chosen = [m for m in shipped(package) if first <= m.number <= last]
    texts: list[str] = []
    for migration in reversed(chosen) if reverse else chosen:
        if migration.number == 1 and not reverse:
            texts += [statement.text for statement in _BOOKKEEPING]
        texts += split(migration.down if reverse else migration.up)
        if reverse:
            texts += [_fill(SQL.forget.text, package, migration.number), SQL.tidy.text]
        else:
            texts.append(_fill(SQL.record.text, package, migration.number, migration.name, migration.checksum))
    return texts


_BOOKKEEPING: Final = (
    SQL.create_schema,
    SQL.create_table,
    SQL.comment_schema,
    SQL.comment_table,
    SQL.comment_checksum,
    SQL.grant_schema,
    SQL.grant_table,
)


def _fill(text: str, *values: str | int) -> str:
    """A bookkeeping statement with its parameters as literals, to be printed: file names and digests."""
    literals = [str(value) if isinstance(value, int) else f"'{value}'" for value in values]
    assert all(re.fullmatch(r"\d+|'[a-z0-9_.]+'", literal) for literal in literals), literals
    return re.sub(r"\$(\d)", lambda match: literals[int(match[1]) - 1], text)


def _bound(package: str, to: int | None, *, lowest: int) -> int:
    newest = len(shipped(package))
    if to is None:
        return newest
    if not lowest <= to <= newest:
        raise ValueError(f"{package} has no migration {to}; choose {lowest} to {newest}")
    return to


async def _history(connection: "Connection", package: str) -> dict[int, "Record"]:
    if not await SQL.exists.fetchval(connection):
        return {}
    return {row["number"]: row for row in await SQL.history.fetch(connection, package)}


def _state_of(migration: Migration, row: "Record | None") -> MigrationStatus:
    state: State = "pending"
    if row is not None:
        state = "applied" if row["checksum"] == migration.checksum else "changed"
    return MigrationStatus(
        package=migration.package,
        number=migration.number,
        name=migration.name,
        state=state,
        applied_at=row["applied_at"] if row is not None else None,
        checksum=migration.checksum,
    )


def _pending(package: str, history: Mapping[int, "Record"]) -> list[Migration]:
    """What is missing, once all that is there has been found unchanged."""
    for migration in shipped(package):
        row = history.get(migration.number)
        if row is not None and row["checksum"] != migration.checksum:
            raise MigrationChanged(
                f"{migration} was applied on {row['applied_at']:%Y-%m-%d} from a file with checksum"
                f" {row['checksum'][:12]}..., this version ships {migration.checksum[:12]}...;"
                " install the version that applied it, or restore the file"
            )
    return [m for m in shipped(package) if m.number not in history]


def _applied(package: str, history: Mapping[int, "Record"]) -> list[Migration]:
    """What is there, once all of it is known to this version."""
    newest = len(shipped(package))
    if newer := [number for number in history if number > newest]:
        raise MigrationChanged(
            f"{package} {max(newer):04d}_{history[max(newer)]['name']} was applied by a newer version;"
            " only that version knows the way back: install it to migrate down"
        )
    pending = _pending(package, history)
    return [m for m in shipped(package) if m not in pending]


@asynccontextmanager
async def _exclusively(connection: "Connection", migration: Migration) -> "AsyncIterator[None]":
    """One transaction under the migrators' lock; the caller's settings are as before after it."""
    try:
        async with connection.transaction(isolation="read_committed"):
            before = await SQL.session.fetchrow(connection)
            assert before is not None
            await SQL.configure.execute(connection, f"{limits.MIGRATION_TURN_SECONDS}s", "0", "")
            await _execute(connection, SQL.lock.name, SQL.lock.text)
            await SQL.configure.execute(connection, f"{limits.MIGRATION_LOCK_SECONDS}s", "0", "")
            yield
            await SQL.configure.execute(connection, *before.values())
    except postgres.PostgresError as error:
        if postgres.sqlstate(error) not in LOCKED_OUT:
            raise
        raise MigrationBusy(
            f"{migration} waited too long for a lock and was rolled back: another migrator is at work, or a"
            " transaction holds one of our tables; see pg_stat_activity, stop the services for `down`, and"
            " try again"
        ) from error


async def _execute(connection: "Connection", site: str, text: str) -> None:
    """A statement that may rightly take longer than any other of this package."""
    await crash_sites.visit(site, "before")
    await connection.execute(text, timeout=limits.MIGRATION_TIMEOUT_SECONDS)
    await crash_sites.visit(site, "after")
