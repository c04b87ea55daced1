"""A cache against its table: types, names, reading, waiting for one's own write."""

import asyncio
import enum
import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from math import isnan
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio
from pydantic import BaseModel

from outbox import Cache, CacheDeclarationError, Delete, Event, Key, Patch, Pool, Receipt, WaitTimeout, limits
from outbox.consumer.apply import Engine
from tests.support.caching import (
    LOG,
    NEWER_LOG,
    TABLE,
    TOPIC,
    AgentDeleted,
    AgentRenamed,
    AgentTagged,
    CachedAgent,
    Kafka,
    consume,
    create_table,
    make_cache,
    make_engine,
    numbered,
    parked,
)


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> Pool:
    await create_table(log_pool)
    return log_pool


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Nested(BaseModel):
    numbers: list[int]
    at: datetime


class Everything(BaseModel):
    id: int
    flag: bool
    small: float
    amount: Decimal
    label: str | None
    born: date
    seen: datetime
    span: timedelta
    raw: bytes
    mood: Mood
    words: list[str | None]
    grid: list[list[int]]
    ids: tuple[UUID, ...]
    nested: Nested
    anything: Any
    last_synced_at: datetime | None = None


class EverythingChanged(Event, topic="everything", type="everything.changed"):
    id: Key[int]
    which: int


class EverythingPatched(Event, topic="everything", type="everything.patched"):
    id: Key[int]
    which: int


def everything(which: int) -> dict[str, Any]:
    return {
        "flag": bool(which),
        "small": [1.5, float("nan"), float("-inf")][which],
        "amount": [Decimal("12345678901234567890.123456789"), Decimal("-0.1"), Decimal(0)][which],
        "label": ['quo"te \\ \n ü €', None, "null"][which],
        "born": date(2024, 2, 29),
        "seen": datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=UTC),
        "span": timedelta(days=which, seconds=1.5),
        "raw": bytes(range(256)) if which else b"",
        "mood": Mood.BAD if which else Mood.GOOD,
        "words": ["a,b", '{"', None, "NULL", ""][which:],
        "grid": [[1, 2], [3, 4]],
        "ids": (UUID(int=1), UUID(int=2))[which:],
        "nested": Nested(numbers=[which], at=datetime(2024, 1, 1, tzinfo=UTC)),
        "anything": ['"text"', {"a": [None, 1.5]}, None][which],
    }


async def with_everything(pool: Pool) -> Cache[Everything]:
    await pool.execute(
        """
        create type mood as enum ('good', 'bad');
        create table everything (
            id bigint primary key, flag boolean not null, small double precision not null, amount numeric not null,
            label text, born date not null, seen timestamptz not null, span interval not null, raw bytea not null,
            mood mood not null, words text[] not null, grid integer[] not null, ids uuid[] not null,
            nested jsonb not null, anything json, not_ours integer not null default 7,
            doubled bigint generated always as (id * 2) stored)"""
    )
    await pool.execute("select outbox.prepare_cache('everything')")
    cache = Cache(Everything, table="everything", key="id", topic="everything")

    @cache.on
    def changed(event: EverythingChanged) -> Everything:
        return Everything(id=event.id, **everything(event.which))

    @cache.on
    def patched(event: EverythingPatched) -> Patch:
        return Patch(event.id, **everything(event.which))

    return cache


def same(row: Everything | None, expected: Everything) -> bool:
    assert row is not None
    assert row.last_synced_at is not None
    got, wanted = (dict(model) | {"last_synced_at": None} for model in (row, expected))
    if isnan(expected.small):  # no NaN equals another
        assert isnan(row.small)
        got["small"] = wanted["small"] = 0.0
    return got == wanted


