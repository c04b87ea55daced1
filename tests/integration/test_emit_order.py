"""Events of one transaction get positions in the order in which they were emitted."""

import sys
from typing import Final

import asyncpg
import pytest

import outbox
from outbox import Pool
from outbox.upkeep import migrate
from tests.support.mutations import broken_statement
from tests.support.writers import changed_event

SQL: Final = sys.modules["outbox.transaction"].SQL


@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_events_of_one_transaction_keep_their_order_whatever_join_the_planner_picks(
    any_database: str, rule: str
) -> None:
    """Positions follow `emit`, because the insert orders by ordinality.

    Seen red: without the `order by` the planner hashes the small unnest and probes it with outbox.topics, which returns
    the rows backwards as soon as the topic is pinned.
    """
    event = changed_event("orders")
    async with asyncpg.create_pool(any_database, min_size=1, max_size=1) as pool:
        await migrate.up(pool)
        await pool.execute("insert into outbox.topics (topic, partition_count) values ('orders', 3)")
        identities = [str(n) for n in range(6)]

        async def emit() -> None:
            async with outbox.transaction(pool) as tx:
                tx.emit(*(event(key="k", identity=identity) for identity in identities))

        if rule == "kept":
            await emit()
            assert await _identities(pool) == identities
        else:
            with broken_statement(SQL, "flush", "order by x.nth"):
                await emit()
            assert await _identities(pool) != identities


async def _identities(pool: Pool) -> list[str]:
    rows = await pool.fetch(
        "select convert_from(payload, 'UTF8')::jsonb ->> 'identity' as identity from outbox.events order by position"
    )
    return [row["identity"] for row in rows]
