"""Pages of the owner and live events, in any order, through the one merge; each rule beside what goes wrong without it.

In these tests the transaction id of an event at (window, ordinal) is window * 1000 + ordinal.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from pydantic import BaseModel

from outbox import Cache, Event, Key, Pool, Receipt, SqlOwner, WaitTimeout, crash_sites
from outbox.cache import merge, pages
from outbox.cache.pages import Merged, Pages
from outbox.consumer.apply import Engine
from outbox.errors import CacheNotFed, OwnerRowInvalid, PageRefused
from tests.support.caching import (
    LOG,
    NEWER_LOG,
    TABLE,
    TOPIC,
    AgentDeleted,
    AgentNamePatched,
    AgentRenamed,
    AgentTagged,
    Kafka,
    consume,
    create_table,
    feed,
    make_cache,
    make_engine,
    numbered,
    parked,
    rows,
)
from tests.support.handmade import MadePage, page, pages_of
from tests.support.mutations import broken_statement

LOW, MIDDLE, HIGH = (UUID(int=n << 120) for n in (1, 2, 3))


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> AsyncIterator[Pool]:
    await create_table(log_pool)
    yield log_pool
    crash_sites.hook = None


@pytest_asyncio.fixture
async def engine(pool: Pool) -> Engine:
    return await make_engine(pool, make_cache())


@pytest_asyncio.fixture
async def owner(pool: Pool, engine: Engine) -> Pages:
    return await pages_of(pool, make_cache())


def renamed(agent: UUID, name: str) -> AgentRenamed:
    return AgentRenamed(agent_id=agent, agent_name=name)


async def whole(owner: Pages, made: MadePage) -> Merged:
    """Merge a page that speaks for all keys."""
    return await owner.merge(made, after=None, through=None)


async def test_a_page_fills_an_empty_cache(pool: Pool, owner: Pages) -> None:
    assert await whole(owner, page([(LOW, "a"), (HIGH, "b")], xmax=500)) == Merged(2, 2, 0)
    assert await rows(pool) == {LOW: ("a", []), HIGH: ("b", [])}
    row = await pool.fetchrow(f"select * from {TABLE} where agent_id = $1", LOW)
    assert row is not None
    assert (row["outbox_log"], row["outbox_position"], row["outbox_offset"]) == (LOG, None, None)
    assert row["outbox_page"] is not None


async def test_a_page_merged_twice_is_merged_once(pool: Pool, owner: Pages) -> None:
    made = page([(LOW, "a")], xmax=500)
    await whole(owner, made)
    await whole(owner, made)
    assert await rows(pool) == {LOW: ("a", [])}


async def test_h16_an_event_in_flight_when_the_page_was_read_is_applied(
    pool: Pool, engine: Engine, owner: Pages
) -> None:
    """Red where positions are compared in place of the snapshot: 1001 is below what the page saw, and is not in it."""
    await whole(owner, page([(LOW, "before")], xmax=5000, open_ids=[1001]))
    await consume(engine, numbered([renamed(LOW, "after")]))
    assert await rows(pool) == {LOW: ("after", [])}


@pytest.mark.parametrize(
    "event", [renamed(LOW, "older"), AgentNamePatched(agent_id=LOW, agent_name="older"), AgentDeleted(agent_id=LOW)]
)
async def test_an_event_that_the_page_sees_is_part_of_it(
    pool: Pool, engine: Engine, owner: Pages, event: Event
) -> None:
    """Red without the look at pages in `merge_rows`: the row goes back."""
    await whole(owner, page([(LOW, "newer")], xmax=5000))
    outcome = await consume(engine, numbered([event]))
    assert outcome.parked == 0
    assert await rows(pool) == {LOW: ("newer", [])}
    assert await pool.fetchval("select count(*) from outbox.tombstones") == 0
    unguarded = "or outbox.page_sees(n.log_id, n.snapshot, x.outbox_log, x.outbox_transaction_id) is not true"
    if isinstance(event, AgentRenamed):
        with (
            broken_statement(merge.SQL, "merge_rows", unguarded, "or true"),
            broken_statement(merge.SQL, "merge_rows", "c.outbox_page is null", "true"),
        ):
            await consume(await make_engine(pool, make_cache(), name="without"), numbered([event]))
        assert await rows(pool) == {LOW: ("older", [])}, "what the rule is for"


async def test_a_page_older_than_the_row_does_not_touch_it(pool: Pool, engine: Engine, owner: Pages) -> None:
    """Red when `merge_page` does not ask whether its snapshot sees the row's event."""
    await consume(engine, numbered([renamed(LOW, "newest")]))
    assert await whole(owner, page([(LOW, "old")], xmax=5000, open_ids=[1001])) == Merged(1, 0, 0, (str(LOW),))
    assert await rows(pool) == {LOW: ("newest", [])}
    assert await whole(owner, page([(LOW, "later still")], xmax=6000)) == Merged(1, 1, 0)
    assert await rows(pool) == {LOW: ("later still", [])}


