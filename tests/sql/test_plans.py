"""How many rows the hot statements touch: what is there to do, never what was ever done.

A plan that is right on an empty table can be ruinous later, and a plan is kept: PostgreSQL plans a prepared statement
for good after its fifth run, and functions likewise. So every statement is measured in three situations, 100,000
relayed rows beside 2,000 pending ones:

* planned while the tables were empty, and known to be so, before the rows came;
* planned afterwards, with statistics that still say "empty";
* planned with fresh statistics.
"""

import importlib
import json
import pkgutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias
from uuid import UUID, uuid4

import asyncpg
import pytest

import outbox
from outbox import Connection, Pool, Relay
from outbox.cache import merge, owner, pages, table
from outbox.consumer import apply, parking, retries
from outbox.postgres import Snapshot, Statement, Statements
from outbox.relay import lease, release, window
from outbox.relay.window import Bounds, Span
from outbox.settings import Settings
from outbox.upkeep import migrate, status
from tests.support import caching
from tests.support.faults import eventually
from tests.support.kafka_server import create_topic
from tests.support.mutations import broken_statement
from tests.support.plans import Touched, counted
from tests.support.writers import Writers

TRANSACTION: Final[Statements] = sys.modules["outbox.transaction"].SQL

RELAYED: Final = 100_000
PENDING: Final = 2_000
PENDING_KEYS: Final = 50
PARKED_KEYS: Final = 300
"""By the relay; consumers have parked twenty times as many."""
QUEUE: Final = 20
"""Waiting events of each of them; as many again are over."""
FLAGGED: Final = 50
RELEASED: Final[Mapping[str, int]] = {"outbox.parked_events": 6 * 30, "outbox.parked_keys": 2 * FLAGGED}
"""What a release of thirty events may touch, of the 1,000 that are flagged."""
WINDOWS: Final = 3_000
EVENTS_BOUND: Final = int(PENDING * 1.1) + 50
FEW: Final = 50

SITUATIONS: Final = ("planned while empty", "stale statistics", "fresh statistics")

Run: TypeAlias = Callable[[], Awaitable[Any]]


# -------------------------------------------------------------------------------------------------------- loading


@asynccontextmanager
async def log_of(url: str) -> AsyncIterator[Connection]:
    """A migrated database where nobody but the test gathers statistics; at first they say that all tables are empty."""
    async with connected(url) as connection:
        await migrate.up(connection)
        await keep_statistics(connection, "outbox")
        # They slow the loading down and have no say in plans.
        for name in ("topic", "key", "event_type", "schema_version", "headers", "payload"):
            await connection.execute(f"alter table outbox.events drop constraint events_{name}_check")
        await connection.execute("analyze")
        yield connection


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


async def keep_statistics(connection: Connection, schema: str) -> None:
    """No autovacuum for the tables of a schema."""
    for row in await connection.fetch(
        "select oid::regclass::text as name from pg_class"
        " where relkind = 'r' and relnamespace = $1::text::regnamespace",
        schema,
    ):
        await connection.execute(f"alter table {row['name']} set (autovacuum_enabled = false)")


async def load_relayed(connection: Connection, count: int) -> None:
    """Events of long ago, by 500 transactions, in all slots."""
    await connection.execute(
        "insert into outbox.events (transaction_id, shard, slot, topic, key, event_id, event_type, payload)"
        " select (3 + i % 500)::text::xid8, 0, i % 8, 'topic', 'old-' || i % 1000, $2, 't', '{}'"
        "   from generate_series(1, $1::integer) i",
        count,
        UUID(int=1),
    )


async def load_pending(connection: Connection, count: int) -> None:
    """Events that nobody has read, by one transaction."""
    await connection.execute(
        "insert into outbox.events (shard, slot, topic, key, event_id, event_type, payload)"
        " select 0, i % 8, 'topic', 'new-' || i % $3::integer, $2, 't', '{}' from generate_series(1, $1::integer) i",
        count,
        UUID(int=1),
        PENDING_KEYS,
    )


