"""H10, H17, H22: what a writer can do to the log, on real PostgreSQL.

The business rows are the witness: a row is inserted beside each event, and after the commit the log holds exactly the
events whose rows are there.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Final

import asyncpg
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

import outbox
from outbox import Connection, Event, Key, Pool, Transaction, postgres
from outbox.upkeep import migrate
from tests.support.faults import eventually
from tests.support.mutations import broken_statement

SQL: Final = sys.modules["outbox.transaction"].SQL


class Noted(Event, topic="notes", type="note.made"):
    key: Key[str]
    identity: str


EMITTED: Final = (
    "select convert_from(payload, 'UTF8')::jsonb ->> 'identity' as identity from outbox.events order by position"
)


@pytest_asyncio.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(database, min_size=1, max_size=4) as pool:
        await migrate.up(pool)
        await pool.execute("create table notes (nth serial, identity text)")
        yield pool


async def note(tx: Transaction, identity: str) -> None:
    """A row and the event that reports it."""
    await tx.execute("insert into notes (identity) values ($1)", identity)
    tx.emit(Noted(key="k", identity=identity))


async def emitted(pool: Pool) -> list[str]:
    return [row["identity"] for row in await pool.fetch(EMITTED)]


async def committed(pool: Pool) -> list[str]:
    return [row["identity"] for row in await pool.fetch("select identity from notes order by nth")]


class UndoError(Exception):
    """Rolls a block back."""


# --------------------------------------------------------------------------------------------------------- H10


@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_h10_an_event_lives_and_dies_with_its_savepoint(
    pool: Pool, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen red: without the observation of savepoints the events of all that was rolled back are published."""
    if rule == "removed":
        monkeypatch.setattr(postgres, "on_savepoints", lambda *_: lambda: None)
    async with outbox.transaction(pool) as tx:
        await note(tx, "1")
        with pytest.raises(UndoError):
            await nested_unit(tx, UndoError())
        await nested_unit(tx, None)
        raw = tx.connection.transaction()
        await raw.start()
        await note(tx, "raw undone")
        await raw.rollback()
        await tx.execute("savepoint by_text")
        await note(tx, "text undone")
        await tx.execute("rollback to savepoint by_text")
        await note(tx, "2")
    expected = ["1", "nested", "2"]
    assert await committed(pool) == expected
    assert (await emitted(pool) == expected) is (rule == "kept")
    phantoms = set(await emitted(pool)) - set(expected)
    assert phantoms == (set() if rule == "kept" else {"nested undone", "raw undone", "text undone"})


async def nested_unit(tx: Transaction, error: Exception | None) -> None:
    async with outbox.transaction(tx) as inner:
        assert inner is tx
        await note(inner, "nested undone" if error else "nested")
        if error:
            raise error


PROGRAMS: Final[list[tuple[list[str], list[str]]]] = [
    (["savepoint a", "+1", "rollback to a", "+2", "release a"], ["2"]),
    (['savepoint "A ""b""; c"', "+1", 'rollback to "A ""b""; c"'], []),
    (['savepoint "A"', "+1", "savepoint a", "+2", 'rollback to "A"', "+3"], ["3"]),
    (["savepoint Ä", "+1", 'savepoint "ä"', "+2", "rollback to Ä"], []),
    ([f"savepoint {'n' * 70}", "+1", f"rollback to {'n' * 63}"], []),
    (["savepoint a; savepoint b", "+1", "rollback to b; release a", "+2"], ["2"]),
    (["/* by: app */ savepoint a", "+1", "-- undo\nrollback to a"], []),
    (["savepoint a", "+1", "select '; rollback to a'", "+2"], ["1", "2"]),
    (["savepoint a", "+1", "select $$x; rollback to a;$$ /* ; rollback to a */", "+2"], ["1", "2"]),
    (["savepoint a", "+1", "!select 1/0", "!release a", "rollback to a", "+2"], ["2"]),
    (["savepoint a", "+1", "savepoint a", "+2", "release a", "rollback to a", "+3"], ["3"]),
    (["+1", "savepoint savepoint", "+2", "rollback to savepoint savepoint"], ["1"]),
    (["savepoint a", "+1", "do $$ begin perform 1/0; exception when others then null; end $$"], ["1"]),
]
"""Texts, `+` for a row and its event, `!` for a text that fails; and what is left of them."""


