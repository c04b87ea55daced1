"""The memory in front of a cache's table: what it may remember and what makes it forget, by real LISTEN and NOTIFY."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio
from pydantic import BaseModel

from outbox import Cache, CacheDeclarationError, Event, Key, Pool, Receipt, clock, crash_sites, limits
from outbox.cache import memory
from outbox.cache.memory import CHANNEL, Memory, Read, Remembered
from outbox.consumer.apply import Engine
from tests.support.caching import (
    LOG,
    TABLE,
    TOPIC,
    AgentDeleted,
    AgentRenamed,
    CachedAgent,
    create_table,
    feed,
    make_cache,
    make_engine,
    numbered,
)
from tests.support.faults import eventually
from tests.support.handmade import page, pages_of
from tests.support.mutations import broken_statement

LOW, HIGH = UUID(int=1 << 120), UUID(int=2 << 120)
READ = "outbox.cache.read.many"


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> AsyncIterator[Pool]:
    await create_table(log_pool)
    yield log_pool
    crash_sites.hook = None


@pytest.fixture
def cache() -> Cache[CachedAgent]:
    return make_cache(memory_max_rows=100)


@pytest_asyncio.fixture
async def engine(pool: Pool, cache: Cache[CachedAgent]) -> Engine:
    return await make_engine(pool, cache)


def renamed(agent: UUID, name: str) -> AgentRenamed:
    return AgentRenamed(agent_id=agent, agent_name=name)


async def listening(held: Memory[Any]) -> None:
    async def look() -> bool:
        return held.listening

    await eventually(look, what="the memory listens")


@asynccontextmanager
async def remembering(pool: Pool, cache: Cache[Any]) -> AsyncIterator[Memory[Any]]:
    async with cache.memory(pool) as held:
        await listening(held)
        yield held


async def name_of(cache: Cache[CachedAgent], pool: Pool, agent: UUID = LOW) -> str | None:
    row = await cache.get(pool, agent)
    return None if row is None else row.agent_name


async def named(cache: Cache[CachedAgent], pool: Pool, name: str | None, agent: UUID = LOW) -> None:
    """Wait until the cache answers this name."""

    async def look() -> bool:
        return await name_of(cache, pool, agent) == name

    await eventually(look, what=f"{agent} is {name}")


class Follower:
    """What anybody hears on the channel."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []

    def __call__(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self.heard.append(json.loads(str(payload)))

    async def all(self, pool: Pool) -> list[dict[str, Any]]:
        """All that was sent until now."""
        await pool.execute("select pg_notify($1, $2)", CHANNEL, '{"table": -1}')

        async def look() -> bool:
            return {"table": -1} in self.heard

        await eventually(look, what="the last notification")
        heard, self.heard = [said for said in self.heard if said["table"] != -1], []
        return heard


@asynccontextmanager
async def following(pool: Pool) -> AsyncIterator[Follower]:
    follower = Follower()
    async with pool.acquire() as connection:
        await connection.add_listener(CHANNEL, follower)
        try:
            yield follower
        finally:
            await connection.remove_listener(CHANNEL, follower)


class Queries:
    """Counts, and may hold up, the queries of memory; `hold` makes them wait after PostgreSQL has answered."""

    def __init__(self) -> None:
        self.count = 0
        self.answered = asyncio.Event()
        self.hold: asyncio.Event | None = None

    async def __call__(self, site: str, side: str) -> None:
        if site != READ:
            return
        if side == "before":
            self.count += 1
        elif self.hold is not None:
            self.answered.set()
            await self.hold.wait()


@pytest.fixture
def queries(pool: Pool) -> Queries:
    crash_sites.hook = made = Queries()
    return made


# -------------------------------------------------------------------------------------------------------- answering


async def test_a_row_is_read_once_and_then_remembered(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, queries: Queries
) -> None:
    partition = await engine.claim(TOPIC, 0, 0)
    await feed(engine, partition, numbered([renamed(LOW, "a"), renamed(HIGH, "b")]).records)
    async with remembering(pool, cache) as held:
        assert [await name_of(cache, pool) for _ in range(3)] == ["a"] * 3
        assert {row.agent_name for row in await cache.get_many(pool, [LOW, HIGH])} == {"a", "b"}
        assert {row.agent_name for row in await cache.get_many(pool, [LOW, HIGH])} == {"a", "b"}
        assert (queries.count, held.hits, held.misses, len(held)) == (2, 5, 2, 2)
        async with pool.acquire() as connection:
            assert await cache.get(connection, LOW) is not None
        assert held.hits == 5, "a connection may be in a transaction with a snapshot of its own"
    assert await name_of(cache, pool) == "a"
    assert queries.count == 2


async def test_what_a_caller_does_to_its_row_stays_with_the_caller(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine
) -> None:
    """Red where the remembered model itself is handed out."""
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(LOW, "a")]).records)
    async with remembering(pool, cache):
        for _ in range(2):
            row = await cache.get(pool, LOW)
            assert row == CachedAgent(agent_id=LOW, agent_name="a")
            row.agent_name = "mine"
            row.tags.append("mine")


