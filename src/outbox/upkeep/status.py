"""What the log, the relay and the consumers are doing, as data; `outbox status` draws it.

Lag is what has committed and is not yet known to be in Kafka. "Known" is what the relay has persisted, which it
does with a later window or after a second, so a busy log always shows a little. Counting stops at
`LAG_MAX_EVENTS`; past it, both figures are lower bounds and `lag_exact` is false.

The cost is the backlog, never the log: events are reached through the same two index ranges that the relay reads.
Everything is read in one transaction that is rolled back, so it may be asked at any time, on a standby too.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

from outbox import limits, postgres
from outbox.errors import NotMigrated

if TYPE_CHECKING:
    from outbox.postgres import Connection, Pool, Record

SQL: Final = postgres.Statements("outbox", "upkeep/status.sql")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardStatus:
    """One shard of the log and the relay that owns it."""

    shard: int
    lag_events: int
    lag_seconds: float
    """Age of the oldest event that is not known to be published; 0 when there is none."""
    lag_exact: bool
    windows_logged: int
    windows_done: int
    owner: str | None
    epoch: int
    lease_seconds: float | None
    """Until the lease ends; None when nobody owns the shard or its lease has ended."""

    @property
    def windows_in_flight(self) -> int:
        """Logged, and not known to be published as a whole."""
        return self.windows_logged - self.windows_done


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedStatus:
    """What one parker, the relay or a consumer, has set aside."""

    parker: str
    keys: int
    events: int
    since: datetime


_REMEDIES: Final = {
    "needs_rebuild": "Kafka deleted records that were not applied: outbox cache rebuild, which sets it free",
    "recreated": "the topic is another one than was read before: outbox cache rebuild, which sets it free",
    "restarting": "it was set free, and goes on as soon as its consumer runs",
}
"""What to do about a partition that stands still, by its state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionStatus:
    """Where a consumer stands in one partition."""

    consumer: str
    topic: str
    partition: int
    next_offset: int
    epoch: int
    owner: str | None
    state: str
    """running, or why it stands still; see `_REMEDIES`."""
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything at one moment of the database's clock."""

    at: datetime
    database: str
    standby: bool
    log_id: str
    log_since: datetime
    lives_here: bool | None
    """False after a restore, promotion or copy; None on a standby, which cannot tell."""
    shards: tuple[ShardStatus, ...]
    parked: tuple[ParkedStatus, ...]
    positions: tuple[PositionStatus, ...]

    @property
    def lag_events(self) -> int:
        """Of all shards."""
        return sum(shard.lag_events for shard in self.shards)

    def problems(self, *, max_lag_seconds: float | None = None) -> list[str]:
        """What needs a person, each with what to do; empty when all is well."""
        found: list[str] = []
        if self.lives_here is False:
            found.append(
                f"log {self.log_id} belongs to another database: this one was restored, promoted or copied;"
                " the relay publishes nothing until you decide (outbox adopt --help)"
            )
        for shard in self.shards:
            if (shard.lag_events or shard.windows_in_flight) and shard.lease_seconds is None:
                found.append(f"shard {shard.shard} has events to publish and no relay: start one (outbox relay)")
            elif max_lag_seconds is not None and shard.lag_seconds > max_lag_seconds:
                found.append(
                    f"shard {shard.shard} lags by {shard.lag_seconds:.1f} s, more than {max_lag_seconds:g} s:"
                    " see the log of its relay, and whether Kafka takes writes"
                )
        found += [
            f"{parked.parker} has parked {parked.keys} {'key' if parked.keys == 1 else 'keys'}:"
            f" see why (outbox parked list --parker {parked.parker})"
            for parked in self.parked
        ]
        found += [
            f"{position.consumer} stands still in partition {position.partition} of {position.topic}, {position.state}:"
            f" {_REMEDIES.get(position.state, 'see the log of its consumer')}"
            for position in self.positions
            if position.state != "running"
        ]
        return found


async def read(db: "Pool | Connection", *, lag_max_events: int = limits.LAG_MAX_EVENTS) -> Status:
    """The present state; on a connection that is in a transaction, as that transaction sees it.

    Raises:
        NotMigrated: there is no log in this database.
    """
    async with postgres.acquire(db) as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            return await _read(connection, lag_max_events)
        finally:
            await transaction.rollback()  # nothing was written, and the planner settings end with it


async def _read(connection: "Connection", lag_max_events: int) -> Status:
    await SQL.prepare.execute(connection)
    if not await SQL.exists.fetchval(connection):
        raise NotMigrated("the database has no schema outbox; run: outbox migrate up")
    log = await SQL.log.fetchrow(connection)
    if log is None:
        raise NotMigrated("outbox.logs has no current row; restore it, or run: outbox adopt")
    rows = await SQL.shards.fetch(connection)
    positions = await SQL.positions.fetch(connection, limits.POSITIONS_SHOWN) if log["has_positions"] else []
    return Status(
        at=log["at"],
        database=log["database"],
        standby=log["standby"],
        log_id=log["log_id"],
        log_since=log["log_since"],
        lives_here=None if log["standby"] else await SQL.lives_here.fetchval(connection),
        shards=tuple([await _shard(connection, row, lag_max_events) for row in rows]),
        parked=tuple(ParkedStatus(**row) for row in await SQL.parked.fetch(connection, lag_max_events)),
        positions=tuple(PositionStatus(**row) for row in positions),
    )


async def _shard(connection: "Connection", row: "Record", lag_max_events: int) -> ShardStatus:
    """One shard with its lag: what the newest done window leaves to do."""
    is_page = row["through_position"] is not None
    cursor = row["start_snapshot"] if row["s1"] is None else row["s1"] if is_page else row["s2"]
    backlog = await SQL.backlog.fetchrow(
        connection,
        row["shard"],
        cursor[1],
        cursor[2],
        row["s2"] if is_page else None,
        row["through_position"],
        lag_max_events,
    )
    assert backlog is not None, "an aggregate without grouping has one row"
    lease_seconds = row["lease_seconds"]
    return ShardStatus(
        shard=row["shard"],
        lag_events=backlog["events"],
        lag_seconds=max(backlog["seconds"] or 0.0, 0.0),
        lag_exact=backlog["events"] < lag_max_events,
        windows_logged=row["windows_logged"],
        windows_done=row["done_through"],
        owner=str(row["lease_owner"]) if row["lease_owner"] else None,
        epoch=row["lease_epoch"],
        lease_seconds=lease_seconds if lease_seconds is not None and lease_seconds > 0 else None,
    )