async def test_h10_savepoints_by_text(any_database: str) -> None:
    async with asyncpg.create_pool(any_database, min_size=1, max_size=1) as pool:
        await migrate.up(pool)
        await pool.execute("create table notes (nth serial, identity text)")
        for program, expected in PROGRAMS:
            await pool.execute("delete from notes; delete from outbox.events")
            async with outbox.transaction(pool) as tx:
                for step in program:
                    await perform(tx, step)
            assert await committed(pool) == expected, program
            assert await emitted(pool) == expected, program


async def perform(tx: Transaction, step: str) -> None:
    if step.startswith("+"):
        await note(tx, step[1:])
    elif step.startswith("!"):
        with pytest.raises(asyncpg.PostgresError):
            await tx.execute(step[1:])
    else:
        await tx.execute(step)


async def test_h10_deep_nesting(pool: Pool) -> None:
    async def descend(tx: Transaction, depth: int) -> None:
        if depth == 60:
            raise UndoError
        with nullcontext() if depth != 30 else pytest.raises(UndoError):
            async with outbox.transaction(tx):
                await note(tx, str(depth))
                await descend(tx, depth + 1)

    async with outbox.transaction(pool) as tx:
        await descend(tx, 0)
    assert await committed(pool) == await emitted(pool) == [str(n) for n in range(30)]


async def test_h10_an_interrupted_rollback_commits_nothing_rather_than_a_guess(pool: Pool) -> None:
    async def unit() -> None:
        async with outbox.transaction(pool) as tx:
            await note(tx, "before")
            await tx.execute("savepoint a")
            await note(tx, "in doubt")
            with pytest.raises(asyncpg.PostgresError):
                await tx.execute("savepoint a; select 1/0")
            await tx.execute("rollback to a")

    with pytest.raises(outbox.EmitError) as error:
        await unit()
    assert error.value.field == "savepoints"
    assert await committed(pool) == await emitted(pool) == []


names = st.sampled_from(["a", "b", '"B"', "/* x */ c"])
steps = st.one_of(
    st.just("+"),
    st.just("+"),
    names.map("savepoint {}".format),
    names.map("savepoint {}".format),
    names.map("release savepoint {}".format),
    names.map("rollback to {}".format),
    names.map("rollback work to savepoint {}".format),
    st.tuples(names, names).map("savepoint {0[0]}; savepoint {0[1]};".format),
    st.just("select 1/0"),
    st.just("select '; rollback to a'"),
)
programs = st.lists(steps, max_size=14)


async def run_program(connection: Connection, program: list[str]) -> tuple[list[str], list[str]]:
    """Rows and events that a random program leaves; an error is answered by going back to a savepoint that exists."""
    await connection.execute("delete from notes; delete from outbox.events")
    async with outbox.transaction(connection) as tx:
        await tx.execute("savepoint base")
        for nth, step in enumerate(program):
            try:
                if step == "+":
                    await note(tx, str(nth))
                else:
                    await tx.execute(step)
            except asyncpg.PostgresError:
                await tx.execute("rollback to base")
    rows = [row["identity"] for row in await connection.fetch("select identity from notes order by nth")]
    return rows, [row["identity"] for row in await connection.fetch(EMITTED)]


def hunt(runner: asyncio.Runner, connection: Connection) -> None:
    """Compare rows and events of random programs."""

    @settings(max_examples=100, database=None)
    @given(programs)
    def compare(program: list[str]) -> None:
        rows, events = runner.run(run_program(connection, program))
        assert events == rows

    compare()