async def test_no_more_rows_than_declared_and_the_least_used_leaves_first(pool: Pool, queries: Queries) -> None:
    """Red without the bound in `Remembered.end`, or without `move_to_end` in `look`."""
    cache = make_cache(memory_max_rows=2)
    engine = await make_engine(pool, cache)
    agents = [UUID(int=n) for n in (1, 2, 3)]
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(agent, "a") for agent in agents]).records)
    async with remembering(pool, cache) as held:
        for agent in (agents[0], agents[1], agents[0], agents[2]):
            await cache.get(pool, agent)
        assert len(held) == 2
        await cache.get(pool, agents[0])
        assert queries.count == 3, "the second one left"
        await cache.get_many(pool, agents)
        assert len(held) == 2


async def test_concurrent_readers_of_a_key_share_one_query(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, queries: Queries
) -> None:
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(LOW, "a")]).records)
    async with remembering(pool, cache):
        queries.hold = asyncio.Event()
        readers = [asyncio.create_task(name_of(cache, pool)) for _ in range(5)]
        await queries.answered.wait()
        readers[0].cancel()
        queries.hold.set()
        assert await asyncio.gather(*readers[1:]) == ["a"] * 4
        assert queries.count == 1


async def test_a_failed_query_is_everybodys_and_leaves_nothing(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine
) -> None:
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(LOW, "a")]).records)
    async with remembering(pool, cache) as held:

        async def fail(site: str, side: str) -> None:
            if (site, side) == (READ, "after"):
                raise ConnectionResetError

        crash_sites.hook = fail
        with pytest.raises(ConnectionResetError):
            await cache.get(pool, LOW)
        crash_sites.hook = None
        assert (len(held), held._remembered._reading, held._shared) == (0, {}, {})
        assert await name_of(cache, pool) == "a"


# -------------------------------------------------------------------------------------------------------- forgetting


async def test_a_batch_makes_forget_what_it_changed_and_nothing_else(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, queries: Queries
) -> None:
    """Red without `Target.tell` in `Work.run`; without keys in the notification, HIGH is read again."""
    partition = await engine.claim(TOPIC, 0, 0)
    kafka = numbered([renamed(LOW, "a"), renamed(HIGH, "b")])
    await feed(engine, partition, kafka.records)
    async with remembering(pool, cache):
        assert (await name_of(cache, pool), await name_of(cache, pool, HIGH)) == ("a", "b")
        kafka.put(renamed(LOW, "changed"), (2, 1))
        await feed(engine, partition, kafka.records[2:])
        await named(cache, pool, "changed")
        kafka.put(AgentDeleted(agent_id=LOW), (3, 1))
        await feed(engine, partition, kafka.records[3:])
        await named(cache, pool, None)
        before = queries.count
        assert await name_of(cache, pool, HIGH) == "b"
        assert queries.count == before