async def load_history(connection: Connection) -> None:
    """Windows long done, parked keys of the relay and many more of consumers."""
    await connection.execute(
        "insert into outbox.windows (shard, window_no, log_id, s1, s2, epoch, horizon)"
        " select 0, i, log_id, pg_current_snapshot(), pg_current_snapshot(), 0, 1"
        "   from outbox.logs, generate_series(1, $1::integer) i where is_current",
        WINDOWS,
    )
    await connection.execute("update outbox.shards set done_through = $1", WINDOWS)
    await connection.execute(
        "insert into outbox.parked_keys (parker, topic, key, shard, reason, detail, retry_at)"
        " select 'relay', 'topic', 'parked-' || i, 0, 'r', 'd', case when i <= $2 then now() end"
        "   from generate_series(1, $1::integer) i",
        PARKED_KEYS,
        FLAGGED,
    )
    await connection.execute(
        "insert into outbox.parked_keys (parker, topic, key, reason, detail)"
        " select 'a_cache', 'topic', 'old-' || i, 'r', 'd' from generate_series(1, 20 * $1::integer) i",
        PARKED_KEYS,
    )
    await connection.execute(
        "insert into outbox.parked_events (parker, topic, key, log_id, shard, window_no, ordinal, position, created_at)"
        " select 'relay', 'topic', 'parked-' || i % $1::integer, log_id, 0, i / 10 + 1, i % 10 + 1, i, now()"
        "   from outbox.logs, generate_series(1, $2::integer * $1::integer) i where is_current",
        PARKED_KEYS,
        QUEUE,
    )
    await connection.execute(
        "insert into outbox.parked_events (parker, topic, key, state, log_id, shard, window_no, ordinal, position,"
        "                                  release_window_no, release_ordinal, created_at)"
        " select parker, topic, key, 'released', log_id, shard, window_no, ordinal + 10, position, window_no, ordinal,"
        "        now()"
        "   from outbox.parked_events",
    )


# ------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Bound:
    """Rows that a statement may take from each table; from every other one, a few."""

    run: Run
    events: int = 0
    others: Mapping[str, int] | None = None

    def broken_by(self, touched: Touched) -> dict[str, int]:
        bounds = {"outbox.events": self.events, **(self.others or {})}
        return {name: rows for name, rows in touched.rows.items() if rows > bounds.get(name, FEW)}


async def measure(connection: Connection, bounds: Mapping[str, Bound]) -> dict[str, Touched]:
    """Run each once and count."""
    found = {}
    for name, bound in bounds.items():
        async with counted(connection) as touched:
            await bound.run()
        found[name] = touched
    return found


async def plan(connection: Connection, bounds: Mapping[str, Bound]) -> None:
    """Run each as often as it takes to make its plan permanent."""
    for _ in range(7):
        await measure(connection, bounds)


