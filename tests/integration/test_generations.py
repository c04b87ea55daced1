"""Blue/green: a second table is filled while both are fed, and takes the first one's name under its readers."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from outbox import Cache, GenerationUnfit, OwnerPage, Pool, SqlOwner, crash_sites, limits, transaction
from outbox.cache import generations
from outbox.cache.pages import Pages
from outbox.cache.rebuild import Progress, Rebuild
from outbox.consumer import apply
from outbox.errors import PageRefused
from tests.support.caching import TABLE, TOPIC, AgentDeleted, CachedAgent, feed, make_engine, rows
from tests.support.faults import eventually
from tests.support.mutations import break_function, broken_statement
from tests.support.owning import QUERY, SmallRelay, create_agents, delete, owned, owned_cache, rename

SPARE = f"{TABLE}_spare"


@pytest_asyncio.fixture
async def pool(log_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(limits, "OWNER_PAGE_ROWS", 20)
    await create_agents(log_pool)
    keys = [(uuid4(), f"agent {n}") for n in range(190)]
    await log_pool.executemany("insert into agents (id, name) values ($1, $2)", keys)
    return log_pool


async def fed(pool: Pool) -> Cache[CachedAgent]:
    cache = owned_cache(pool)
    await make_engine(pool, cache)
    return cache


async def test_a_new_generation_takes_the_name_and_the_old_one_is_kept_fed_and_dropped(pool: Pool) -> None:
    cache = owned_cache(pool)
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    relay = SmallRelay(pool)
    await pool.execute(f"insert into {TABLE} (agent_id, agent_name, tags) values ($1, 'ghost', '{{}}')", uuid4())
    before = await generations.find(pool, TABLE)
    done = await generations.renew(pool, cache)
    after = await generations.find(pool, TABLE)
    assert (done.rows, done.removed, done.finished) == (190, 0, True)
    assert (after.live, after.spare, after.spare_name, after.is_former) != (before.live, None, SPARE, True)
    assert (after.spare, after.is_former) == (before.live, True)
    assert await rows(pool) == await owned(pool)
    assert len(await rows(pool, SPARE)) == 1, "the ghost stayed behind"

    async with transaction(pool) as tx:
        await rename(tx, new := uuid4(), "both get it")
    await feed(engine, partition, await relay.publish())
    assert new in await rows(pool)
    assert new in await rows(pool, SPARE)
    with pytest.raises(GenerationUnfit, match="--finish"):
        await generations.renew(pool, cache)
    await generations.rollback(pool, TABLE)
    assert len(await rows(pool)) == 2
    await generations.swap(pool, TABLE)
    assert await generations.finish(pool, TABLE) == SPARE
    assert await rows(pool) == await owned(pool)
    async with transaction(pool) as tx:
        await delete(tx, new)
    await feed(engine, partition, await relay.publish())
    assert new not in await rows(pool)
    assert await pool.fetchval("select count(*) from pg_class where relname like $1", f"{SPARE}%") == 0
    for refused in (generations.swap, generations.rollback, generations.finish):
        with pytest.raises(GenerationUnfit):
            await refused(pool, TABLE)
    await generations.renew(pool, cache)
    await generations.finish(pool, TABLE)
    assert await rows(pool) == await owned(pool)


async def test_the_new_table_is_like_the_old_one(pool: Pool) -> None:
    """Columns, indexes by their names, checks, options, comment, rights."""
    role = f"reader_{uuid4().hex[:8]}"
    await pool.execute(
        f"create index idx_by_name on {TABLE} (agent_name); create index idx_odd on {TABLE} (lower(agent_name))"
        f" where agent_name <> ''; alter table {TABLE} set (fillfactor = 70); comment on table {TABLE} is 'our agents';"
        f"create role {role}; grant select on {TABLE} to {role}; grant update (agent_name) on {TABLE} to {role};"
    )
    try:
        cache = await fed(pool)
        before = await _looks(pool)
        await generations.renew(pool, cache)
        await generations.finish(pool, TABLE)
        assert await _looks(pool) == before
    finally:
        await pool.execute(f"drop owned by {role}; drop role {role}")


async def _looks(pool: Pool) -> Any:
    found = await pool.fetch(
        "select 'table', c.reloptions::text, c.relacl::text, c.relowner::text, obj_description(c.oid) from pg_class c"
        " where c.oid = $1::text::regclass"
        " union all select 'index', indexdef, null, null, null from pg_indexes where tablename = $1"
        " union all select 'check', conname, pg_get_constraintdef(oid), null, null from pg_constraint"
        " where conrelid = $1::text::regclass"
        " union all select attname, attnum::text, format_type(atttypid, atttypmod), attacl::text, attnotnull::text"
        " from pg_attribute where attrelid = $1::text::regclass and attnum > 0 order by 1, 2, 3",
        TABLE,
    )
    return [tuple(row) for row in found]


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        (f"create view agents_view as select * from {TABLE}", "view agents_view"),
        (f"create materialized view agents_view as select agent_id from {TABLE}", "view agents_view"),
        (f"create table children (agent uuid references {TABLE})", "children_agent_fkey"),
        (f"alter table {TABLE} add column boss uuid references agents (id)", "boss_fkey"),
        (
            f"create trigger noisy before update on {TABLE} for each row execute function tsvector_update_trigger()",
            "trigger noisy",
        ),
        (f"alter table {TABLE} enable row level security", "row level security"),
        (f"create policy mine on {TABLE} using (true)", "policy mine"),
        (f"create rule quiet as on delete to {TABLE} where false do instead nothing", "rule quiet"),
        (f"create table child () inherits ({TABLE})", "inheritance"),
        (f"alter table {TABLE} add column n serial", "sequence"),
        (f"create table others (agent {TABLE})", "column agent|table others|agent of"),
        (f"create function f(a {TABLE}) returns text language sql as 'select 1::text'", "function f"),
        (f"create publication p for table {TABLE}", "publication p"),
    ],
)
async def test_what_would_stay_behind_is_named(pool: Pool, statement: str, what: str) -> None:
    cache = await fed(pool)
    await pool.execute(statement)
    with pytest.raises(GenerationUnfit, match=f"(?s)({what}).*in place"):
        await generations.renew(pool, cache)
    assert (await generations.find(pool, TABLE)).spare is None
    if "rule" not in what:  # a table with rules takes no rows at all from a cache
        assert (await Rebuild(pool, cache).run()).finished


async def test_it_goes_on_where_it_was_interrupted(pool: Pool) -> None:
    cache = await fed(pool)

    class Killed(BaseException):
        pass

    def die(progress: Progress) -> None:
        if progress.pages == 5:
            raise Killed

    with pytest.raises(Killed):
        await generations.renew(pool, cache, report=die)
    found = await generations.find(pool, TABLE)
    assert not found.is_former
    with pytest.raises(GenerationUnfit, match="has not been live"):
        await generations.rollback(pool, TABLE)
    seen: list[int] = []
    await generations.renew(pool, cache, report=lambda progress: seen.append(progress.pages))
    assert seen == [6, 7, 8, 9, 10]
    assert (await generations.find(pool, TABLE)).live == found.spare


async def test_what_is_parked_goes_with_its_table(pool: Pool) -> None:
    """Red with the parked rows left alone by `swap_generations`."""
    cache = await fed(pool)
    for parker in (TABLE, SPARE):
        await pool.execute(
            "insert into outbox.parked_keys (parker, topic, key, reason, detail) values ($1, $2, $1, 'r', 'd')",
            parker,
            TOPIC,
        )
        await pool.execute(
            "insert into outbox.parked_events (parker, topic, key, created_at) values ($1, $2, $1, now())",
            parker,
            TOPIC,
        )
    await generations.renew(pool, cache)
    for table in ("parked_keys", "parked_events"):
        found = {row["parker"]: row["key"] for row in await pool.fetch(f"select parker, key from outbox.{table}")}
        assert found == {TABLE: SPARE, SPARE: TABLE}
    await generations.finish(pool, TABLE)
    assert await pool.fetchval("select array_agg(parker) from outbox.parked_keys") == [TABLE]


# ----------------------------------------------------------------------------------------------- under readers, writers


class World:
    """Writers, a consumer and readers around a cache, without pause."""

    def __init__(self, pool: Pool, cache: Cache[CachedAgent]) -> None:
        self.pool = pool
        self.cache = cache
        self.relay = SmallRelay(pool)
        self.keys: list[UUID] = []
        self.written = [0] * 30
        self.faults: list[str] = []
        self.looks = 0
        self.stopping = asyncio.Event()

    async def write(self) -> None:
        number = 0
        while not self.stopping.is_set():
            number += 1
            key = number % len(self.keys)
            async with transaction(self.pool) as tx:
                await rename(tx, self.keys[key], f"version {number}")
                if number % 7 == 0:
                    await rename(tx, uuid4(), "passing by")

    async def consume(self) -> None:
        engine = await make_engine(self.pool, self.cache)
        partition = await engine.claim(TOPIC, 0, 0)
        while not self.stopping.is_set():
            await feed(engine, partition, await self.relay.publish())
            await asyncio.sleep(0)
        await feed(engine, partition, await self.relay.publish())

    async def read(self, *, isolation: Any) -> None:
        """Each look sees all keys, none older than the look before."""
        newest = dict.fromkeys(self.keys, 0)
        async with self.pool.acquire() as connection:
            while not self.stopping.is_set():
                async with connection.transaction(isolation=isolation):
                    for _ in range(2):
                        found = {
                            row["agent_id"]: int(row["agent_name"].split()[1])
                            for row in await connection.fetch(
                                f"select agent_id, agent_name from {TABLE} where agent_name like 'version %'"
                            )
                        }
                        self.looks += 1
                        for key, version in newest.items():
                            if key not in found:
                                self.faults.append(f"{key} is missing")
                            elif found[key] < version:
                                self.faults.append(f"{key} went back from {version} to {found[key]}")
                        newest.update(found)


async def _world(pool: Pool) -> World:
    cache = await fed(pool)
    world = World(pool, cache)
    world.keys = [uuid4() for _ in range(30)]
    for key in world.keys:
        async with transaction(pool) as tx:
            await rename(tx, key, "version 0")
    await Rebuild(pool, cache).run()
    return world


async def _swapped_under_load(pool: Pool, world: World) -> None:
    tasks = [
        asyncio.create_task(world.write()),
        asyncio.create_task(world.consume()),
        asyncio.create_task(world.read(isolation="read_committed")),
        asyncio.create_task(world.read(isolation="repeatable_read")),
    ]
    try:
        await generations.renew(pool, world.cache)
        for _ in range(3):
            await generations.rollback(pool, TABLE)
        await generations.finish(pool, TABLE)
        await generations.renew(pool, world.cache)
    finally:
        world.stopping.set()
        await asyncio.gather(*tasks)


async def test_no_reader_ever_sees_a_missing_or_older_row(pool: Pool) -> None:
    """Generations are filled, swapped, swapped back and dropped while others write, consume and read.

    Red with the spare table not fed, see the next test.
    """
    world = await _world(pool)
    await _swapped_under_load(pool, world)
    assert world.faults == []
    assert world.looks > 20
    assert await rows(pool) == await owned(pool)
    assert await rows(pool, SPARE) == await owned(pool)


async def test_a_spare_table_that_is_not_fed_shows_older_rows(pool: Pool) -> None:
    """Negative control: batches go into the live table only."""
    world = await _world(pool)
    await break_function(
        pool, "hold_caches", "where c.name = any (p_names)", "where c.role = 'live' and c.name = any (p_names)"
    )
    with broken_statement(apply.SQL, "spare", "c.role = 'spare'", "false"):
        await _swapped_under_load(pool, world)
    assert world.faults or await rows(pool) != await owned(pool) or await rows(pool, SPARE) != await owned(pool)


async def test_a_swap_waits_for_the_batch_that_is_open(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statements name the tables that it was told, and have to mean them until it ends.

    Red with `lock_alone` left out of `_shortly`: the swap is over before the batch has merged anything.
    """
    cache = owned_cache(pool)
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    await generations.renew(pool, cache)
    relay = SmallRelay(pool)
    async with transaction(pool) as tx:
        await rename(tx, key := uuid4(), "here")
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def stop_before_the_merge(name: str, side: str) -> None:
        if (name, side) == ("outbox.cache.merge.merge_rows", "before") and not inside.is_set():
            inside.set()
            await go_on.wait()

    monkeypatch.setattr(crash_sites, "hook", stop_before_the_merge)
    batch = asyncio.create_task(feed(engine, partition, await relay.publish()))
    await inside.wait()
    before = await generations.find(pool, TABLE)
    swapping = asyncio.create_task(generations.rollback(pool, TABLE))

    async def waits() -> bool:
        waiting = "select count(*) from pg_locks where locktype in ('advisory', 'relation') and not granted"
        return swapping.done() or bool(await pool.fetchval(waiting))

    await eventually(waits, what="the swap waits for the batch")
    assert await generations.find(pool, TABLE) == before
    go_on.set()
    await batch
    await swapping
    assert key in await rows(pool)
    assert key in await rows(pool, SPARE)