async def test_one_notification_a_batch_and_none_without_memory(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine
) -> None:
    """Red where `Target._is_remembered` is always true, also for a spare table, or where each row notifies."""
    partition = await engine.claim(TOPIC, 0, 0)
    oid = await pool.fetchval("select $1::text::regclass::oid", TABLE)
    async with following(pool) as follower:
        kafka = numbered([renamed(LOW, "a"), renamed(HIGH, "b"), renamed(LOW, "c")])
        await feed(engine, partition, kafka.records)
        (heard,) = await follower.all(pool)
        assert (heard["table"], set(heard["keys"])) == (oid, {str(LOW), str(HIGH)})
        await feed(engine, partition, kafka.records)
        assert await follower.all(pool) == [], "duplicates change nothing"
        kafka.put(renamed(LOW, "forbidden"), (2, 1))
        kafka.put(renamed(HIGH, "d"), (2, 2))
        await feed(engine, partition, kafka.records[3:])
        assert len(await follower.all(pool)) == 1, "also where the batch is bisected"
        await pool.execute(
            f"create table agents_spare (like {TABLE} including all);"
            "insert into outbox.caches (cache, name, role, consumer, topic, notifies)"
            " select 'agents_spare', name, 'spare', consumer, topic, notifies from outbox.caches"
        )
        kafka.put(renamed(LOW, "into both tables"), (3, 1))
        await feed(engine, partition, kafka.records[5:])
        assert [said["table"] for said in await follower.all(pool)] == [oid], "nobody remembers rows of the spare one"
        await pool.execute("drop table agents_spare")
        plain = await make_engine(pool, make_cache(), name="plain")
        await feed(plain, await plain.claim(TOPIC, 1, 0), numbered([renamed(uuid4(), "e")], window=9).records)
        assert await follower.all(pool) == []


@pytest.mark.parametrize("agents", [1, 150, 210, 400])
async def test_more_keys_than_fit_are_every_key(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, agents: int
) -> None:
    """Red without the bound in `notify`: PostgreSQL refuses the payload, and with it the batch."""
    async with following(pool) as follower:
        events = [renamed(UUID(int=n), "a") for n in range(agents)]
        await feed(engine, await engine.claim(TOPIC, 0, 0), numbered(events).records)
        (heard,) = await follower.all(pool)
        assert len(heard.get("keys", [])) == (agents if agents < 200 else 0)


async def test_the_bound_is_of_bytes(pool: Pool) -> None:
    """Red where characters are counted: three bytes each."""
    async with following(pool) as follower, pool.acquire() as connection:
        await memory.notify(connection, 7, ["\u20ac" * 300] * 10)
        await memory.notify(connection, 7, ["\u20ac" * 300] * 8)
        assert [len(said.get("keys", [])) for said in await follower.all(pool)] == [0, 8]


async def test_a_parked_event_that_is_applied_later_makes_forget(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine
) -> None:
    """Red without `Target.tell` in `replay`."""
    partition = await engine.claim(TOPIC, 0, 0)
    await feed(engine, partition, numbered([renamed(LOW, "a"), renamed(LOW, "forbidden")]).records)
    await pool.execute(f"alter table {TABLE} drop constraint {TABLE}_agent_name_check")
    async with remembering(pool, cache):
        before = await name_of(cache, pool)
        await pool.execute("update outbox.parked_keys set retry_at = clock_timestamp()")
        await engine.retry(partition)
        await named(cache, pool, "forbidden")
        assert before != "forbidden"


async def test_a_page_of_the_owner_makes_forget(pool: Pool, cache: Cache[CachedAgent], engine: Engine) -> None:
    """Red without `memory.notify` in `Pages`; a page that changes nothing says nothing."""
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(LOW, "a"), renamed(HIGH, "b")]).records)
    owner = await pages_of(pool, cache)
    async with following(pool) as follower, remembering(pool, cache):
        assert (await name_of(cache, pool), await name_of(cache, pool, HIGH)) == ("a", "b")
        await owner.merge(page([(LOW, "page")], xmax=5000), after=None, through=None)
        await named(cache, pool, "page")
        await named(cache, pool, None, HIGH)
        await owner.merge_keys(page([(HIGH, "single")], xmax=6000), [HIGH])
        await named(cache, pool, "single", HIGH)
        assert [said.get("keys") for said in await follower.all(pool)] == [None, [str(HIGH)]]
        await owner.merge_keys(page([], xmax=6001), [uuid4()])
        assert await follower.all(pool) == []