@pytest.mark.parametrize("rule", ["kept", "removed"])
def test_h10_random_savepoint_programs(database: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows inserted beside each event are the truth. Seen red: without the observation a program is found at once."""

    async def prepare() -> Connection:
        async with asyncpg.create_pool(database, min_size=1, max_size=1) as pool:
            await migrate.up(pool)
        connection = await asyncpg.connect(database)
        await connection.execute("create table notes (nth serial, identity text)")
        return connection

    with asyncio.Runner() as runner:
        connection = runner.run(prepare())
        try:
            if rule == "kept":
                hunt(runner, connection)
            else:
                monkeypatch.setattr(postgres, "on_savepoints", lambda *_: lambda: None)
                with pytest.raises(AssertionError):
                    hunt(runner, connection)
        finally:
            runner.run(connection.close())


# --------------------------------------------------------------------------------------------------------- H17


async def waits_for_a_lock(pool: Pool) -> None:
    async def look() -> bool:
        return bool(await pool.fetchval("select count(*) from pg_locks where not granted"))

    await eventually(look, what="a writer that waits for the row")


ACCOUNTS: Final = "create table accounts (version integer); insert into accounts values (0)"
UPDATE: Final = "update accounts set version = version + 1"


async def test_h17_an_emit_before_the_write_inverts(pool: Pool) -> None:
    """Documented, not prevented: outbox.emit inserts at once, so it must follow the write that it reports.

    Both rows may fall into one window, in the wrong order, and no waiting will put it right.
    """
    await pool.execute(ACCOUNTS)
    emit = "select outbox.emit('account.changed', 'notes', 'k', jsonb_build_object('identity', $1::text))"
    async with pool.acquire() as other:
        async with outbox.transaction(pool) as first:
            await first.execute(UPDATE)
            second = other.transaction()
            await second.start()
            await other.execute(emit, "2")
            update = asyncio.create_task(other.execute(UPDATE))
            await waits_for_a_lock(pool)
            await first.execute(emit, "1")
        await update
        await second.commit()
    assert await emitted(pool) == ["2", "1"]


async def test_h17_a_buffered_emit_is_immune(pool: Pool) -> None:
    """The same interleaving; the flush is the last statement, under the row's lock, whenever `emit` was called."""
    await pool.execute(ACCOUNTS)
    async with outbox.transaction(pool) as first:
        await first.execute(UPDATE)
        emitted_early = asyncio.Event()

        async def write_second() -> None:
            async with outbox.transaction(pool) as tx:
                tx.emit(Noted(key="k", identity="2"))
                emitted_early.set()
                await tx.execute(UPDATE)

        second = asyncio.create_task(write_second())
        await emitted_early.wait()
        await waits_for_a_lock(pool)
        first.emit(Noted(key="k", identity="1"))
    await second
    assert await emitted(pool) == ["1", "2"]


# --------------------------------------------------------------------------------------------------------- H22

GOLDEN: Final = {  # (key, shard count): shard; never to change, or a key's events move to another relay
    ("k", 1): 0,
    ("k", 2): 0,
    ("order-42", 16): 0,
    ("0190aaaa-0000-7000-8000-00000000000f", 64): 41,
    ("é", 64): 25,
    ("🙂", 64): 19,
    (" ", 7): 3,
}


async def test_h22_the_hash_is_the_same_on_every_release(any_database: str) -> None:
    async with asyncpg.create_pool(any_database, min_size=1, max_size=1) as pool:
        await migrate.up(pool)
        found = {
            (key, count): await pool.fetchval("select outbox.shard_of($1, $2)", key, count) for key, count in GOLDEN
        }
        assert found == GOLDEN


@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_h22_writers_cannot_disagree_on_the_shard_count(pool: Pool, rule: str) -> None:
    """Two writers with open transactions, the count changed between: what they insert afterwards agrees.

    Seen red: a count that the client brings along leaves a key's events in two shards.
    """
    with (
        nullcontext()
        if rule == "kept"
        else broken_statement(SQL, "flush", "(select l.shard_count from outbox.logs l where l.is_current)),", "1),")
    ):
        keys = [f"key-{n}" for n in range(20)]
        async with pool.acquire() as other, outbox.transaction(pool) as python, other.transaction():
            await python.fetchval("select count(*) from outbox.events")
            await other.fetchval("select outbox.emit('account.changed', 'notes', 'warm-up', '{}')")
            await pool.execute("update outbox.logs set shard_count = 16")
            python.emit(*(Noted(key=key, identity=key) for key in keys))
            for key in keys:
                await other.fetchval("select outbox.emit('account.changed', 'notes', $1, '{}')", key)
    rows = await pool.fetch(
        "select key, array_agg(distinct shard) as shards, bool_and(shard = outbox.shard_of(key, 16)) as right"
        "  from outbox.events where key <> 'warm-up' group by key"
    )
    assert len(rows) == len(keys)
    assert all(len(row["shards"]) == 1 and row["right"] for row in rows) is (rule == "kept")