@pytest.mark.parametrize("codec", [False, True], ids=["plain", "with a JSON codec"])
@pytest.mark.parametrize("which", range(3))
async def test_every_type_of_column(database: str, log_pool: Pool, which: int, codec: bool) -> None:  # noqa: FBT001
    """What is read is what the handler made, by full row and by patch, also where the service's pool decodes JSON."""

    async def set_codec(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
        for name in ("json", "jsonb"):
            await connection.set_type_codec(name, schema="pg_catalog", encoder=json.dumps, decoder=json.loads)

    cache = await with_everything(log_pool)
    async with asyncpg.create_pool(database, min_size=1, max_size=3, init=set_codec if codec else None) as pool:
        engine = await make_engine(pool, cache)
        partition = await engine.claim("everything", 0, 0)
        log = Kafka()
        log.put(EverythingChanged(id=1, which=which), (1, 1))
        log.put(EverythingChanged(id=2, which=(which + 1) % 3), (1, 2))
        assert (await engine.apply(partition, log.records)).parked == 0
        log.put(EverythingPatched(id=2, which=which), (2, 1))
        assert (await engine.apply(partition, log.records[2:])).parked == 0
        for key in (1, 2):
            assert same(await cache.get(pool, key), Everything(id=key, **everything(which)))
        assert await pool.fetchval("select not_ours from everything where id = 1") == 7


class Odd(BaseModel):
    model_config = {"populate_by_name": True}
    Key_One: str
    select: str


class OddChanged(Event, topic="odd", type="odd.changed"):
    id: Key[str]


async def test_any_name_of_table_and_column(log_pool: Pool) -> None:
    """Identifiers are quoted; keys that look like SQL are values."""
    await log_pool.execute(
        'create schema "My ""schema"; create table "My ""schema"."order; drop table x" '
        '("Key_One" varchar(300) primary key, "select" text not null);'
        'select outbox.prepare_cache(\'"My ""schema"."order; drop table x"\')'
    )
    cache = Cache(Odd, table='My "schema.order; drop table x', key="Key_One", topic="odd")

    @cache.on
    def changed(event: OddChanged) -> Odd:
        return Odd(Key_One=event.id, select="it's")

    engine = await make_engine(log_pool, cache)
    partition = await engine.claim("odd", 0, 0)
    log = Kafka()
    keys = ["'; drop table x; --", '"', "\\", "{table}", "ä€", "a b"]
    for number, key in enumerate(keys, start=1):
        log.put(OddChanged(id=key), (1, number))
    assert (await engine.apply(partition, log.records)).parked == 0
    assert {row.Key_One for row in await cache.get_many(log_pool, keys)} == set(keys)


async def test_get_and_get_many(pool: Pool) -> None:
    cache = make_cache()
    a, b, missing = uuid4(), uuid4(), uuid4()
    await consume(
        await make_engine(pool, cache), numbered([AgentRenamed(agent_id=key, agent_name=str(key)) for key in (a, b)])
    )
    assert await cache.get(pool, a) == CachedAgent(agent_id=a, agent_name=str(a))
    assert await cache.get(pool, str(a)) == await cache.get(pool, a)
    assert await cache.get(pool, missing) is None
    found = await cache.get_many(pool, [a, b, missing, str(a)])
    assert {row.agent_id for row in found} == {a, b}
    assert await cache.get_many(pool, []) == []
    async with pool.acquire() as connection:
        assert await cache.get(connection, a) is not None
    with pytest.raises(ValueError, match="at most"):
        await cache.get_many(pool, [UUID(int=n) for n in range(limits.GET_MANY_MAX_KEYS + 1)])
    with pytest.raises(ValueError, match="UUID"):
        await cache.get(pool, "no uuid")


def receipt(key: UUID, position: int, log_id: str = LOG) -> Receipt:
    made = Receipt.of(
        [{"topic": TOPIC, "key": str(key), "position": position, "log_id": log_id, "transaction_id": "1"}]
    )
    assert isinstance(made, Receipt)
    return made


async def test_wait_for_returns_once_the_row_has_seen_it(pool: Pool) -> None:
    cache = make_cache()
    engine = await make_engine(pool, cache)
    agent = uuid4()
    waiting = asyncio.create_task(cache.wait_for(pool, agent, receipt(agent, 1002), timeout=20))
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name="a"), AgentRenamed(agent_id=agent, agent_name="b")])
    partition = await engine.claim(TOPIC, 0, 0)
    await engine.apply(partition, kafka.records[:1])
    with pytest.raises(WaitTimeout, match=f"key {agent} did not show position 1002 of log {LOG} in 0.0 s"):
        await cache.wait_for(pool, agent, str(receipt(agent, 1002)), timeout=timedelta(0))
    assert not waiting.done()
    await engine.apply(partition, kafka.records[1:])
    assert await waiting == CachedAgent(agent_id=agent, agent_name="b")


async def test_wait_for_does_not_wait_in_a_transaction_that_keeps_its_snapshot(pool: Pool) -> None:
    """It would see nothing new however long it waited."""
    cache = make_cache()
    agent = UUID(int=1)
    await consume(await make_engine(pool, cache), numbered([AgentRenamed(agent_id=agent, agent_name="a")]))
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
        assert await cache.wait_for(connection, agent, receipt(agent, 1001), timeout=3_600) is not None
        with pytest.raises(WaitTimeout, match="give wait_for the pool"):
            await cache.wait_for(connection, agent, receipt(agent, 1002), timeout=3_600)


