"""Shard ownership: one relay at a time, for as long as it renews.

The database's clock grants the lease, this process's monotonic clock ends it: the local deadline counts from *before*
the request was sent, so it always falls before the database's. Past it the relay stops by itself, without asking. A
process that was stopped (SIGSTOP, a hung host) and goes on later finds its deadline past, and its epoch outdated:
whatever it still tries to log is refused by the database (`outbox.lock_shard`). Only bytes that it had handed to
Kafka before can arrive late; our consumers drop them by position.

A crash leaves the lease to run out (`lease_seconds`); SIGTERM releases it at once.
"""

import asyncio
import logging
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from outbox import clock, postgres
from outbox.errors import ShardUnavailable
from outbox.postgres import Connection, Pool

log = logging.getLogger(__name__)
SQL: Final = postgres.Statements("outbox", "relay/lease.sql")


@dataclass(slots=True)
class Lease:
    """A held lease of one shard."""

    shard: int
    owner: UUID
    epoch: int
    seconds: float
    deadline: float
    """On the monotonic clock."""

    @classmethod
    async def take(cls, connection: Connection, shard: int, owner: UUID, seconds: float) -> "Lease | None":
        """Take the lease if it is free."""
        asked = clock.monotonic()
        epoch = await SQL.take.fetchval(connection, shard, owner, seconds)
        return None if epoch is None else cls(shard, owner, epoch, seconds, asked + seconds)

    def check(self) -> None:
        """Call before every external effect.

        Raises:
            ShardUnavailable: the lease has run out by our own clock.
        """
        if clock.monotonic() >= self.deadline:
            raise ShardUnavailable(f"the lease of shard {self.shard} ran out before it was renewed: starting again")

    async def keep(self, pool: Pool) -> None:
        """Renew at a third of the length, for ever.

        Raises:
            ShardUnavailable: a successor holds the shard.
        """
        while True:
            await asyncio.sleep(self.seconds / 3)
            self.check()
            asked = clock.monotonic()
            async with asyncio.timeout(max(self.deadline - asked, 0.001)):
                async with postgres.acquire(pool) as connection:
                    epoch = await SQL.renew.fetchval(connection, self.shard, self.epoch, self.seconds)
            if epoch is None:
                raise ShardUnavailable(f"shard {self.shard} was taken over from epoch {self.epoch}: standing by")
            self.deadline = asked + self.seconds

    async def release(self, connection: Connection) -> None:
        """Let a successor start at once."""
        await SQL.release.execute(connection, self.shard, self.epoch)


async def shards(pool: Pool) -> list[int]:
    """The shards of the current log."""
    return [row["shard"] for row in await SQL.shards.fetch(pool)]
