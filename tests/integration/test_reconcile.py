"""Reconciling: exactly what has drifted, confirmed, and repaired by the one merge."""

import asyncio
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from pydantic import BaseModel

from outbox import Cache, Event, Key, OwnerError, OwnerPage, Pool, SqlOwner, limits, transaction
from outbox.cache import reconcile as reconcile_module
from outbox.cache.rebuild import Rebuild
from outbox.cache.reconcile import Comparison, Drift, Reconcile
from outbox.errors import CacheNotFed
from tests.integration.test_owner import fastapi_app, http_owner
from tests.support.caching import TABLE, TOPIC, CachedAgent, feed, make_engine, rows
from tests.support.owning import QUERY, SmallRelay, create_agents, owned, owned_cache, rename


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> Pool:
    await create_agents(log_pool)
    return log_pool


async def filled(pool: Pool, count: int = 3_000, cache: Cache[CachedAgent] | None = None) -> Cache[CachedAgent]:
    await pool.execute(
        "insert into agents select md5(n::text)::uuid, 'agent ' || n, array[n::text]"
        " from generate_series(1, $1::int) n",
        count,
    )
    cache = cache or owned_cache(pool)
    await make_engine(pool, cache)
    await Rebuild(pool, cache).run()
    return cache


def key(n: int) -> UUID:
    import hashlib

    return UUID(hashlib.md5(str(n).encode()).hexdigest())  # noqa: S324


async def plant(pool: Pool) -> list[Drift]:
    """One of each kind, and a row whose difference is none."""
    await pool.execute(f"delete from {TABLE} where agent_id = $1", key(17))
    await pool.execute(f"update {TABLE} set agent_name = 'wrong' where agent_id = $1", key(18))
    await pool.execute(f"update {TABLE} set tags = '{{wrong}}', agent_name = 'wrong' where agent_id = $1", key(19))
    ghost = uuid4()
    await pool.execute(f"insert into {TABLE} (agent_id, agent_name, tags) values ($1, 'ghost', '{{}}')", ghost)
    planted = [
        Drift(str(key(17)), "missing"),
        Drift(str(key(18)), "different", ("agent_name",)),
        Drift(str(key(19)), "different", ("agent_name", "tags")),
        Drift(str(ghost), "ghost"),
    ]
    return sorted(planted, key=lambda drift: drift.key)


@pytest.mark.parametrize("over_http", [False, True])
async def test_exactly_what_has_drifted_is_found_and_repaired(pool: Pool, *, over_http: bool) -> None:
    local = SqlOwner(pool, QUERY)
    cache = await filled(pool, cache=owned_cache(pool, http_owner(fastapi_app(local)) if over_http else local))
    clean = await Reconcile(pool, cache, grace_seconds=0).run()
    columns = ("agent_id", "agent_name", "tags")
    assert clean == Comparison(rows=3_000, columns=columns)
    planted = await plant(pool)
    before = await rows(pool)
    found = await Reconcile(pool, cache, grace_seconds=0).run()
    assert sorted(found.drifts, key=lambda drift: drift.key) == planted
    assert (found.rows, found.drifted, found.repaired, found.moving, found.same) == (3_000, 4, 0, 0, 0)
    assert 1 <= found.buckets <= 4
    assert await rows(pool) == before, "only reported"
    fixed = await Reconcile(pool, cache, grace_seconds=0).run(fix=True)
    assert (fixed.drifted, fixed.repaired) == (4, 4)
    assert await rows(pool) == await owned(pool)
    assert await Reconcile(pool, cache, grace_seconds=0).run() == clean


async def test_only_differing_buckets_are_looked_into(pool: Pool) -> None:
    asked: list[int] = []

    class Counting(SqlOwner):
        async def get_many(self, keys: Any) -> OwnerPage:
            asked.append(len(keys))
            return await super().get_many(keys)

    cache = await filled(pool, cache=owned_cache(pool, Counting(pool, QUERY)))
    await plant(pool)
    await Reconcile(pool, cache, grace_seconds=0).run()
    assert asked == [4, 4], "two looks at the four keys that differ"


async def test_what_arrives_between_the_looks_has_not_drifted(pool: Pool) -> None:
    """Red with the rows of the two looks not compared: the owner goes on changing the row, so it differs both times."""
    changes = 0

    class Changing(SqlOwner):
        async def get_many(self, keys: Any) -> OwnerPage:
            nonlocal changes
            changes += 1
            await pool.execute("update agents set name = 'change ' || $2 where id = $1", key(3), str(changes))
            return await super().get_many(keys)

    cache = await filled(pool, 50, owned_cache(pool, Changing(pool, QUERY)))
    await pool.execute("update agents set name = 'on its way' where id = $1", key(3))
    found = await Reconcile(pool, cache, grace_seconds=0).run(fix=True)
    assert (changes, found.drifted, found.moving, found.repaired) == (2, 0, 1, 0)


async def test_a_row_newer_than_the_answer_has_not_drifted(pool: Pool) -> None:
    """Red with `newer` taken for false: an owner that answers late, twice alike, would be believed."""
    relay = SmallRelay(pool)

    class Late(SqlOwner):
        async def get_many(self, keys: Any) -> OwnerPage:  # noqa: ARG002
            return late

    cache = await filled(pool, 50)
    late = await SqlOwner(pool, QUERY).get(key(5))
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    async with transaction(pool) as tx:
        await rename(tx, key(5), "newer than the answer")
    await feed(engine, partition, await relay.publish())
    await pool.execute("update agents set name = 'so that the digests differ' where id = $1", key(5))
    found = await Reconcile(pool, owned_cache(pool, Late(pool, QUERY)), grace_seconds=0).run(fix=True)
    assert (found.drifted, found.moving, found.repaired) == (0, 1, 0)
    assert (await rows(pool))[key(5)][0] == "newer than the answer"