async def test_wait_for_a_deletion(pool: Pool) -> None:
    cache = make_cache()
    agent = uuid4()
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name="a"), AgentDeleted(agent_id=agent)])
    await consume(await make_engine(pool, cache), kafka)
    assert await cache.wait_for(pool, agent, receipt(agent, 1001), timeout=0) is None
    assert await cache.wait_for(pool, agent, receipt(agent, 1002), timeout=0) is None
    with pytest.raises(WaitTimeout):
        await cache.wait_for(pool, agent, receipt(agent, 1003), timeout=0)


async def test_wait_for_compares_within_one_log_and_lets_a_newer_one_win(pool: Pool) -> None:
    cache = make_cache()
    agent = uuid4()
    kafka = Kafka()
    kafka.put(AgentRenamed(agent_id=agent, agent_name="new log"), (1, 1), log_id=NEWER_LOG)
    await consume(await make_engine(pool, cache), kafka)
    assert await cache.wait_for(pool, agent, receipt(agent, 999_999), timeout=0) is not None
    with pytest.raises(WaitTimeout):
        await cache.wait_for(pool, agent, receipt(agent, 1002, NEWER_LOG), timeout=0)
    with pytest.raises(WaitTimeout):
        await cache.wait_for(pool, agent, receipt(agent, 1, "18c2a3b4d60-0001"), timeout=0)


async def test_a_receipt_without_the_key_returns_the_row_as_it_is(pool: Pool) -> None:
    assert await make_cache().wait_for(pool, uuid4(), receipt(uuid4(), 1), timeout=0) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("drop table {t}", "no such table"),
        ("alter table {t} drop column outbox_log", "outbox.prepare_cache"),
        ("alter table {t} drop column tags", "column tags is missing"),
        ("alter table {t} drop constraint {t}_pkey", "unique index of its own"),
        ("alter table {t} alter column agent_id type text, alter column agent_name type integer using 1", "agent_name"),
        ("alter table {t} alter column tags drop default, alter column tags type jsonb using '[]'", None),
        ("alter table {t} alter column agent_id type text", None),
        ("alter table {t} alter column agent_id type inet using '::1'", "inet"),
        ("alter table {t} add column more integer not null", "column more is not null without a default"),
        ("alter table {t} drop column tags, add column tags text[] generated always as ('{{}}') stored", "generated"),
    ],
)
async def test_a_table_that_does_not_fit(pool: Pool, change: str, says: str | None) -> None:
    await pool.execute(f"alter table {TABLE} drop constraint {TABLE}_agent_name_check")
    await pool.execute(change.format(t=TABLE))
    cache = make_cache()
    if says is None:
        agent = uuid4()
        await consume(await make_engine(pool, cache), numbered([AgentRenamed(agent_id=agent, agent_name="a")]))
        assert await cache.get(pool, agent) is not None
        return
    with pytest.raises(CacheDeclarationError, match=says):
        await make_engine(pool, cache)
    with pytest.raises(CacheDeclarationError, match=says):
        await cache.get(pool, uuid4())


async def test_unprepare_takes_prepare_back(pool: Pool) -> None:
    await pool.execute("select outbox.unprepare_cache($1::text::regclass)", TABLE)
    columns = await pool.fetch("select column_name from information_schema.columns where table_name = $1", TABLE)
    assert {row[0] for row in columns} == {"agent_id", "agent_name", "tags", "last_synced_at"}
    await pool.execute("select outbox.prepare_cache($1::text::regclass)", TABLE)
    assert isinstance(await make_engine(pool, make_cache()), Engine)


async def test_a_row_without_a_json_form_is_its_own_keys_fault(pool: Pool) -> None:
    class Loose(BaseModel):
        agent_id: UUID
        agent_name: str
        tags: Any

    cache = Cache(Loose, table=TABLE, key="agent_id", topic=TOPIC)

    @cache.on
    def renamed(event: AgentRenamed) -> Loose:
        return Loose(agent_id=event.agent_id, agent_name="a", tags=object() if event.agent_name == "odd" else ["t"])

    @cache.on
    def deleted(event: AgentDeleted) -> Delete:
        return Delete.DELETE

    @cache.on
    def tagged(event: AgentTagged) -> Patch:
        return Patch(event.agent_id, tags=object())

    fine, odd, patched = uuid4(), uuid4(), uuid4()
    kafka = numbered(
        [
            AgentRenamed(agent_id=fine, agent_name="fine"),
            AgentRenamed(agent_id=odd, agent_name="odd"),
            AgentRenamed(agent_id=patched, agent_name="fine"),
            AgentTagged(agent_id=patched, tags=[]),
        ]
    )
    await consume(await make_engine(pool, cache), kafka)
    assert {row["agent_id"] for row in await pool.fetch(f"select agent_id from {TABLE}")} == {fine, patched}
    assert await parked(pool) == {str(odd): ["agent.renamed"], str(patched): ["agent.tagged"]}