def relay_statements(connection: Connection, s1: Snapshot, s2: Snapshot) -> dict[str, Bound]:
    """What a relay's session runs, for one window of all that is pending."""
    sql = window.SQL
    span = Span(s1, s2)
    cursor_arguments = 0, s1[1], s1[2], s2, 0

    async def page() -> None:
        cursor = await sql.read_backlog.cursor(connection, *cursor_arguments)
        while await cursor.fetch(500):
            pass

    logged = 0, 0, 0, "{}", WINDOWS + 1, span.s1, span.s2, 0, None, 10**6
    owner = uuid4()
    # log_window looks for a parked key of its shard, then joins the window with those of the relay.
    with_parked = {"outbox.parked_keys": 2 * PARKED_KEYS + FEW, "outbox.parked_events": PENDING}
    return {
        "read": Bound(partial(window.read, connection, 0, s1, Bounds(2 * PENDING, 1 << 30)), EVENTS_BOUND),
        "read, too large": Bound(partial(window.read, connection, 0, s1, Bounds(100, 1 << 30)), 101 + 8 * FEW),
        "begin_backlog": Bound(partial(sql.begin_backlog.fetch, connection)),
        "read_backlog": Bound(page, EVENTS_BOUND),
        "replay": Bound(
            partial(sql.replay.fetch, connection, 0, WINDOWS + 1, s1, s2, 0, None), EVENTS_BOUND,
            {"outbox.parked_events": PENDING},
        ),
        "log": Bound(partial(sql.log.fetch, connection, *logged), EVENTS_BOUND, with_parked),
        "park": Bound(
            partial(sql.park.fetch, connection, 0, 0, "topic", "new-1", WINDOWS, 1, "r", "d", 10**6),
            EVENTS_BOUND,
            with_parked,
        ),
        "released": Bound(partial(sql.released.fetch, connection, 0, 10), others={"outbox.parked_events": 100}),
        "look for flags": Bound(partial(release.SQL.look.fetch, connection, 0)),
        "log a release": Bound(
            partial(release.SQL.log.fetch, connection, 0, 0, 0, "{}", WINDOWS + 1, 30, 10**6), others=RELEASED
        ),
        "forget what is over": Bound(
            partial(release.SQL.forget.fetch, connection, 0, 100), others={"outbox.parked_events": 3 * 100}
        ),
        "done": Bound(partial(sql.done.fetch, connection, 0, 0, 0, "{}")),
        "load": Bound(partial(sql.load.fetch, connection, 0)),
        "unfinished": Bound(partial(sql.unfinished.fetch, connection, 0, WINDOWS)),
        "take": Bound(partial(lease.SQL.take.fetch, connection, 0, owner, 1.0)),
        "renew": Bound(partial(lease.SQL.renew.fetch, connection, 0, 0, 1.0)),
        "release": Bound(partial(lease.SQL.release.fetch, connection, 0, 0)),
    }  # fmt: skip


def writer_statements(connection: Connection) -> dict[str, Bound]:
    """What a service's session runs when it commits twenty events; the count of topics is a service's own."""
    size = 20
    keys = [f"key-{n}" for n in range(size)]
    columns = ["topic"] * size, keys, [uuid4()] * size, ["t"] * size, [1] * size, [None] * size, [b"{}"] * size
    return {"flush": Bound(partial(TRANSACTION.flush.fetch, connection, *columns))}


def status_statements(connection: Connection) -> dict[str, Bound]:
    """What `outbox status` runs: the lag, and the parked keys."""
    return {
        "status": Bound(
            partial(status.read, connection),
            EVENTS_BOUND,
            {"outbox.parked_keys": 21 * PARKED_KEYS * 3, "outbox.parked_events": 2 * 21 * PARKED_KEYS},
        )
    }


def broken(found: Mapping[str, Touched], bounds: Mapping[str, Bound]) -> dict[str, dict[str, int]]:
    return {name: over for name, touched in found.items() if (over := bounds[name].broken_by(touched))}


@pytest.mark.parametrize("situation", SITUATIONS)
async def test_what_relay_writer_and_status_touch_is_what_is_pending(any_database: str, situation: str) -> None:
    """H26, one window: 100,000 relayed rows, whatever the statistics say, are not looked at."""
    async with log_of(any_database) as db, connected(any_database) as relay, connected(any_database) as writer:
        await window.SQL.prepare_session.execute(relay)
        s1 = (await window.load(relay, 0)).cursor
        if situation == "planned while empty":
            await plan(relay, relay_statements(relay, s1, s1))
            await plan(writer, writer_statements(writer))
        await load_relayed(db, RELAYED)
        await load_history(db)
        s1 = await db.fetchval("select pg_current_snapshot()")
        await load_pending(db, PENDING)
        s2 = await db.fetchval("select pg_current_snapshot()")
        await db.execute("update outbox.windows set s1 = $1, s2 = $1 where window_no < $2", s1, WINDOWS)
        await db.execute("update outbox.windows set s1 = $1, s2 = $2 where window_no = $3", s1, s2, WINDOWS)
        if situation == "fresh statistics":
            await db.execute("analyze")
        bounds = relay_statements(relay, s1, s2)
        found = await measure(relay, bounds)
        assert not broken(found, bounds), broken(found, bounds)
        for name in ("read", "read_backlog", "replay", "log", "park"):
            assert found[name].rows["outbox.events"] >= PENDING, f"{name} was measured at work"
        bounds = writer_statements(writer)
        assert not (over := broken(await measure(writer, bounds), bounds)), over
        await db.execute("update outbox.shards set done_through = $1", WINDOWS - 1)
        bounds = status_statements(db)
        assert not (over := broken(await measure(db, bounds), bounds)), over