async def test_a_late_page_does_not_bring_back_what_was_deleted(pool: Pool, engine: Engine, owner: Pages) -> None:
    """Red without tombstones among what blocks a page's rows."""
    await consume(engine, numbered([renamed(LOW, "a"), AgentDeleted(agent_id=LOW)]))
    await whole(owner, page([(LOW, "a")], xmax=1002))
    assert await rows(pool) == {}
    with broken_statement(
        merge.SQL, "merge_page", "is false\n            or t.page_id", "is null\n            or t.page_id"
    ):
        await whole(await pages_of(pool, make_cache()), page([(LOW, "a")], xmax=1002))
    assert await rows(pool) == {LOW: ("a", [])}, "what the rule is for"


async def test_pages_of_one_log_are_ordered_by_what_they_see(pool: Pool, owner: Pages) -> None:
    """Red without `later`: the earlier page comes second and wins. With one xmax, the one with fewer open sees more."""
    await whole(owner, page([(LOW, "second")], xmax=600))
    await whole(owner, page([(LOW, "first"), (HIGH, "gone by then")], xmax=500))
    assert await rows(pool) == {LOW: ("second", [])}
    await whole(owner, page([(LOW, "third")], xmax=700, open_ids=[650]))
    await whole(owner, page([(LOW, "fourth")], xmax=700))
    await whole(owner, page([(LOW, "third")], xmax=700, open_ids=[650]))
    assert await rows(pool) == {LOW: ("fourth", [])}


async def test_what_a_page_speaks_for_and_lacks_is_removed(pool: Pool, engine: Engine, owner: Pages) -> None:
    events = [renamed(LOW, "low"), renamed(MIDDLE, "ghost"), renamed(HIGH, "high")]
    await consume(engine, numbered(events))
    done = await owner.merge(page([(LOW, "low")], xmax=5000), after=None, through=MIDDLE)
    assert done == Merged(1, 1, 1)
    assert await rows(pool) == {LOW: ("low", []), HIGH: ("high", [])}, "HIGH is beyond the range"


async def test_a_row_newer_than_the_page_is_no_ghost(pool: Pool, engine: Engine, owner: Pages) -> None:
    await consume(engine, numbered([renamed(MIDDLE, "created meanwhile")]))
    await whole(owner, page([], xmax=5000, open_ids=[1001]))
    assert await rows(pool) == {MIDDLE: ("created meanwhile", [])}


@pytest.mark.parametrize("single", [False, True])
async def test_h41_the_old_create_of_a_key_that_the_page_lacks(
    pool: Pool, engine: Engine, owner: Pages, *, single: bool
) -> None:
    """Red without ranges (and tombstones of pages) among what an event has to pass: a ghost."""
    made = page([], xmax=5000)
    await (owner.merge_keys(made, [LOW]) if single else whole(owner, made))
    outcome = await consume(engine, numbered([renamed(LOW, "created, and deleted before the page")]))
    assert (outcome.parked, await rows(pool)) == (0, {})
    patched = await consume(
        await make_engine(pool, make_cache(), name="second"),
        numbered([AgentNamePatched(agent_id=LOW, agent_name="patched, and deleted before the page")]),
    )
    assert (patched.parked, await rows(pool)) == (0, {})
    later = Kafka(first=1)
    later.put(renamed(LOW, "created again"), (6, 1))
    await engine.prepare()  # takes the cache over again
    await consume(engine, later)
    assert await rows(pool) == {LOW: ("created again", [])}


