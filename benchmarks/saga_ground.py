"""What the measurements of sagas stand on: sizes, databases, the server's counters."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final, NamedTuple
from uuid import uuid4

import asyncpg
import psutil

from outbox import Pool
from outbox.embedded import Databases, Postgres
from outbox.upkeep import migrate

_CONNECTIONS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes; `quick` is enough to see that everything works and for nothing else."""

    sagas: int = 10_000
    serial: int = 500
    long: int = 3_000
    in_flight: int = 10_000
    peer_workflows: int = 400
    ended_few: int = 10_000
    ended_many: int = 1_000_000
    repeat: int = 3
    concurrent: tuple[int, ...] = (20, 200, 1_000)

    def count(self, wanted: int, concurrent: int) -> int:
        """Of so many sagas, how many make a measurement: fewer where they come one after the other."""
        return min(wanted, self.serial) if concurrent == 1 else wanted

    def quick(self) -> "Plan":
        """Everything at a size that takes seconds."""
        return replace(
            self,
            sagas=400,
            serial=20,
            long=200,
            in_flight=200,
            peer_workflows=20,
            ended_few=1_000,
            ended_many=4_000,
            repeat=1,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """A migrated database with nothing in it, and the server that it is on."""

    databases: Databases
    url: str
    pool: Pool

    def server_cpu_seconds(self) -> float | None:
        """User and system time of the server's processes that live now; None for a server of somebody else's."""
        if not isinstance(self.databases, Postgres):
            return None
        server = psutil.Process(self.databases.pid)
        return sum(_cpu_seconds(process) for process in (server, *server.children(recursive=True)))


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


@asynccontextmanager
async def fresh(databases: Databases) -> AsyncIterator[Ground]:
    """For one measurement."""
    async with (
        empty_database(databases) as url,
        asyncpg.create_pool(url, min_size=1, max_size=_CONNECTIONS) as pool,
    ):
        await migrate.up(pool)
        await migrate.up(pool, package="saga")
        yield Ground(databases=databases, url=url, pool=pool)


@asynccontextmanager
async def empty_database(databases: Databases) -> AsyncIterator[str]:
    """The URL of a database without anything in it; it is dropped when the block ends."""
    name = f"bench_{uuid4().hex[:12]}"
    url = await asyncio.to_thread(databases.create_database, name)
    try:
        yield url
    finally:
        await asyncio.to_thread(databases.drop_database, name)


class Counters(NamedTuple):
    """Of the server: transactions that wrote something, and bytes of the write-ahead log."""

    commits: int
    wal_bytes: int


async def counters(pool: Pool) -> Counters:
    """As they are now; asking is a transaction that counts."""
    row = await pool.fetchrow(
        "select pg_current_xact_id()::text::bigint as xid, (pg_current_wal_insert_lsn() - '0/0')::bigint as wal"
    )
    assert row is not None
    return Counters(int(row["xid"]), int(row["wal"]))