# ------------------------------------------------------------------------------------------------------ the cache

CACHED: Final = 300_000
BATCH: Final = 20
POSITIONS: Final = 500
"""Partitions that consumers of this database read; `advance` may look at each, no more."""
KEYS: Final = [str(UUID(int=7 * n)) for n in range(1, BATCH + 1)]


def documents(**columns: object) -> str:
    """What a merge is given, for each of the keys."""
    runtime = {"outbox_log": caching.LOG, "outbox_position": 1, "outbox_transaction_id": 5}
    return json.dumps([{"agent_id": key, **columns, **runtime} for key in KEYS])


def batch_statements(connection: Connection, cached: table.Table) -> dict[str, Bound]:
    """What follows `advance` in the transaction of a batch; every kind of merge."""
    rows, changes = cached.compose(merge.SQL.merge_rows), cached.compose(merge.SQL.merge_changes)
    full, none = documents(agent_name="n", tags=[]), "[]"
    few = {"outbox.positions": POSITIONS + FEW}
    per_range = {caching.TABLE: 6 * 7 * BATCH, "outbox.tombstones": 4 * BATCH, **few}
    """A page has every seventh key of its range; the others are deleted."""
    per_key = {caching.TABLE: 4 * BATCH, "outbox.tombstones": 4 * BATCH, **few}

    async def merged() -> None:
        await advance(connection, keeps_plans=True)
        await rows.execute(connection, cached.oid, KEYS, full)

    async def changed(patches: str, deletions: str) -> None:
        await advance(connection)
        await changes.fetch(connection, cached.oid, KEYS, patches, deletions, True)

    async def waiting() -> None:
        await advance(connection)
        await parking.SQL.waiting.fetch(connection, caching.TABLE, "topic", KEYS)

    async def room() -> None:
        await advance(connection)
        await parking.SQL.room.fetch(connection, "nobody", 100)

    async def batched(statement: Statement, *arguments: object) -> None:
        await advance(connection)
        await statement.fetch(connection, *arguments)

    due = {**few, "outbox.parked_keys": 6 * BATCH}
    key = caching.TABLE, "topic", "waits-1"
    sql = retries.SQL

    page = cached.compose(merge.SQL.merge_page)

    async def paged(after: str | None, through: str | None, keys: list[str] | None, *, sees: str = "9:9:") -> None:
        await pages.SQL.lock_alone.execute(connection, caching.TABLE)
        await apply.SQL.register.execute(
            connection, cached.oid, caching.TABLE, "c", "topic", False, f'"{caching.TABLE}"'
        )
        is_range = keys is None
        opened = await pages.SQL.open.fetchval(
            connection, cached.oid, caching.LOG, sees, is_range, after, through, cached.full_name
        )
        await page.fetch(connection, cached.oid, opened, documents(agent_name="n", tags=[]), keys)

    return {
        "due": Bound(partial(sql.due.fetch, connection, [caching.TABLE, "nobody"], ["topic"] * 2, [0, 1])),
        "due keys": Bound(partial(batched, sql.due_keys, caching.TABLE, "topic", 1, BATCH), others=due),
        "parked events": Bound(partial(batched, sql.events, *key, BATCH), others=few),
        "free": Bound(partial(batched, sql.free, *key), others=few),
        "failed": Bound(partial(batched, sql.failed, *key, "r", "d", 1.0, 600.0, 12, False), others=few),
        "advance": Bound(partial(advance, connection), others=few),
        "a page": Bound(partial(paged, KEYS[0], KEYS[-1], None), others=per_range),
        "a page that is too late": Bound(partial(paged, KEYS[0], KEYS[-1], None, sees="1:1:"), others=per_range),
        "page of single keys": Bound(partial(paged, None, None, KEYS), others=per_key),
        "merge of rows": Bound(merged, others=per_key),
        "merge of patches": Bound(partial(changed, full, none), others=per_key),
        "merge of deletions": Bound(partial(changed, none, documents()), others=per_key),
        "waiting": Bound(waiting, others=few),
        "room": Bound(room, others=few),
    }