async def test_h41_without_ranges_is_a_ghost(pool: Pool, engine: Engine, owner: Pages) -> None:
    await whole(owner, page([], xmax=5000))
    await pool.execute("delete from outbox.page_ranges")
    await consume(engine, numbered([renamed(LOW, "a ghost")]))
    assert await rows(pool) == {LOW: ("a ghost", [])}


async def test_single_keys_speak_for_themselves_only(pool: Pool, engine: Engine, owner: Pages) -> None:
    await consume(engine, numbered([renamed(LOW, "low"), renamed(MIDDLE, "ghost"), renamed(HIGH, "high")]))
    done = await owner.merge_keys(page([(LOW, "mended")], xmax=5000), [LOW, MIDDLE])
    assert done == Merged(1, 1, 1)
    assert await rows(pool) == {LOW: ("mended", []), HIGH: ("high", [])}
    stone = await pool.fetchrow("select * from outbox.tombstones")
    assert stone is not None
    assert (stone["key"], stone["log_id"], stone["position"]) == (str(MIDDLE), LOG, None)


async def test_the_higher_log_wins_whatever_comes_when(pool: Pool, engine: Engine, owner: Pages) -> None:
    await whole(owner, page([(LOW, "of the newer log")], xmax=10, log_id=NEWER_LOG))
    await consume(engine, numbered([renamed(LOW, "late bytes of the old log")]))
    await whole(owner, page([(LOW, "page of the old log")], xmax=9000))
    assert await rows(pool) == {LOW: ("of the newer log", [])}
    newer = Kafka(first=1, log_id=NEWER_LOG)
    newer.put(renamed(LOW, "event of the newer log"), (1, 1))
    await consume(engine, newer)
    assert await rows(pool) == {LOW: ("event of the newer log", [])}


async def test_a_patch_of_a_newer_log_does_not_carry_a_row_of_the_older_one_past_a_page(
    pool: Pool, engine: Engine, owner: Pages
) -> None:
    """The owner was restored without `lost`. Red when a batch does not end where a newer log begins."""
    await whole(owner, page([(LOW, "kept")], xmax=10, log_id=NEWER_LOG))
    kafka = numbered([AgentRenamed(agent_id=LOW, agent_name="lost", tags=["lost"])])
    kafka.put(AgentTagged(agent_id=LOW, tags=["new"]), (1, 1), log_id=NEWER_LOG)
    outcome = await consume(engine, kafka)
    assert (outcome.applied, outcome.parked) == (2, 0)
    assert await rows(pool) == {LOW: ("kept", ["new"])}


async def test_a_patch_of_a_newer_log_waits_for_the_owner_where_the_row_is_of_the_older_one(pool: Pool) -> None:
    """Red without `founded` in `merge`: the page does not see the patch, so it leaves what was lost in the row."""
    cache = make_cache(owner=SqlOwner(pool, "select agent_id, agent_name, tags from nowhere", key="agent_id"))
    engine, owner = await make_engine(pool, cache), await pages_of(pool, cache)
    kafka = numbered([AgentRenamed(agent_id=LOW, agent_name="lost", tags=["lost"])])
    kafka.put(AgentTagged(agent_id=LOW, tags=["new"]), (1, 1), log_id=NEWER_LOG)
    outcome = await consume(engine, kafka)
    assert (outcome.applied, outcome.parked) == (1, 1)
    await whole(owner, page([(LOW, "kept")], xmax=10, log_id=NEWER_LOG))
    assert await rows(pool) == {LOW: ("kept", [])}
    assert await pool.fetchval("select retry_at <= clock_timestamp() from outbox.parked_keys"), "and tried again now"


async def test_without_an_owner_a_patch_of_a_newer_log_is_applied(pool: Pool, engine: Engine) -> None:
    kafka = numbered([renamed(LOW, "kept")])
    kafka.put(AgentTagged(agent_id=LOW, tags=["new"]), (1, 1), log_id=NEWER_LOG)
    assert (await consume(engine, kafka)).parked == 0
    assert await rows(pool) == {LOW: ("kept", ["new"])}