async def test_a_snapshot_from_before_the_fill_is_waited_for(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would find the new table under the cache's name, and none of its rows.

    Red with `_wait_for_old_snapshots` not called: the reader finds 0 rows.
    """
    cache = await fed(pool)
    await Rebuild(pool, cache).run()
    async with pool.acquire() as reader:
        begun = reader.transaction(isolation="repeatable_read")
        await begun.start()
        await reader.execute("select 1 from agents limit 1")  # takes the snapshot, and no lock on the cache
        renewing = asyncio.create_task(generations.renew(pool, cache))

        async def waits() -> bool:
            return bool(
                await pool.fetchval(
                    "select count(*) from pg_stat_activity"
                    " where query like '%age(a.backend_xmin)%' and pid <> pg_backend_pid()"
                )
            )

        await eventually(waits, what="the pages are merged, and the swap waits")
        assert await reader.fetchval(f"select count(*) from {TABLE}") == 190
        assert not renewing.done()
        await begun.rollback()
    await renewing
    assert await rows(pool) == await owned(pool)


async def test_locks_of_others_make_the_swap_give_way(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers get through between the tries; after a bounded time the command gives up, and may be tried again."""
    monkeypatch.setattr(limits, "SWAP_LOCK_SECONDS", 0.05)
    monkeypatch.setattr(limits, "SWAP_TRY_SECONDS", 0.5)
    cache = await fed(pool)
    await generations.renew(pool, cache)
    async with pool.acquire() as other:
        holding = other.transaction()
        await holding.start()
        await other.execute(f"select 1 from {TABLE} limit 1")
        with pytest.raises(GenerationUnfit, match="locked") as caught:
            await generations.rollback(pool, TABLE)
        assert isinstance(caught.value.__cause__, asyncpg.LockNotAvailableError)
        await holding.rollback()
    await generations.rollback(pool, TABLE)


async def test_a_page_prepared_for_a_table_that_was_swapped_away_is_refused(pool: Pool) -> None:
    """It would be written to the table that has the name now, and be recorded for the other one.

    Red with `to_regclass` not compared in `open`.
    """
    cache = await fed(pool)
    merge = await cache.prepare(pool)
    pages = Pages(pool, merge, topic=cache.topic, parker=cache.table)
    page = await SqlOwner(pool, QUERY).page(None, 500)
    await generations.renew(pool, cache)
    with pytest.raises(PageRefused, match="another table now"):
        await pages.merge(page, after=None, through=None)


async def test_a_rebuild_in_place_goes_on_with_its_table_across_a_swap(pool: Pool) -> None:
    """The table that it began with is the spare one afterwards; it is that which gets complete."""
    cache = await fed(pool)
    await generations.renew(pool, cache)
    before = await generations.find(pool, TABLE)

    class Swapping(SqlOwner):
        asked = 0

        async def page(self, after: object | None, limit: int) -> OwnerPage:
            self.asked += 1
            if self.asked == 5:
                await generations.rollback(pool, TABLE)
            return await super().page(after, limit)

    cache.owner = Swapping(pool, QUERY)  # type: ignore[misc]
    assert (await Rebuild(pool, cache).run()).finished
    assert (await generations.find(pool, TABLE)).spare == before.live
    assert await rows(pool, SPARE) == await owned(pool)
    assert await pool.fetchval("select count(*) from outbox.caches where complete_log is not null") == 1


async def test_waiting_for_a_receipt_works_across_the_swap(pool: Pool) -> None:
    """A cache object that has read before goes on with the table that has the name now, tombstones included."""
    cache = owned_cache(pool)
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    relay = SmallRelay(pool)
    async with transaction(pool) as tx:
        await rename(tx, key := uuid4(), "here")
    await feed(engine, partition, await relay.publish())
    assert (await cache.wait_for(pool, key, tx.receipt, timeout=5)) is not None
    await generations.renew(pool, cache)
    await generations.finish(pool, TABLE)
    assert (await cache.wait_for(pool, key, tx.receipt, timeout=5)) is not None
    async with transaction(pool) as tx:
        tx.emit(AgentDeleted(agent_id=key))
        await tx.execute("delete from agents where id = $1", key)
    await feed(engine, partition, await relay.publish())
    assert (await cache.wait_for(pool, key, tx.receipt, timeout=5)) is None


@pytest.mark.parametrize("name", ["agents", "crm.agents", "a" * 63, "ä" * 31, "名" * 21])
def test_the_name_of_a_spare_table_fits(name: str) -> None:
    """Red with characters counted: PostgreSQL would cut the last one to the name of the live table."""
    spare = generations.spare_of(name)
    assert spare.endswith("_spare")
    assert name.rpartition(".")[2].startswith(spare.removesuffix("_spare"))
    assert len(spare.encode()) <= 63