async def advance(connection: Connection, *, keeps_plans: bool = False) -> None:
    """The first statement of a batch."""
    marks = [caching.LOG], [0], [1], [1]
    parkers, fed = [caching.TABLE, "nobody"], [caching.TABLE]
    await apply.SQL.advance.fetch(
        connection, "c", "topic", 1, 1, 0, 50, "id", *marks, parkers, "15000", fed, keeps_plans
    )


def claim_statements(connection: Connection) -> dict[str, Bound]:
    """What a claim runs."""
    return {
        "claim": Bound(partial(apply.SQL.claim.fetch, connection, "c", "topic", 1, 0, "owner")),
        "applied": Bound(
            partial(apply.SQL.applied.fetch, connection, "c", "topic", 1),
            others={"outbox.applied": 4 * POSITIONS + FEW},
        ),
    }


async def load_cache(connection: Connection) -> None:
    """300,000 cached rows, tombstones of this and another cache, 5,000 parked keys, the positions of some topics."""
    await connection.execute(
        f"insert into {caching.TABLE} (agent_id, agent_name, tags, outbox_log, outbox_position)"
        " select lpad(to_hex(i), 32, '0')::uuid, 'n', '{}', $2, 1 from generate_series(1, $1::integer) i",
        CACHED,
        caching.LOG,
    )
    await connection.execute(
        "insert into outbox.tombstones (cache, key, log_id)"
        " select case when i % 2 = 0 then 'outbox.logs' else $1 end::regclass, 'gone-' || i, $2"
        "   from generate_series(1, 10000) i",
        caching.TABLE,
        caching.LOG,
    )
    await connection.execute(
        "insert into outbox.positions (consumer, topic, partition, next_offset, owner)"
        " select 'c', 'topic-' || i, 1, 0, 'o' from generate_series(1, $1::integer) i",
        POSITIONS,
    )
    await connection.execute(
        "insert into outbox.parked_keys (parker, topic, key, partition, reason, detail, retry_at)"
        " select $1, 'topic', 'waits-' || i, i % 4, 'r', 'd', "
        "        case when i % 10 < 5 then now() + (i - 500) * '1 s'::interval end"
        "   from generate_series(1, 5000) i",
        caching.TABLE,
    )
    await connection.execute(
        "insert into outbox.parked_events (parker, topic, key, partition, created_at)"
        " select parker, topic, key, partition, now() from outbox.parked_keys, generate_series(1, 4)",
    )
    await connection.execute(
        "insert into outbox.applied (consumer, topic, partition, log_id, shard, window_no, ordinal)"
        " select consumer, topic, partition, $1, s, 1, 1 from outbox.positions, generate_series(0, 3) s",
        caching.LOG,
    )


async def measure_batches(url: str, situation: str) -> dict[str, dict[str, int]]:
    """What goes over its bound: load a cache, planned before or after, and measure."""
    async with connected(url) as db, connected(url) as service:
        await migrate.up(db)
        async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool:
            await caching.create_table(pool)
        await keep_statistics(db, "outbox")
        await keep_statistics(db, "public")
        # Without its row a batch ends here, before it has said how it is to be planned.
        await apply.SQL.claim.fetch(db, "c", "topic", 1, 0, "owner")
        cached = await table.find(db, caching.CachedAgent, caching.TABLE, "agent_id")
        bounds = batch_statements(service, cached) | claim_statements(service)
        if situation != "planned while new":
            await db.execute("analyze")
        if situation.startswith("planned"):
            await plan(service, bounds)
        await load_cache(db)
        if situation == "fresh statistics":
            await db.execute("analyze")
        found = await measure(service, bounds)
        assert found["merge of rows"].rows[caching.TABLE] >= BATCH, "measured at work"
        assert found["a page"].rows[caching.TABLE] >= 7 * BATCH, "measured at work"
        return broken(found, bounds)


