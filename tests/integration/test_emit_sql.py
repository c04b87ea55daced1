"""`select outbox.emit(...)`: for SQL, triggers and other languages."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, Final

import asyncpg
import pytest
import pytest_asyncio

import outbox
from outbox import Event, Key, Pool
from outbox.upkeep import migrate
from tests.support.mutations import break_function

WAKE: Final = 1_868_724_273


class Noted(Event, topic="notes", type="note.made"):
    key: Key[Any]


@pytest_asyncio.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(database, min_size=1, max_size=3) as pool:
        await migrate.up(pool)
        yield pool


async def refusal(pool: Pool, call: str, *args: object) -> str:
    """The SQLSTATE of a call, after which the log is empty."""
    with pytest.raises(asyncpg.PostgresError) as error:
        await pool.execute(call, *args)
    assert await pool.fetchval("select count(*) from outbox.events") == 0
    state: str = error.value.sqlstate
    return state


async def test_named_arguments_and_the_position(any_database: str) -> None:
    async with asyncpg.create_pool(any_database, min_size=1, max_size=1) as pool:
        await migrate.up(pool)
        identifier = uuid.uuid4()
        position = await pool.fetchval(
            "select outbox.emit(key => 'k', topic => 'notes', type => 'note.made', payload => '{\"a\": 1}',"
            " headers => jsonb_build_object('traceparent', '00-1'), schema_version => 3, event_id => $1)",
            identifier,
        )
        second = await pool.fetchval("select outbox.emit('note.made', 'notes', 'k', '[null]')")
        first_row, second_row = await pool.fetch("select *, headers::text as h from outbox.events order by position")
        assert (first_row["position"], second_row["position"]) == (position, second)
        assert position < second
        assert first_row["event_id"] == identifier
        assert (first_row["schema_version"], second_row["schema_version"]) == (3, 1)
        assert json.loads(first_row["h"]) == {"traceparent": "00-1"}
        assert second_row["h"] is None
        assert json.loads(first_row["payload"]) == {"a": 1}
        assert second_row["event_id"].version == 7
        assert second_row["event_id"].variant == uuid.RFC_4122


async def test_its_ids_sort_by_time(any_database: str) -> None:
    async with asyncpg.create_pool(any_database, min_size=1, max_size=1) as pool:
        await migrate.up(pool)
        rows = await pool.fetch(
            "select outbox.uuid7() as id, (extract(epoch from clock_timestamp()) * 1000)::bigint as at"
            "  from generate_series(1, 50)"
        )
        assert len({row["id"] for row in rows}) == 50
        for row in rows:
            assert (row["id"].version, row["id"].variant) == (7, uuid.RFC_4122)
            assert abs((row["id"].int >> 80) - row["at"]) <= 1_000


NOT_HEADERS: Final = [
    *('{"a": 1}', '{"a": null}', '{"a": ["b"]}', '{"a": {"b": "c"}}', '["a"]', '"a"', "null"),
    *('{"ob-pos": "f/0/9/9/9/9"}', '{"ce_type": "x"}', '{"content-type": "x"}', '{"": "x"}'),
]


async def test_headers_are_text_to_text_and_none_of_ours(pool: Pool) -> None:
    """Consumers believe the last `ob-pos` of a record: a forged one would make them drop what follows."""
    call = "select outbox.emit('note.made', 'notes', 'k', '{}', $1::jsonb)"
    for headers in NOT_HEADERS:
        assert await refusal(pool, call, headers) == "OB011", headers
    await pool.execute(call, '{"traceparent": "x", "ceremony": "y"}')


async def test_a_forged_position_passes_without_the_rule(pool: Pool) -> None:
    """Seen red."""
    await break_function(pool, "emit", "h.name ~ '^(ce_|ob-)' or ")
    await pool.execute("select outbox.emit('note.made', 'notes', 'k', '{}', '{\"ob-pos\": \"x\"}')")


UNPUBLISHABLE: Final = [
    ("type => '', topic => 'notes', key => 'k', payload => '{}'", "23514"),
    ("type => 'x', topic => 'no topic', key => 'k', payload => '{}'", "23514"),
    ("type => 'x', topic => '..', key => 'k', payload => '{}'", "23514"),
    ("type => 'x', topic => 'notes', key => '', payload => '{}'", "23514"),
    ("type => 'x', topic => 'notes', key => repeat('é', 513), payload => '{}'", "23514"),
    ("type => 'x', topic => 'notes', key => null, payload => '{}'", "23502"),
    ("type => 'x', topic => null, key => 'k', payload => '{}'", "23502"),
    ("type => null, topic => 'notes', key => 'k', payload => '{}'", "23502"),
    ("type => 'x', topic => 'notes', key => 'k', payload => null", "23502"),
    ("type => 'x', topic => 'notes', key => 'k', payload => '{}', schema_version => 0", "23514"),
    ("type => 'x', topic => 'notes', key => 'k', payload => '{\"a\": \"\\u0000\"}'", "22P05"),
    ("type => 'x', topic => 'notes', key => 'k', payload => '{\"a\": NaN}'", "22P02"),
    ("type => 'x', topic => 'notes', key => 'k', payload => to_jsonb(repeat('x', 1000000))", "OB010"),
    ("type => 'x', topic => 'tight', key => 'k', payload => to_jsonb(repeat('x', 100))", "OB010"),
    (
        "type => 'x', topic => 'n', key => 'k', payload => '1', headers => jsonb_build_object('h', repeat('\"', 8192))",
        "23514",
    ),
]


async def test_what_cannot_be_published_cannot_commit(pool: Pool) -> None:
    await pool.execute("insert into outbox.topics (topic, partition_count, max_message_bytes) values ('tight', 1, 600)")
    for arguments, sqlstate in UNPUBLISHABLE:
        assert await refusal(pool, f"select outbox.emit({arguments})") == sqlstate, arguments


async def test_the_limit_is_exact_and_counts_bytes(pool: Pool) -> None:
    """Seen red without `outbox.fits`."""
    await pool.execute("insert into outbox.topics (topic, partition_count, max_message_bytes) values ('tight', 1, 600)")
    call = "select outbox.emit('x', 'tight', 'é', to_jsonb(repeat('é', $1)), '{\"h\": \"v\"}')"
    room = 600 - 512 - 2 - len('{"h": "v"}') - len('""')
    await pool.execute(call, room // 2)
    with pytest.raises(asyncpg.PostgresError, match="event for topic tight needs 602 bytes, the topic takes 600"):
        await pool.execute(call, room // 2 + 1)
    await break_function(pool, "fits", "size_bytes > coalesce(p_limit, 1000000)", "false")
    await pool.execute(call, room // 2 + 1)


async def test_it_commits_and_rolls_back_with_its_transaction(pool: Pool) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("select outbox.emit('x', 'notes', 'kept', '{}')")
        undone = connection.transaction()
        await undone.start()
        await connection.execute("select outbox.emit('x', 'notes', 'undone', '{}')")
        await undone.rollback()
        await connection.execute(
            "do $$ begin perform outbox.emit('x', 'notes', 'caught', '{}'); perform 1/0;"
            " exception when division_by_zero then null; end $$"
        )
    assert [row["key"] for row in await pool.fetch("select key from outbox.events")] == ["kept"]


@pytest.mark.parametrize("how", ["sql", "python"])
@pytest.mark.parametrize("relay", ["idle", "busy"])
async def test_it_wakes_an_idle_relay_and_no_other(pool: Pool, how: str, relay: str) -> None:
    """An idle relay holds the shard's advisory lock exclusively; a notification arrives with the commit.

    The listener's own notification is the fence: notifications arrive in the order of commits.
    """
    async with pool.acquire() as idle:
        heard: list[str] = []

        def hear(*message: object) -> None:
            heard.append(str(message[-1]))

        await idle.add_listener("outbox_wake", hear)
        if relay == "idle":
            await idle.execute("select pg_advisory_lock($1::int, 0)", WAKE)
        if how == "sql":
            await pool.execute("select outbox.emit('x', 'notes', 'k', '{}')")
        else:
            async with outbox.transaction(pool) as tx:
                tx.emit(Noted(key="k"))
        await idle.execute("notify outbox_wake, 'fence'")
        assert heard == (["0", "fence"] if relay == "idle" else ["fence"])
        await idle.remove_listener("outbox_wake", hear)


async def test_a_trigger_may_use_it(pool: Pool) -> None:
    await pool.execute(
        """
        create table accounts (id uuid primary key, name text);
        create function report() returns trigger language plpgsql as $$
        begin
            perform outbox.emit(type => 'account.' || lower(tg_op), topic => 'accounts', key => new.id::text,
                                payload => to_jsonb(new));
            return null;
        end $$;
        create trigger report after insert or update on accounts for each row execute function report();
        """
    )
    account = uuid.uuid4()
    async with outbox.transaction(pool) as tx:
        await tx.execute("insert into accounts values ($1, 'a')", account)
        await tx.execute("update accounts set name = 'b'")
        tx.emit(Noted(key="from python"))
    with pytest.raises(asyncpg.UniqueViolationError):
        await pool.execute("insert into accounts values ($1, 'again')", account)
    rows = await pool.fetch("select key, event_type, payload from outbox.events order by position")
    assert [(row["key"], row["event_type"]) for row in rows] == [
        (str(account), "account.insert"),
        (str(account), "account.update"),
        ("from python", "note.made"),
    ]
    assert json.loads(rows[1]["payload"]) == {"id": str(account), "name": "b"}


@pytest.mark.parametrize(
    ("value", "cast"),
    [
        (uuid.UUID("0190AAAA-0000-7000-8000-00000000000F"), "$1::uuid::text"),
        (-(2**63), "$1::bigint::text"),
        (42, "$1::int::text"),
        ("é 🙂'\"", "$1::text"),
    ],
)
async def test_a_key_is_the_same_text_in_sql_and_in_python(pool: Pool, value: object, cast: str) -> None:
    """And therefore in the same shard and partition."""
    await pool.execute("update outbox.logs set shard_count = 64")
    await pool.execute(f"select outbox.emit('x', 'notes', {cast}, '{{}}')", value)
    async with outbox.transaction(pool) as tx:
        tx.emit(Noted(key=value))
    rows = await pool.fetch("select distinct key, shard from outbox.events")
    assert [row["key"] for row in rows] == [str(value)]
