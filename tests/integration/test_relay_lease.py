"""The lease and the number of a window are each given once, whatever crashes."""

from uuid import uuid4

import asyncpg
import pytest

from outbox import Pool
from outbox.embedded import Postgres
from outbox.relay import lease
from outbox.relay.lease import Lease
from outbox.upkeep import migrate
from tests.support.faults import eventually
from tests.support.mutations import broken_statement


@pytest.mark.crash
@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_an_epoch_is_not_granted_twice_although_the_server_crashed(rule: str) -> None:
    """Taking the lease commits synchronously whatever the database says.

    Seen red: with `synchronous_commit = off` a crash took the epoch back and granted it again, and the predecessor
    could go on renewing and parking under it (the broken variant).
    """
    lazy = {"wal_writer_delay": "10s", "synchronous_commit": "off", "autovacuum": "off"}
    with Postgres(settings=lazy) as server:
        url = server.create_database("shop")
        async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
            await migrate.up(pool)
            await pool.execute("checkpoint")
            async with pool.acquire() as connection:
                if rule == "kept":
                    first = await Lease.take(connection, 0, uuid4(), 1.0)
                else:
                    with broken_statement(
                        lease.SQL, "take", "'synchronous_commit', 'on'", "'synchronous_commit', 'off'"
                    ):
                        first = await Lease.take(connection, 0, uuid4(), 1.0)
            server.crash_restart()
            pool.terminate()
        async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool, pool.acquire() as connection:
            second = await eventually(lambda: Lease.take(connection, 0, uuid4(), 1.0), what="the lease ran out")
            assert first is not None
            assert second is not None
            assert (second.epoch > first.epoch) is (rule == "kept")


async def test_h13_window_numbers_are_unique(log_pool: Pool) -> None:
    """Two windows under one number are impossible, whatever the epochs: the rule is the primary key."""
    log = "select outbox.log_window(0::smallint, 0, 0, '{}', 1, s.start_snapshot, pg_current_snapshot(), 0, null)"
    await log_pool.execute(f"{log} from outbox.shards s")
    with pytest.raises(asyncpg.UniqueViolationError):
        await log_pool.execute(f"{log} from outbox.shards s")