@pytest.mark.parametrize("situation", [*SITUATIONS, "planned while new"])
async def test_what_a_batch_touches_is_a_few_rows_a_key(any_database: str, situation: str) -> None:
    """H51 of the cache: planned when empty, 300,000 rows later. A new table is one that was never analyzed."""
    assert await measure_batches(any_database, situation) == {}


async def test_a_batch_under_a_plan_that_was_kept_reads_the_whole_cache(database: str) -> None:
    """Negative control of planning each batch."""
    with broken_statement(apply.SQL, "advance", "'force_custom_plan'", "'force_generic_plan'"):
        over = await measure_batches(database, "planned while new")
    assert over["merge of patches"][caching.TABLE] >= CACHED
    assert over["merge of deletions"][caching.TABLE] >= CACHED


async def test_a_plan_that_was_kept_without_a_word_about_indexes_reads_all_deletions(database: str) -> None:
    """Negative control of what keeps the plan of full rows right."""
    with broken_statement(apply.SQL, "advance", "'enable_seqscan', 'off'", "'enable_seqscan', 'on'"):
        over = await measure_batches(database, "planned while empty")
    assert over["merge of rows"]["outbox.tombstones"] >= CACHED // 60


# --------------------------------------------------------------------------------------------------- H26, a backlog


async def test_paging_a_backlog_of_250_000_touches_each_row_once(database: str) -> None:
    """H26: with relayed rows beside it and statistics from before, the pages of a whole backlog cost one pass."""
    relayed, backlog = 50_000, 250_000
    async with log_of(database) as db, asyncpg.create_pool(database, min_size=1, max_size=2) as pool:
        await load_relayed(db, relayed)
        s1 = await db.fetchval("select pg_current_snapshot()")
        await load_pending(db, backlog)
        read_rows, pages = 0, 0
        async with window.backlog(pool, 0, s1, None) as reading:
            async for _, page in reading.pages(Bounds(2_500, 1 << 30)):
                read_rows, pages = read_rows + len(page), pages + 1
            touched = await events_read(reading.connection)
        assert read_rows == backlog
        assert pages >= backlog / 2_500
        assert backlog <= touched <= backlog * 1.01


async def events_read(connection: Connection) -> int:
    """What the transaction that is open on a fresh connection has read of the log."""
    rows: int = await connection.fetchval(
        "select sum(pg_stat_get_xact_tuples_returned(i.indexrelid) + pg_stat_get_xact_tuples_returned(i.indrelid))::int"
        "  from pg_index i join pg_inherits p on p.inhrelid = i.indrelid"
        " where p.inhparent = 'outbox.events'::regclass"
    )
    return rows


# ------------------------------------------------------------------------------------------------ negative controls

WITH_OR: Final = """
select e.position from outbox.events e
 where e.shard = $1 and (e.transaction_id >= $2 or e.transaction_id = any ($3)) and e.position > $4
 order by e.position limit $5
"""


@asynccontextmanager
async def loaded(
    url: str, warm_up: Callable[[Connection, Snapshot], Awaitable[Any]]
) -> AsyncIterator[tuple[Connection, Snapshot]]:
    """A session that planned while the log was empty, and the log as it is then."""
    async with log_of(url) as db, connected(url) as relay:
        s1 = (await window.load(relay, 0)).cursor
        for _ in range(7):
            await warm_up(relay, s1)
        await load_relayed(db, RELAYED)
        s1 = await db.fetchval("select pg_current_snapshot()")
        await load_pending(db, PENDING)
        yield relay, s1


async def test_without_the_settings_of_the_session_the_relay_reads_the_whole_log(database: str) -> None:
    """Negative control of `prepare_session`."""

    async def read_window(relay: Connection, s1: Snapshot) -> object:
        return await window.read(relay, 0, s1, Bounds(2 * PENDING, 1 << 30))

    async with loaded(database, read_window) as (relay, s1):
        async with counted(relay) as touched:
            await read_window(relay, s1)
        assert touched.rows["outbox.events"] > RELAYED


