"""What freshness costs when much waits: rows touched follow from one consumer's watermarks, not from all there is."""

from collections.abc import AsyncIterator
from typing import Final
from uuid import UUID

import pytest
import pytest_asyncio

from outbox import Pool
from outbox.cache import freshness, table
from outbox.consumer import watermarks
from tests.support import caching
from tests.support.plans import counted

SHARDS: Final = 4
PENDING: Final = 64
PARTITIONS: Final = 50
OTHERS: Final = 100
"""Consumers in the same database."""
SAID: Final = SHARDS * PENDING
SKEW: Final = 0.5
FEW: Final = 50


@pytest_asyncio.fixture
async def loaded(log_pool: Pool) -> AsyncIterator[Pool]:
    """Consumers that lag behind four shards, on a topic of fifty partitions, and one cache of the first."""
    await caching.create_table(log_pool)
    await caching.make_engine(log_pool, caching.make_cache(), name="c-0")
    await log_pool.execute(
        "insert into outbox.positions (consumer, topic, partition, next_offset, owner)"
        " select 'c-' || c, $1, p, 1000, '' from generate_series(0, $2::int) c, generate_series(1, $3::int) p",
        caching.TOPIC, OTHERS, PARTITIONS,
    )  # fmt: skip
    await log_pool.execute(
        "insert into outbox.watermarks (consumer, log_id, shard, as_of, shard_count, oldest_xid, next_offsets, parked)"
        " select 'c-' || c, $1, s, now() - make_interval(secs => n), $2, '5000',"
        "        jsonb_build_object($3::text,"
        "                           (select jsonb_object_agg(p, 1000 - n) from generate_series(1, $4::int) p)), '{}'"
        "   from generate_series(0, $5::int) c, generate_series(0, $2::int - 1) s, generate_series(1, $6::int) n",
        caching.LOG, SHARDS, caching.TOPIC, PARTITIONS, OTHERS, PENDING,
    )  # fmt: skip
    await log_pool.execute(
        "insert into outbox.applied (consumer, topic, partition, log_id, shard, window_no, ordinal)"
        " select consumer, topic, partition, $1, s, 1, 1 from outbox.positions, generate_series(0, $2::int - 1) s",
        caching.LOG, SHARDS,
    )  # fmt: skip
    yield log_pool


@pytest.mark.parametrize("is_analyzed", [False, True])
async def test_what_freshness_touches(loaded: Pool, *, is_analyzed: bool) -> None:
    """A lagging consumer's watermarks, and its positions and marks of the topic; nobody else's."""
    async with loaded.acquire() as connection:
        if is_analyzed:
            await connection.execute("analyze")
        bounds = {"outbox.watermarks": 4 * SAID, "outbox.positions": PARTITIONS, "outbox.applied": PARTITIONS * SHARDS}
        async with counted(connection) as touched:
            await watermarks.SQL.thin.execute(connection, "c-0", PENDING)
            assert not await watermarks.SQL.advance.fetchval(connection, "c-0", [caching.TOPIC], SKEW)
            assert await connection.fetchval("select count(*) from outbox.freshness") == 1
        assert touched.rows["outbox.watermarks"] >= SAID, "measured at work"
        over = {name: rows for name, bound in bounds.items() if (rows := touched.rows[name]) > bound + FEW}
        assert not over


@pytest.mark.parametrize("is_analyzed", [False, True])
async def test_what_a_fresh_read_touches(loaded: Pool, *, is_analyzed: bool) -> None:
    """A row of each table that has a say, however many watermarks, positions and marks there are."""
    await loaded.execute(
        f"insert into {caching.TABLE} (agent_id, agent_name, tags)"
        " select lpad(to_hex(i), 32, '0')::uuid, 'n', '{}' from generate_series(1, 20000) i"
    )
    await loaded.execute(
        "insert into outbox.parked_keys (parker, topic, key, reason, detail)"
        " select $1, $2, 'other-' || n, '-', '-' from generate_series(1, 5000) n",
        caching.TABLE, caching.TOPIC,
    )  # fmt: skip
    cached = await table.find(loaded, caching.CachedAgent, caching.TABLE, "agent_id")
    keys = [UUID(int=n) for n in range(1, 11)]
    async with loaded.acquire() as connection:
        if is_analyzed:
            await connection.execute("analyze")
        await connection.execute("set plan_cache_mode = force_custom_plan")
        for template, arguments in (
            (freshness.SQL.one, (keys[0], str(keys[0]))),
            (freshness.SQL.many, (keys, [str(key) for key in keys])),
        ):
            async with counted(connection) as touched:
                rows = await cached.compose(template).fetch(connection, *arguments, caching.TABLE, False)
            assert rows[0]["outbox_found"]
            assert not {name: count for name, count in touched.rows.items() if count > FEW}