async def test_h33_a_page_and_a_batch_of_one_key_take_turns(pool: Pool, engine: Engine, owner: Pages) -> None:
    """Red without `outbox.hold_caches` in `advance`: the upsert waits for the page's row, and decides without it."""
    await consume(engine, numbered([renamed(LOW, "first")]))
    page_merged, go_on = asyncio.Event(), asyncio.Event()

    async def hold(site: str, side: str) -> None:
        if (site, side) == ("outbox.cache.merge.merge_page", "after"):
            page_merged.set()
            await go_on.wait()

    crash_sites.hook = hold
    merging = asyncio.create_task(whole(owner, page([(LOW, "page")], xmax=5000)))
    await page_merged.wait()
    crash_sites.hook = None
    late = Kafka(first=1)
    late.put(renamed(LOW, "older than the page"), (2, 1))
    batch = asyncio.create_task(consume(engine, late))
    while not await pool.fetchval("select exists (select from pg_locks where not granted)"):
        assert not batch.done(), "the batch did not wait for the page"
    go_on.set()
    await asyncio.gather(merging, batch)
    assert await rows(pool) == {LOW: ("page", [])}


async def test_a_page_below_the_floor_is_refused(pool: Pool, owner: Pages) -> None:
    await pool.execute("update outbox.caches set floor_log = $1, floor_xid = '600'", LOG)
    with pytest.raises(PageRefused, match="read it again"):
        await whole(owner, page([(LOW, "a")], xmax=700, open_ids=[599]))
    assert await pool.fetchval("select count(*) from outbox.pages") == 0
    await whole(owner, page([(LOW, "a")], xmax=700, open_ids=[600]))
    assert await rows(pool) == {LOW: ("a", [])}


async def test_a_row_that_does_not_fit_names_itself(pool: Pool, owner: Pages) -> None:
    made = page([(LOW, "a")], xmax=500)
    made.rows.append({"agent_id": str(HIGH), "agent_name": None, "tags": []})
    with pytest.raises(OwnerRowInvalid, match=rf"{HIGH}.*agent_name.*change the row class"):
        await whole(owner, made)
    assert await rows(pool) == {}


async def test_a_table_that_nobody_feeds(pool: Pool) -> None:
    with pytest.raises(CacheNotFed, match="start the service's consumer"):
        await whole(await pages_of(pool, make_cache()), page([], xmax=5))


async def test_parked_events_that_a_page_contains_are_void(pool: Pool, engine: Engine, owner: Pages) -> None:
    """Red without `void`: what the page healed stays parked."""
    events = [AgentNamePatched(agent_id=LOW, agent_name="seen"), AgentNamePatched(agent_id=HIGH, agent_name="not seen")]
    await consume(engine, numbered(events))
    assert await parked(pool) == {str(LOW): ["agent.name_patched"], str(HIGH): ["agent.name_patched"]}
    await whole(owner, page([(LOW, "owner's"), (HIGH, "owner's")], xmax=5000, open_ids=[1002]))
    assert await parked(pool) == {str(HIGH): ["agent.name_patched"]}
    assert await pool.fetchval("select retry_at <= clock_timestamp() from outbox.parked_keys"), "and tried again now"


async def test_progress_moves_with_the_page_or_not_at_all(pool: Pool, owner: Pages) -> None:
    class CrashedError(Exception):
        pass

    async def moved(connection: Any, merged: Merged) -> None:
        await connection.execute("create table progress as select $1::int as rows", merged.rows)
        raise CrashedError

    with pytest.raises(CrashedError):
        await owner.merge(page([(LOW, "a")], xmax=5), after=None, through=None, moved=moved)
    assert await rows(pool) == {}
    assert await pool.fetchval("select to_regclass('progress')") is None
    assert await pool.fetchval("select count(*) from outbox.pages") == 0


# ------------------------------------------------------------------------------------------------- kinds of keys


class NumberChanged(Event, topic="numbers", type="number.changed"):
    id: Key[int]
    name: str


class WordChanged(Event, topic="words", type="word.changed"):
    word: Key[str]
    name: str


class CachedNumber(BaseModel):
    id: int
    name: str


class CachedWord(BaseModel):
    word: str
    name: str


