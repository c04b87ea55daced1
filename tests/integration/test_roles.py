"""Each role of roles.sql can do its work, and not the others'."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from urllib.parse import quote, urlsplit

import asyncpg
import pytest

import outbox
from outbox import Consumer, Event, Key, parking
from outbox.relay import Relay, restore
from outbox.upkeep import migrate, status
from tests.support.consumer_process import SETTINGS, create_table, vocabulary
from tests.support.faults import eventually

ROLES = resources.files("outbox").joinpath("roles.sql").read_text(encoding="utf-8")


@pytest.fixture
def logins(any_database: str) -> Iterator[dict[str, str]]:
    """A login for each role, by the role's name, as URLs."""
    password = uuid.uuid4().hex
    names = {role: f"{role}_{uuid.uuid4().hex[:8]}" for role in ("outbox_writer", "outbox_relay", "outbox_reader")}

    async def run(*statements: str) -> None:
        connection = await asyncpg.connect(any_database)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    async def prepare() -> None:
        connection = await asyncpg.connect(any_database)
        await migrate.up(connection)
        await connection.close()
        await run(ROLES, ROLES, *(f"create role {n} login password '{password}' in role {r}" for r, n in names.items()))

    asyncio.run(prepare())
    parts = urlsplit(any_database)
    yield {
        role: parts._replace(netloc=f"{quote(name)}:{password}@{parts.hostname}:{parts.port}").geturl()
        for role, name in names.items()
    }
    asyncio.run(run(*(f"drop owned by {role}; drop role {name}" for role, name in names.items())))


@pytest.fixture
async def writer(logins: dict[str, str]) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(logins["outbox_writer"])
    yield connection
    await connection.close()


@pytest.fixture
async def reader(logins: dict[str, str]) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(logins["outbox_reader"])
    yield connection
    await connection.close()


async def refused(connection: asyncpg.Connection, *statements: str) -> None:
    for statement in statements:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute(statement)


async def test_a_writer_emits_and_sees_no_payload(writer: asyncpg.Connection, topic: str) -> None:
    class Happened(Event, topic=topic, type="role.happened"):
        key: Key[str]

    await migrate.check(writer)
    async with outbox.transaction(writer) as tx:
        tx.emit(Happened(key="k"))
    assert tx.receipt
    await writer.execute("select outbox.emit('t', $1, 'k', '{}')", topic)
    await refused(
        writer,
        "select payload from outbox.events",
        "delete from outbox.events",
        "update outbox.shards set done_through = 1",
        "select * from outbox.parked_events",
        "drop table outbox.events",
    )


async def test_a_reader_looks_and_changes_nothing(reader: asyncpg.Connection) -> None:
    await migrate.check(reader)
    assert (await status.read(reader)).problems() == []
    assert await parking.keys(reader) == []
    await refused(reader, "select outbox.emit('t', 't', 'k', '{}')", "delete from outbox.parked_keys")


async def test_the_relay_role_relays_and_adopts(
    logins: dict[str, str], writer: asyncpg.Connection, reader: asyncpg.Connection, broker: str, topic: str
) -> None:
    await writer.execute("select outbox.emit('t', $1, 'k', '{}')", topic)
    async with asyncpg.create_pool(logins["outbox_relay"], min_size=1) as pool:
        async with Relay(pool, broker), asyncio.timeout(60):
            while (await status.read(reader)).lag_events:
                pass
        adoption = await restore.adopt(pool, broker)
        assert adoption.restamped == 0
        await refused(pool, "drop table outbox.events", "create table outbox.mine ()")
    assert (await status.read(reader)).log_id == adoption.log_id


async def test_a_consumer_feeds_a_cache_and_others_read_it(
    logins: dict[str, str], any_database: str, writer: asyncpg.Connection, broker: str, topic: str
) -> None:
    """With the role for consumers and rights on the table; a reader needs no more to know how fresh a row is."""
    words = vocabulary(topic)
    agent = uuid.uuid4()
    settings = SETTINGS.model_copy(update={"watermark_topic": f"{topic}-watermarks", "max_clock_skew_seconds": 0.0})
    async with asyncpg.create_pool(any_database, min_size=1) as pool:
        await create_table(pool)
        await pool.execute("grant select, insert, update, delete on agent_cache, effects, writes to outbox_relay")
        await pool.execute("grant usage on all sequences in schema public to outbox_relay")
        await pool.execute("grant select on agent_cache to outbox_reader")
    async with (
        asyncpg.create_pool(logins["outbox_relay"], min_size=1) as pool,
        asyncpg.create_pool(logins["outbox_reader"], min_size=1) as reading,
        Relay(pool, broker, settings=settings),
        Consumer(pool, broker, words.cache, words.inbox, settings=settings),
    ):
        async with outbox.transaction(writer) as tx:
            tx.emit(words.named(agent_id=agent, name="a"), words.noted(agent_id=uuid.uuid4(), note="waits"))
        assert await words.cache.wait_for(reading, agent, tx.receipt, timeout=30.0)

        async def is_fresh() -> bool:
            try:
                return await words.cache.get(reading, agent, fresh_within=60.0) is not None
            except outbox.Stale:
                return False

        await eventually(is_fresh, what="the row is known to be fresh")
        assert {found.state for found in (await status.read(reading)).positions} == {"running"}
        (waiting,) = await parking.keys(reading)
        assert await parking.retry(pool, [waiting]) == 1
        assert await parking.discard(pool, waiting) == 1
        assert await pool.fetchval("select outbox.rotate_inbox()") is False
        assert await pool.fetchval("select count(*) from effects") == 1