@pytest.mark.parametrize("many", [False, True])
async def test_an_old_row_whose_change_is_heard_of_first_is_not_remembered(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, queries: Queries, *, many: bool
) -> None:
    """Red when `Remembered.forget` leaves what is registered in `_reading`: the old row is remembered."""
    partition = await engine.claim(TOPIC, 0, 0)
    kafka = numbered([renamed(LOW, "old")])
    await feed(engine, partition, kafka.records)

    async def read() -> list[CachedAgent]:
        row = await cache.get(pool, LOW)
        return [row] if row else []

    async with remembering(pool, cache) as held:
        queries.hold = asyncio.Event()
        reading = asyncio.create_task(cache.get_many(pool, [LOW]) if many else read())
        await queries.answered.wait()
        kafka.put(renamed(LOW, "new"), (2, 1))
        await feed(engine, partition, kafka.records[1:])

        async def heard() -> bool:
            return not held._remembered._reading

        await eventually(heard, what="the change is heard of while the old row is on its way")
        hold, queries.hold = queries.hold, None
        async with asyncio.timeout(10):
            assert await name_of(cache, pool) == "new", "whoever asks now does not join the old query"
        hold.set()
        assert [row.agent_name for row in await reading] == ["old"]
        assert await name_of(cache, pool) == "new"


async def test_what_wait_for_returned_is_not_taken_back(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red without `_forget` in `wait_for`: the notification is still on its way, and `get` goes back in time."""
    partition = await engine.claim(TOPIC, 0, 0)
    kafka = numbered([renamed(LOW, "old"), renamed(LOW, "mine")])
    await feed(engine, partition, kafka.records[:1])
    receipt = Receipt.of([{"topic": TOPIC, "key": str(LOW), "position": 1002, "log_id": LOG, "transaction_id": 1002}])
    assert isinstance(receipt, Receipt)
    async with remembering(pool, cache) as held:
        assert await name_of(cache, pool) == "old"
        monkeypatch.setattr(held, "_clear", lambda: None)
        held._oid = -1  # deaf
        await feed(engine, partition, kafka.records[1:])
        assert await name_of(cache, pool) == "old"
        row = await cache.wait_for(pool, LOW, receipt, timeout=5)
        assert row is not None
        assert (row.agent_name, await name_of(cache, pool)) == ("mine", "mine")


async def test_absence_and_rows_have_their_time(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red without `until` in `Remembered.look`. Time counts from the beginning of the read."""
    now = 1000.0
    monkeypatch.setattr(clock, "monotonic", lambda: now)
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(LOW, "a")]).records)
    async with remembering(pool, cache):
        assert (await name_of(cache, pool), await name_of(cache, pool, HIGH)) == ("a", None)
        await pool.execute(f"update {TABLE} set agent_name = 'unheard'")  # by hand: nobody notifies
        await pool.execute(f"insert into {TABLE} (agent_id, agent_name, tags) values ($1, 'unheard', '{{}}')", HIGH)
        now += limits.MEMORY_ABSENT_SECONDS - 0.01
        assert (await name_of(cache, pool), await name_of(cache, pool, HIGH)) == ("a", None)
        now += 0.02
        assert (await name_of(cache, pool), await name_of(cache, pool, HIGH)) == ("a", "unheard")
        now = 1000.0 + limits.MEMORY_ROW_SECONDS
        assert await name_of(cache, pool) == "unheard"


# --------------------------------------------------------------------------------------------------------- listening


LISTENERS = "select pid from pg_stat_activity where datname = current_database() and query ~ 'pg_listening_channels'"