async def test_integer_keys_are_compared_as_numbers(log_pool: Pool) -> None:
    """Red where ranges are compared as text: 9 lies beyond 10."""
    await log_pool.execute("create table numbers (id integer primary key, name text not null)")
    await log_pool.execute("select outbox.prepare_cache('numbers')")
    cache = Cache(CachedNumber, table="numbers", key="id", topic="numbers")

    @cache.on
    def changed(event: NumberChanged) -> CachedNumber:
        return CachedNumber(id=event.id, name=event.name)

    await make_engine(log_pool, cache)
    owner = await pages_of(log_pool, cache)
    await owner.merge(
        MadePage(LOG, "50:50:", [{"id": n, "name": "old"} for n in (9, 10, 11)]), after=None, through=None
    )
    await owner.merge(MadePage(LOG, "60:60:", [{"id": 10, "name": "new"}]), after=8, through=10)
    found = await log_pool.fetch("select id, name from numbers order by id")
    assert [tuple(row) for row in found] == [(10, "new"), (11, "old")]


async def test_text_keys_are_compared_by_code_points(log_pool: Pool) -> None:
    """Red where ranges follow the column's collation, without {key_order}: `b` lies between `A` and `Z` there."""
    await log_pool.execute(
        f"create table words (word text {await other_order(log_pool)} primary key, name text not null)"
    )
    await log_pool.execute("select outbox.prepare_cache('words')")
    cache = Cache(CachedWord, table="words", key="word", topic="words")

    @cache.on
    def changed(event: WordChanged) -> CachedWord:
        return CachedWord(word=event.word, name=event.name)

    await make_engine(log_pool, cache)
    owner = await pages_of(log_pool, cache)
    rows = [{"word": word, "name": "old"} for word in ("A", "Z", "b")]
    await owner.merge(MadePage(LOG, "50:50:", rows), after=None, through=None)
    await owner.merge(MadePage(LOG, "60:60:", [{"word": "Z", "name": "new"}]), after="A", through="Z")
    found = await log_pool.fetch('select word, name from words order by word collate "C"')
    assert [tuple(row) for row in found] == [("A", "old"), ("Z", "new"), ("b", "old")]


async def other_order(pool: Pool) -> str:
    """A collation that does not go by code points, where the server has any."""
    name = await pool.fetchval(
        "select quote_ident(collname) from pg_collation where collname ~ '^en_US' and collprovider = 'c'"
        " and collencoding in (-1, pg_char_to_encoding(getdatabaseencoding())) order by collname limit 1"
    )
    return "" if name is None else f"collate {name}"


# ------------------------------------------------------------------------------------------------------- receipts


async def receipt_of(key: UUID, position: int, transaction_id: int) -> Receipt:
    found = Receipt.of(
        [{"topic": TOPIC, "key": str(key), "position": position, "log_id": LOG, "transaction_id": transaction_id}]
    )
    assert isinstance(found, Receipt)
    return found


async def test_a_receipt_is_seen_by_a_page_that_sees_its_transaction(pool: Pool, owner: Pages) -> None:
    """Red where receipts know positions only; a page has none."""
    cache = make_cache()
    receipt = await receipt_of(LOW, 40, 763)
    await whole(owner, page([(LOW, "a")], xmax=800, open_ids=[763]))
    with pytest.raises(WaitTimeout):
        await cache.wait_for(pool, LOW, receipt, timeout=0.01)
    await whole(owner, page([(LOW, "b")], xmax=800))
    row = await cache.wait_for(pool, LOW, receipt, timeout=0.01)
    assert row is not None
    assert row.agent_name == "b"
    gone = await receipt_of(HIGH, 41, 764)
    assert await cache.wait_for(pool, HIGH, gone, timeout=0.01) is None, "the range sees it"


async def test_a_receipt_is_seen_once_everything_below_a_later_transaction_is_applied(
    pool: Pool, engine: Engine
) -> None:
    """Red without the look at freshness: an event that changes no row, or whose page is forgotten, is never seen."""
    cache = make_cache()
    receipt = await receipt_of(LOW, 40, 763)
    await pool.execute(
        "insert into outbox.freshness (consumer, topic, log_id, complete_as_of, oldest_xid)"
        " values ('workflow', $1, $2, now(), '763')",
        TOPIC,
        LOG,
    )
    with pytest.raises(WaitTimeout):
        await cache.wait_for(pool, LOW, receipt, timeout=0.01)
    await pool.execute("update outbox.freshness set oldest_xid = '764'")
    assert await cache.wait_for(pool, LOW, receipt, timeout=0.01) is None
    await pool.execute("update outbox.freshness set parked = array[outbox.key_hash($1, $2)]", TOPIC, str(LOW))
    with pytest.raises(WaitTimeout):
        await cache.wait_for(pool, LOW, receipt, timeout=0.01)


