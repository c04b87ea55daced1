"""Migrations on each supported PostgreSQL: reversible, exclusive, atomic, checked."""

import asyncio
import itertools
import re
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest

from outbox import crash_sites, limits
from outbox.errors import MigrationBusy, MigrationChanged, NotMigrated
from outbox.upkeep import migrate, status
from outbox.upkeep.scripts import split
from tests.support.catalogue import catalogue

NEWEST = len(migrate.shipped())
WAITING = """select count(*) = 2 from pg_locks l join pg_database d on d.oid = l.database
              where d.datname = current_database() and l.locktype = 'advisory' and not l.granted"""
Connection = asyncpg.Connection


@pytest.fixture
async def db(any_database: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(any_database)
    yield connection
    await connection.close()


@pytest.fixture
async def other(any_database: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(any_database)
    yield connection
    await connection.close()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A package with two migrations of its own; the second one's last statement can be made to fail."""
    name = "shop_" + re.sub(r"\W", "_", request.node.name.lower())
    folder = tmp_path / name / "migrations"
    folder.mkdir(parents=True)
    (tmp_path / name / "__init__.py").touch()
    (folder / "0001_base.up.sql").write_text("create schema shop; create table shop.a (n int);")
    (folder / "0001_base.down.sql").write_text("drop schema shop cascade;")
    (folder / "0002_more.up.sql").write_text(
        "create table shop.b (n int); insert into shop.a values (1); insert into shop.b select 1 / n from shop.a;"
    )
    (folder / "0002_more.down.sql").write_text("drop table shop.b; delete from shop.a;")
    monkeypatch.syspath_prepend(tmp_path)
    return name


async def states(db: Connection, package: str = "outbox") -> list[str]:
    return [row.state for row in await migrate.status(db, package=package)]


# --------------------------------------------------------------------------------------------- there and back


async def test_up_down_and_up_again_end_where_they_began(db: Connection) -> None:
    empty = await catalogue(db)
    assert [m.number for m in await migrate.up(db)] == list(range(1, NEWEST + 1))
    full = await catalogue(db)
    assert len(full) > len(empty)
    assert [m.number for m in await migrate.down(db, to=0)] == list(range(NEWEST, 0, -1))
    assert await catalogue(db) == empty
    await migrate.up(db)
    assert await catalogue(db) == full


async def test_each_migration_is_reversible_by_itself(db: Connection) -> None:
    for number in range(1, NEWEST + 1):
        before = await catalogue(db)
        await migrate.up(db, to=number)
        after = await catalogue(db)
        assert [m.number for m in await migrate.down(db)] == [number], "without a number, the newest one goes"
        assert await catalogue(db) == before
        await migrate.up(db, to=number)
        assert await catalogue(db) == after


async def test_a_second_up_does_nothing(db: Connection) -> None:
    assert await migrate.up(db, to=1)
    assert await states(db) == ["applied"] + ["pending"] * (NEWEST - 1)
    await migrate.up(db)
    assert await migrate.up(db) == ()
    assert set(await states(db)) == {"applied"}


async def test_a_pool_will_do(any_database: str) -> None:
    async with asyncpg.create_pool(any_database, min_size=1, max_size=1) as pool:
        await migrate.up(pool)
        await migrate.check(pool)
        assert await migrate.down(pool, to=0)


async def test_numbers_that_do_not_exist_are_refused(db: Connection) -> None:
    with pytest.raises(ValueError, match=f"no migration {NEWEST + 1}; choose 1 to {NEWEST}"):
        await migrate.up(db, to=NEWEST + 1)
    with pytest.raises(ValueError, match="no migration -1"):
        await migrate.down(db, to=-1)


async def test_packages_keep_apart_and_the_last_one_takes_the_bookkeeping(db: Connection, package: str) -> None:
    empty = await catalogue(db)
    await migrate.up(db)
    await migrate.up(db, package=package)
    await migrate.down(db, to=0)
    assert await states(db, package) == ["applied", "applied"]
    await migrate.down(db, package=package, to=0)
    assert await catalogue(db) == empty


async def test_a_schema_that_holds_more_than_the_bookkeeping_stays(db: Connection) -> None:
    await migrate.up(db)
    await db.execute("create table sagabox.theirs ()")
    await migrate.down(db, to=0)
    assert await db.fetchval("select to_regclass('sagabox.theirs') is not null")
    await migrate.up(db)
    assert set(await states(db)) == {"applied"}


async def test_every_table_has_a_comment(db: Connection) -> None:
    await migrate.up(db)
    silent = await db.fetch(
        """select c.oid::regclass::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
            where n.nspname in ('outbox', 'sagabox') and c.relkind in ('r', 'p') and not c.relispartition
              and obj_description(c.oid, 'pg_class') is null"""
    )
    assert [row[0] for row in silent] == []


# --------------------------------------------------------------------------------------------- two at a time


async def test_migrators_wait_for_each_other_and_share_the_work(any_database: str, db: Connection) -> None:
    gate = db.transaction()
    await gate.start()
    await migrate.SQL.lock.execute(db)
    async with asyncpg.create_pool(any_database, min_size=2, max_size=2) as pool:
        migrators = [asyncio.create_task(migrate.up(pool)) for _ in range(2)]
        await until(db, WAITING, migrators)
        await gate.rollback()
        applied = [m for migrations in await asyncio.gather(*migrators) for m in migrations]
    assert sorted(m.number for m in applied) == list(range(1, NEWEST + 1)), "each migration was applied once"
    assert set(await states(db)) == {"applied"}


async def until(db: Connection, condition: str, tasks: list["asyncio.Task[object]"]) -> None:
    async with asyncio.timeout(20):
        while not await db.fetchval(condition):
            assert not any(task.done() for task in tasks), [task for task in tasks if task.done()]


async def test_a_table_in_use_makes_it_give_up_in_time(
    db: Connection, other: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MIGRATION_LOCK_SECONDS", 1)
    await migrate.up(db)
    full = await catalogue(db)
    async with other.transaction():
        await other.execute("select * from outbox.shards for update")
        with pytest.raises(MigrationBusy, match="pg_stat_activity"):
            await migrate.down(db, to=0)
    assert "outbox.shards" in {name for kind, name, _ in await catalogue(db)}
    await migrate.up(db)
    assert await catalogue(db) == full


# --------------------------------------------------------------------------------------------- interruptions


async def test_a_failing_migration_leaves_nothing_of_itself(db: Connection, package: str) -> None:
    await migrate.up(db, package=package, to=1)
    before = await catalogue(db)
    await db.execute("insert into shop.a values (0)")
    with pytest.raises(asyncpg.DivisionByZeroError):
        await migrate.up(db, package=package)
    assert await catalogue(db) == before
    assert await states(db, package) == ["applied", "pending"]
    await db.execute("delete from shop.a")
    await migrate.up(db, package=package)
    assert await states(db, package) == ["applied", "applied"]


@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_connection_lost_at_any_statement_leaves_nothing_half_applied(
    any_database: str, other: Connection, package: str, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Statement by statement, before it is sent and after its effect, the server ends the connection."""
    run = {"up": migrate.up, "down": migrate.down}[way]
    await migrate.up(other, package=package, to=1 if way == "up" else None)
    before = await catalogue(other)
    for nth in itertools.count():
        victim = await asyncpg.connect(any_database)
        visits = itertools.count()

        async def cut(
            _site: str, _side: str, victim: Connection = victim, visits: "itertools.count[int]" = visits, nth: int = nth
        ) -> None:
            if next(visits) == nth:
                await other.execute("select pg_terminate_backend($1, 5000)", victim.get_server_pid())

        monkeypatch.setattr(crash_sites, "hook", cut)
        try:
            await run(victim, package=package)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
            monkeypatch.setattr(crash_sites, "hook", None)
            assert await catalogue(other) == before, f"at visit {nth}"
            assert await states(other, package) == ["applied", "pending" if way == "up" else "applied"]
            continue
        finally:
            monkeypatch.setattr(crash_sites, "hook", None)
            await victim.close(timeout=5)
        break
    assert nth > 15, "there were statements to interrupt"
    assert await states(other, package) == ["applied", "applied" if way == "up" else "pending"]


async def test_in_a_callers_transaction_it_is_the_callers_to_commit(db: Connection) -> None:
    empty = await catalogue(db)
    await db.execute("set lock_timeout = '7s'")
    transaction = db.transaction()
    await transaction.start()
    await migrate.up(db)
    assert await db.fetchval("show search_path") == '"$user", public'
    assert await db.fetchval("show lock_timeout") == "7s"
    await migrate.check(db)
    await transaction.rollback()
    assert await catalogue(db) == empty


async def test_session_defaults_do_not_matter(db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts = set()

    async def observe(site: str, _side: str) -> None:
        if site == migrate.APPLY:
            timeouts.add(await db.fetchval("show statement_timeout"))

    monkeypatch.setattr(crash_sites, "hook", observe)
    await db.execute("set default_transaction_isolation = 'serializable'; set search_path = ''")
    await db.execute("set statement_timeout = '60s'")
    await migrate.up(db)
    assert timeouts == {"0"}
    assert await db.fetchval("show statement_timeout") == "1min"
    assert set(await states(db)) == {"applied"}


# --------------------------------------------------------------------------------------------- checks


async def test_an_empty_database_is_not_migrated_and_says_what_to_run(db: Connection) -> None:
    with pytest.raises(NotMigrated, match=r"0001_log.*run: outbox migrate up"):
        await migrate.check(db)
    await migrate.up(db)
    await migrate.check(db)


async def test_a_changed_migration_stops_everything(db: Connection) -> None:
    await migrate.up(db)
    full = await catalogue(db)
    await db.execute("update sagabox.migrations set checksum = repeat('0', 64) where number = 1")
    assert await states(db) == ["changed"] + ["applied"] * (NEWEST - 1)
    for refused in (migrate.up(db), migrate.down(db, to=0), migrate.check(db)):
        with pytest.raises(MigrationChanged, match=r"0001_log was applied on .* install the version"):
            await refused
    assert await catalogue(db) == full


async def test_a_newer_database_is_served_but_not_taken_back(db: Connection) -> None:
    await migrate.up(db)
    await db.execute(
        "insert into sagabox.migrations (package, number, name, checksum) values ('outbox', 9000, 'later', $1)",
        "a" * 64,
    )
    await migrate.check(db)
    assert await migrate.up(db) == ()
    assert (await migrate.status(db))[-1].state == "unknown"
    with pytest.raises(MigrationChanged, match="9000_later was applied by a newer version"):
        await migrate.down(db)


# --------------------------------------------------------------------------------------------- other tools, other roles


async def test_the_printed_statements_do_the_same_one_by_one(db: Connection) -> None:
    empty = await catalogue(db)
    await migrate.up(db)
    full = await catalogue(db)
    await migrate.down(db, to=0)
    async with db.transaction():
        for statement in migrate.statements():
            await db.fetch(statement)  # prepares it, which takes one statement only
    assert await catalogue(db) == full
    assert set(await states(db)) == {"applied"}
    async with db.transaction():
        for statement in migrate.statements(reverse=True):
            await db.fetch(statement)
    assert await catalogue(db) == empty


async def test_a_later_printed_migration_continues_an_earlier_one(db: Connection, package: str) -> None:
    await migrate.up(db, package=package, to=1)
    for statement in migrate.statements(package, first=2):
        await db.execute(statement)
    assert await states(db, package) == ["applied", "applied"]


async def test_an_ordinary_owner_can_migrate_and_another_role_can_check(any_database: str, db: Connection) -> None:
    database = urlsplit(any_database).path.removeprefix("/")
    owner, reader = f"{database}_owner", f"{database}_reader"
    await db.execute(f"create role {owner} login; create role {reader} login")
    await db.execute(f"alter database {database} owner to {owner}")
    try:
        await db.execute(f"set role {owner}")
        await migrate.up(db)
        await db.execute("select outbox.emit('t', 'topic', 'k', '{}')")
        found = await status.read(db)
        assert (found.lag_events, found.lives_here) == (1, True)
        await db.execute(f"reset role; set role {reader}")
        await migrate.check(db)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await db.execute("delete from sagabox.migrations")
        await db.execute(f"reset role; set role {owner}")
        await migrate.down(db, to=0)
    finally:
        await db.execute(f"reset role; alter database {database} owner to current_user")
        await db.execute(f"drop role {owner}; drop role {reader}")


def test_scripts_are_cut_where_statements_end() -> None:
    script = """-- a; comment
    select 'it''s; one', "a;b"; /* ; */ ;
    do $body$ begin perform 1; end $body$;
    select $$;$$ -- no semicolon at the end"""
    assert [text.split("\n")[-1].strip()[:12] for text in split(script)] == [
        "select 'it''",
        "do $body$ be",
        "select $$;$$",
    ]