async def test_a_lost_connection_forgets_everything_and_listens_again(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Red when neither `_on_lost` nor the end of `_follow` bypasses: a change that nobody heard of stays unseen."""
    partition = await engine.claim(TOPIC, 0, 0)
    kafka = numbered([renamed(LOW, "a"), renamed(LOW, "changed unheard")])
    await feed(engine, partition, kafka.records[:1])
    async with remembering(pool, cache) as held:
        assert await name_of(cache, pool) == "a"
        assert len(held) == 1
        lost = asyncio.Event()
        bypass = held._bypass

        def noted() -> None:
            bypass()
            lost.set()

        held._bypass = noted  # type: ignore[method-assign]
        for record in await pool.fetch(LISTENERS + " and pid <> pg_backend_pid()"):
            await pool.execute("select pg_terminate_backend($1)", record["pid"])
        await lost.wait()
        assert len(held) == 0
        await feed(engine, partition, kafka.records[1:])
        assert await name_of(cache, pool) == "changed unheard"
        await listening(held)
        assert "is read from its table" in caplog.text
        await name_of(cache, pool)
        assert len(held) == 1
        kafka.put(renamed(LOW, "heard"), (2, 1))
        await feed(engine, partition, kafka.records[2:])
        await named(cache, pool, "heard")


async def test_a_read_under_way_when_the_connection_is_lost_is_not_remembered(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, queries: Queries
) -> None:
    """Red when `Remembered.clear` leaves what is registered: the change may have been missed."""
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(LOW, "a")]).records)
    async with remembering(pool, cache) as held:
        queries.hold = asyncio.Event()
        reading = asyncio.create_task(name_of(cache, pool))
        await queries.answered.wait()
        held._on_lost(None)
        queries.hold.set()
        assert await reading == "a"
        assert len(held) == 0


async def test_a_connection_that_is_dead_without_a_sign_is_found_out(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red without a bound for the answer in `_check`."""
    monkeypatch.setattr(limits, "MEMORY_CHECK_SECONDS", 0.2)
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(LOW, "a")]).records)
    async with remembering(pool, cache) as held:
        hung = asyncio.Event()

        async def hang(site: str, side: str) -> None:
            if (site, side) == ("outbox.cache.memory.look", "after") and not hung.is_set():
                hung.set()
                await asyncio.Event().wait()

        crash_sites.hook = hang
        await hung.wait()

        async def bypassed() -> bool:
            return not held.listening

        await eventually(bypassed, what="the table is read")
        await listening(held)