async def test_a_repair_gives_way_to_an_event_that_comes_between(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page of the second look is merged like any page: an event that it does not see is newer."""
    relay = SmallRelay(pool)
    cache = await filled(pool, 20)
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    await pool.execute(f"update {TABLE} set agent_name = 'wrong' where agent_id = $1", key(7))
    repair = Reconcile._repair

    async def overtaken(self: Reconcile, page: OwnerPage, keys: Any) -> None:
        async with transaction(pool) as tx:
            await rename(tx, key(7), "came between")
        await feed(engine, partition, await relay.publish())
        await repair(self, page, keys)

    monkeypatch.setattr(Reconcile, "_repair", overtaken)
    found = await Reconcile(pool, cache, grace_seconds=0).run(fix=True)
    assert (found.drifted, found.repaired) == (1, 0)
    assert (await rows(pool))[key(7)][0] == "came between"


class Priced(BaseModel):
    id: int
    price: Decimal
    at: datetime
    note: str = "ours"


class PriceChanged(Event, topic="prices", type="price.changed"):
    id: Key[int]


async def test_other_representations_of_a_value_are_no_drift(pool: Pool) -> None:
    """A moment without time zone at the owner, with one here; trailing zeros; a column that only the cache has.

    Red with texts compared instead of values read into the table's types.
    """
    await pool.execute(
        "create table prices (id integer primary key, price numeric(10, 4) not null, at timestamp not null);"
        "create table price_cache (id bigint primary key, price numeric not null, at timestamptz not null,"
        " note text not null);"
        "select outbox.prepare_cache('price_cache');"
        "insert into prices select n, n / 4.0, '2024-01-01' from generate_series(1, 300) n"
    )
    query = "select id, price, at at time zone 'UTC' as at from prices"
    cache = Cache(Priced, table="price_cache", key="id", topic="prices", owner=SqlOwner(pool, query))
    cache.on(_priced)
    await make_engine(pool, cache)
    await Rebuild(pool, cache).run()
    assert await pool.fetchval("select at from price_cache where id = 1") == datetime(2024, 1, 1, tzinfo=UTC)
    exact = await Reconcile(pool, cache, grace_seconds=0).run()
    assert (exact.buckets, exact.uncompared) == (0, ("note",))
    loose = "select id, price, to_char(at, 'YYYY-MM-DD HH24:MI:SS.US+00:00') as at from prices"
    cache.owner = SqlOwner(pool, loose)  # type: ignore[misc]
    await pool.execute("update price_cache set price = 0 where id = 8")
    found = await Reconcile(pool, cache, grace_seconds=0).run()
    assert (found.same, found.drifts) == (299, [Drift("8", "different", ("price",))])


def _priced(event: PriceChanged) -> Priced:
    return Priced(id=event.id, price=Decimal(1), at=datetime(2024, 1, 1, tzinfo=UTC))


async def test_a_long_list_of_drifts_is_counted_and_cut(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECONCILE_LISTED", 5)
    monkeypatch.setattr(limits, "OWNER_PAGE_MAX_ROWS", 70)
    monkeypatch.setattr(reconcile_module, "_ROWS_AT_ONCE", 40)
    monkeypatch.setattr(reconcile_module, "_CONFIRMED_AT_ONCE", 30)
    cache = await filled(pool, 500)
    await pool.execute(f"update {TABLE} set agent_name = 'wrong'")
    found = await Reconcile(pool, cache, grace_seconds=0).run(fix=True)
    assert (found.drifted, len(found.drifts), found.repaired) == (500, 5, 500)
    assert await rows(pool) == await owned(pool)


async def test_the_looks_are_a_grace_time_apart(pool: Pool) -> None:
    times: list[float] = []

    class Timed(SqlOwner):
        async def get_many(self, keys: Any) -> OwnerPage:
            times.append(asyncio.get_running_loop().time())
            return await super().get_many(keys)

    cache = await filled(pool, 20, owned_cache(pool, Timed(pool, QUERY)))
    await plant(pool)
    await Reconcile(pool, cache, grace_seconds=0.3).run()
    assert times[1] - times[0] >= 0.29


async def test_an_empty_owner_leaves_ghosts_only(pool: Pool) -> None:
    cache = await filled(pool, 20)
    await pool.execute("truncate agents")
    found = await Reconcile(pool, cache, grace_seconds=0).run(fix=True)
    assert {drift.kind for drift in found.drifts} == {"ghost"}
    assert found.repaired == 20
    assert await rows(pool) == {}


async def test_a_parked_key_says_so(pool: Pool) -> None:
    cache = await filled(pool, 20)
    await pool.execute(f"update {TABLE} set agent_name = 'wrong' where agent_id = $1", key(1))
    await pool.execute(
        "insert into outbox.parked_keys (parker, topic, key, reason, detail) values ($1, $2, $3, 'r', 'd')",
        TABLE,
        TOPIC,
        str(key(1)),
    )
    found = await Reconcile(pool, cache, grace_seconds=0).run()
    assert found.drifts == [Drift(str(key(1)), "different", ("agent_name",), parked=True)]


async def test_what_cannot_be_compared_is_explained(pool: Pool) -> None:
    class Minimal:
        async def page(self, after: object | None, limit: int) -> OwnerPage:
            raise NotImplementedError

        async def get(self, key: object) -> OwnerPage:
            raise NotImplementedError

    with pytest.raises(OwnerError, match="get_many"):
        Reconcile(pool, owned_cache(pool, Minimal()))
    with pytest.raises(CacheNotFed):
        await Reconcile(pool, owned_cache(pool)).run()