async def test_with_an_index_on_the_position_a_page_walks_over_all_relayed_rows(database: str) -> None:
    """Negative control of the two ranges, and of having one index: the OR with an order that an index offers."""

    async def read_page(relay: Connection, s1: Snapshot) -> object:
        return await relay.fetch(WITH_OR, 0, s1[1], s1[2], 0, PENDING // 2)

    async with connected(database) as db:
        await migrate.up(db)
        await db.execute("create index on outbox.events (shard, position)")

    async def prepared(relay: Connection, s1: Snapshot) -> object:
        await window.SQL.prepare_session.execute(relay)
        return await read_page(relay, s1)

    async with loaded(database, prepared) as (relay, s1):
        async with counted(relay) as touched:
            await read_page(relay, s1)
        assert touched.rows["outbox.events"] > RELAYED


# ------------------------------------------------------------------------------------------------- every statement


def named_statements() -> Iterator[Statement]:
    """Of every module of the package."""
    seen: set[int] = set()
    for found in pkgutil.walk_packages(outbox.__path__, "outbox."):
        if found.name.endswith("__main__"):
            continue
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, Statements) and id(value) not in seen:
                seen.add(id(value))
                yield from value


async def test_every_named_statement_can_be_prepared(any_database: str) -> None:
    """On the oldest and the newest server; templates through the table of a cache, or the query of an owner."""
    async with asyncpg.create_pool(any_database, min_size=1, max_size=1) as pool:
        await migrate.up(pool)
        await caching.create_table(pool)
        cached = await table.find(pool, caching.CachedAgent, caching.TABLE, "agent_id")
        query = owner._Query(f"select * from {caching.TABLE}", {"agent_id": "uuid", "agent_name": "text"}, "agent_id")
        names = []
        for statement in named_statements():
            names.append(statement.name)
            is_cached = any(part in statement.name for part in (".cache.", ".testing.scratch."))
            template = query if ".cache.owner." in statement.name else cached if is_cached else None
            more = {"digested": "c.agent_name"} if ".cache.reconcile." in statement.name else {}
            text = template.compose(statement, **more).text if template else statement.text
            async with pool.acquire() as connection:
                try:
                    await connection.prepare(text)
                except asyncpg.PostgresError as error:
                    raise AssertionError(f"{statement.name}: {error}\n{text}") from error
        assert {"outbox.relay.window.read", "outbox.cache.merge.merge_rows", "outbox.transaction.flush"} <= set(names)
        assert len(names) >= 60


# ----------------------------------------------------------------------------------------------------- no dead rows


async def test_emitting_relaying_and_being_done_leaves_no_dead_row_in_the_log(
    log_pool: Pool, broker: str, topic: str
) -> None:
    """Insert-only: no row is updated, deleted or locked, so every line pointer of every page is a live row."""
    await create_topic(broker, topic)
    writers = Writers(log_pool, topic, modes={"plain": 1, "several": 1})
    await writers.set_up()
    await writers.run(writers=4, transactions=25)
    async with Relay(log_pool, broker, settings=Settings(window_max_events=20)) as relay:

        async def all_done() -> bool:
            (shard,) = (await status.read(log_pool)).shards
            return shard.lag_events == 0 and shard.windows_in_flight == 0

        await eventually(all_done, what="everything is published and persisted as done")
        relay.stop()
        await relay.run()
    row = await log_pool.fetchrow(
        "select sum(live)::int as live, sum(pointers)::int as pointers, sum(touched)::int as touched from ("
        " select count(*) as live, max((ctid::text::point)[1]) as pointers,"
        "        count(*) filter (where xmax <> 0) as touched"
        "   from outbox.events group by tableoid, (ctid::text::point)[0]) p"
    )
    assert row is not None
    assert row["live"] == await log_pool.fetchval("select count(*) from changes") > 0
    assert (row["pointers"], row["touched"]) == (row["live"], 0)