# ---------------------------------------------------------------------------------------------------- generations


async def spare(pool: Pool) -> int:
    """A table that is to take the cache's place, registered as a rebuild does."""
    await pool.execute(f"create table agents_spare (like {TABLE} including all)")
    await pool.execute(
        "insert into outbox.caches (cache, name, role, consumer, topic)"
        " values ('agents_spare', $1, 'spare', 'workflow', $2)",
        TABLE,
        TOPIC,
    )
    oid: int = await pool.fetchval("select 'agents_spare'::regclass::oid")
    return oid


async def test_a_spare_table_is_fed_by_the_same_batches(pool: Pool, engine: Engine) -> None:
    """Red when `Engine.apply` does not compare the tables that `advance` reports."""
    partition = await engine.claim(TOPIC, 0, 0)
    kafka = numbered([renamed(LOW, "before"), renamed(HIGH, "after")])
    await feed(engine, partition, kafka.records[:1])
    oid = await spare(pool)
    await feed(engine, partition, kafka.records[1:])
    assert await rows(pool) == {LOW: ("before", []), HIGH: ("after", [])}
    assert await rows(pool, "agents_spare") == {HIGH: ("after", [])}
    filling = await pages_of(pool, make_cache(), oid, "agents_spare")
    await whole(filling, page([(LOW, "before"), (HIGH, "older")], xmax=1002))
    assert await rows(pool, "agents_spare") == await rows(pool)


async def test_tables_that_swap_their_names_keep_what_belongs_to_them(pool: Pool, engine: Engine) -> None:
    """Red where tombstones are kept by name: the deletion is forgotten with the old table."""
    partition = await engine.claim(TOPIC, 0, 0)
    await spare(pool)
    kafka = numbered([renamed(LOW, "a"), AgentDeleted(agent_id=LOW)])
    await feed(engine, partition, kafka.records)
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("select pg_advisory_xact_lock(1868724274, hashtext($1))", TABLE)
        await connection.execute(
            f"alter table {TABLE} rename to agents_former; alter table agents_spare rename to {TABLE};"
            "update outbox.caches set role = case role when 'live' then 'spare' else 'live' end"
        )
    for oid, parker in ((None, TABLE), (await pool.fetchval("select 'agents_former'::regclass::oid"), "agents_former")):
        await whole(await pages_of(pool, make_cache(), oid, parker), page([(LOW, "late page")], xmax=1002))
        assert await rows(pool, parker) == {}
    kafka.put(renamed(HIGH, "b"), (2, 1))
    await feed(engine, partition, kafka.records[2:])
    assert await rows(pool) == await rows(pool, "agents_former") == {HIGH: ("b", [])}


async def test_a_table_that_is_made_anew_is_a_new_cache(pool: Pool, engine: Engine) -> None:
    await consume(engine, numbered([renamed(LOW, "a"), AgentDeleted(agent_id=LOW)]))
    await pool.execute(f"drop table {TABLE}")
    await create_table(pool)
    await engine.prepare()
    assert await pool.fetchval("select count(*) from outbox.tombstones") == 0
    assert await pool.fetchval("select array_agg(cache::text) from outbox.caches") == [TABLE]


async def test_states_of_a_partition_are_stored_by_its_owner_only(pool: Pool, engine: Engine) -> None:
    former = await engine.claim(TOPIC, 0, 0)
    owner_now = await engine.claim(TOPIC, 0, 0)
    await engine.set_state(former, "needs_rebuild")
    assert await engine.stored_state(TOPIC, 0) == "running"
    await engine.set_state(owner_now, "needs_rebuild")
    assert await engine.stored_state(TOPIC, 0) == "needs_rebuild"
    await pool.execute("update outbox.positions set state = 'restarting'")
    claimed = await engine.claim(TOPIC, 0, 0)
    await engine.restart(claimed, 7)
    assert (claimed.next_offset, claimed.state) == (7, "running")
    assert await engine.stored_state(TOPIC, 0) == "running"


def test_pages_are_crash_sites() -> None:
    names = {statement.name for statement in pages.SQL} | {statement.name for statement in merge.SQL}
    assert {"outbox.cache.pages.open", "outbox.cache.merge.merge_page"} <= names <= set(crash_sites.sites())
