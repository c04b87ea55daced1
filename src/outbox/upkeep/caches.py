"""What the caches of a database are doing, from the database alone; `outbox cache status` draws it."""

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from outbox import postgres
from outbox.postgres import Connection, Pool

SQL: Final = postgres.Statements("outbox", "upkeep/caches.sql")


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildStatus:
    """How far a rebuild of one of a cache's tables is."""

    name: str
    role: str
    pages: int
    rows: int
    changed: int
    removed: int
    worker: str | None
    started_at: datetime
    updated_at: datetime
    finished_at: datetime | None
    working: bool
    """Its worker has given a sign of life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStatus:
    """One cache.

    Attributes:
        name: the table as it is declared.
        complete_log: the owner's log whose pages were merged from the first to the last; None without owner.
        live_rows: by the planner's statistics; -1 where there are none.
        spare: another generation of the table, if there is one.
        complete_as_of: everything that had committed by then is applied; None where that is not known.
        lag_seconds: since then.
        partitions: that were ever read.
        halted: partitions that do not run, each with its state.
        parked: keys that wait.
    """

    name: str
    consumer: str
    topic: str
    complete_log: str | None
    live: str
    live_rows: int
    spare: str | None
    spare_rows: int | None
    complete_as_of: datetime | None
    lag_seconds: float | None
    partitions: int
    halted: list[str]
    parked: int
    rebuilds: tuple[RebuildStatus, ...]

    def problems(self, *, max_lag_seconds: float | None = None) -> list[str]:
        """What needs a person, each with what to do."""
        found = [
            f"{self.name}: partition {partition} stands still: rebuild the cache"
            f" (outbox cache rebuild {self.name} --app MODULE)"
            for partition in self.halted
            if not partition.endswith(_ON_ITS_WAY)
        ]
        if self.parked:
            found.append(
                f"{self.name} has parked {self.parked} {'key' if self.parked == 1 else 'keys'}:"
                f" see why (outbox parked list --parker {self.name})"
            )
        if max_lag_seconds is not None and (self.lag_seconds or 0.0) > max_lag_seconds:
            found.append(
                f"{self.name} is {self.lag_seconds:.1f} s behind, more than {max_lag_seconds:g} s:"
                " does its consumer run, and the owner's relay?"
            )
        for rebuild in self.rebuilds:
            if rebuild.finished_at is None and not rebuild.working:
                generation = " --new-generation" if rebuild.role == "spare" else ""
                found.append(
                    f"a rebuild of {self.name} stopped after {rebuild.rows:,} rows: go on with it"
                    f" (outbox cache rebuild {self.name} --app MODULE{generation})"
                )
        return found


_ON_ITS_WAY: Final = "restarting"


async def read(db: Pool | Connection) -> list[CacheStatus]:
    """The present state."""
    rebuilds = [RebuildStatus(**row) for row in await SQL.rebuilds.fetch(db)]
    return [
        CacheStatus(**row, rebuilds=tuple(rebuild for rebuild in rebuilds if rebuild.name == row["name"]))
        for row in await SQL.caches.fetch(db)
    ]