async def test_a_swap_of_generations_forgets_everything(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red without the trigger `caches_tell_of_swap`; the next look would find out, and does not come here."""
    monkeypatch.setattr(limits, "MEMORY_CHECK_SECONDS", 100.0)
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(LOW, "former")]).records)
    await pool.execute(
        f"create table agents_spare (like {TABLE} including all);"
        "insert into outbox.caches (cache, name, role, consumer, topic, notifies)"
        f" select 'agents_spare', name, 'spare', consumer, topic, notifies from outbox.caches;"
        f"insert into agents_spare (agent_id, agent_name, tags) select agent_id, 'rebuilt', tags from {TABLE}"
    )
    async with remembering(pool, cache) as held:
        assert await name_of(cache, pool) == "former"
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute(
                f"alter table {TABLE} rename to agents_former; alter table agents_spare rename to {TABLE};"
                "update outbox.caches set role = case role when 'live' then 'spare' else 'live' end"
            )
        await named(cache, pool, "rebuilt")
        await listening(held)
        assert held._oid == await pool.fetchval("select $1::text::regclass::oid", TABLE)
        await pool.execute(f"update {TABLE} set agent_name = 'after'")
        async with pool.acquire() as connection:
            await memory.notify(connection, held._oid, [str(LOW)])
        await named(cache, pool, "after")


async def test_a_swap_during_the_look_is_looked_at_again(pool: Pool, cache: Cache[CachedAgent], engine: Engine) -> None:
    """Red without `_swaps`: the memory would go on with the table of before the swap."""
    async with remembering(pool, cache) as held:
        before_looks: list[bool] = []

        async def swap(site: str, side: str) -> None:
            if site != "outbox.cache.memory.look":
                return
            if side == "before":
                before_looks.append(held.listening)
            elif len(before_looks) == 1:
                held._on_notification(None, 0, CHANNEL, '{"table": 1, "role": "spare"}')

        crash_sites.hook = swap
        held._wake.set()

        async def looked() -> bool:
            return len(before_looks) >= 2

        await eventually(looked, what="a second look")
        await listening(held)
        assert before_looks[:2] == [True, False]


async def test_nothing_is_remembered_while_no_consumer_notifies(
    pool: Pool, cache: Cache[CachedAgent], caplog: pytest.LogCaptureFixture
) -> None:
    """Red without `notifies` in `_problem`: a consumer of before the declaration would change rows unheard."""
    former = await make_engine(pool, make_cache())
    kafka = numbered([renamed(LOW, "a"), renamed(LOW, "b")])
    partition = await former.claim(TOPIC, 0, 0)
    await feed(former, partition, kafka.records[:1])
    async with cache.memory(pool) as held:

        async def told() -> bool:
            return "no consumer notifies" in caplog.text

        await eventually(told, what="a word about it")
        assert await name_of(cache, pool) == "a"
        await feed(former, partition, kafka.records[1:])
        assert (await name_of(cache, pool), len(held)) == ("b", 0)
        await make_engine(pool, cache)
        held._wake.set()
        await listening(held)


async def test_nothing_is_remembered_behind_a_pooler(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """A pooler tells its clients process ids of its own making."""
    with broken_statement(memory.SQL, "look", "pg_backend_pid()", "pg_backend_pid() + 1"):
        async with cache.memory(pool) as held:

            async def told() -> bool:
                return "a pooler stands between" in caplog.text

            await eventually(told, what="a word about it")
            assert not held.listening


async def test_a_service_starts_and_ends_without_its_database(cache: Cache[CachedAgent], database: str) -> None:
    async with asyncpg.create_pool(database, min_size=0) as pool:

        async def refuse(site: str, side: str) -> None:
            raise ConnectionRefusedError

        crash_sites.hook = refuse
        try:
            async with cache.memory(pool) as held:
                assert not held.listening
        finally:
            crash_sites.hook = None


async def test_a_notification_of_others_is_taken_for_the_worst(
    pool: Pool, cache: Cache[CachedAgent], engine: Engine
) -> None:
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed(LOW, "a")]).records)
    async with remembering(pool, cache) as held:
        for payload in ("", "null", "[]", "hello", '{"keys": []}'):
            await name_of(cache, pool)
            assert len(held) == 1
            held._on_notification(None, 0, CHANNEL, payload)
            assert (len(held), held.listening) == (0, True)


# -------------------------------------------------------------------------------------------------------- declaring


async def test_memory_has_to_be_declared_and_entered_once(pool: Pool, cache: Cache[CachedAgent]) -> None:
    with pytest.raises(CacheDeclarationError, match="memory_max_rows"):
        async with make_cache().memory(pool):
            pass
    async with cache.memory(pool):
        with pytest.raises(CacheDeclarationError, match="already"):
            async with cache.memory(pool):
                pass
    async with cache.memory(pool):
        pass
    for bound in (0, limits.MEMORY_MAX_ROWS + 1):
        with pytest.raises(CacheDeclarationError, match="use 1 to"):
            make_cache(memory_max_rows=bound)


class WordChanged(Event, topic="words", type="word.changed"):
    word: Key[str]


class CachedWord(BaseModel):
    word: str


async def test_keys_that_are_equal_without_being_the_same_text(log_pool: Pool) -> None:
    """Red without `key_is_exact`: the row of `a` is remembered as `a  `, and its change heard of as `a`."""
    await log_pool.execute("create table words (word char(5) primary key); select outbox.prepare_cache('words')")
    cache = Cache(CachedWord, table="words", key="word", topic="words", memory_max_rows=10)
    with pytest.raises(CacheDeclarationError, match="deterministic collation"):
        async with cache.memory(log_pool):
            pass


# ------------------------------------------------------------------------------------------------- any interleaving


@pytest.mark.parametrize("seed", range(20))
def test_no_interleaving_remembers_what_has_changed(seed: int) -> None:
    """A table of versions, reads in two halves, changes heard of late but in order; the memory's share is pure."""
    random = Random(seed)
    table = {"a": 0, "b": 0}
    held: Any = Remembered(2)
    heard: list[str] = []
    under_way: list[tuple[Read, list[str], dict[str, int]]] = []
    pending: list[str] = []
    for _ in range(3_000):
        match random.randrange(4):
            case 0:  # a commit, whose notification is on its way
                key = random.choice("ab")
                table[key] += 1
                pending.append(key)
            case 1:  # a read begins, and its query takes its snapshot at once or later
                keys = random.sample("ab", random.randint(1, 2))
                under_way.append((held.begin(keys), keys, {key: table[key] for key in keys}))
            case 2 if under_way:
                held.end(*under_way.pop(random.randrange(len(under_way))))
            case 3 if pending:
                heard.append(pending.pop(0))
                held.forget([heard[-1]])
        if not pending:
            for key, version in table.items():
                assert held.look(key) in {version, memory._UNKNOWN}
