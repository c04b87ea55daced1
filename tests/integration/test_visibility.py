"""What a reader of the log sees: snapshot difference against the two known recipes, under the same load.

* Recipe A, `position > last order by position`, loses what commits late.
* Recipe B, `transaction_id < xmin order by transaction_id, position`, turns one key's events round, and stands still
  behind any writer of the cluster.
* Ours, the relay's own statements, does neither.

The truth is the business table: the version of a key is assigned under its row lock. The load is random, but the
interleavings that break A and B are staged beside it, step by step, so their failure is no matter of luck.
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, LiteralString
from uuid import uuid4

import asyncpg
import pytest

import outbox
from outbox import Connection, Pool
from outbox.embedded import Databases
from outbox.postgres import Record, Snapshot
from outbox.relay import window
from outbox.relay.window import Bounds, Span, TooLarge
from outbox.upkeep import migrate
from tests.support.faults import eventually
from tests.support.mutations import broken_statement
from tests.support.writers import MODES, Writers

WRITERS: Final = 8
TRANSACTIONS: Final = 60
"""By each writer."""
HOT_KEYS: Final = ("hot-0", "hot-1", "hot-2")
STAGED_KEYS: Final = ("staged-A", "staged-A'", "staged-B", "staged-burst")
BOUNDS: Final = Bounds(max_events=4, max_bytes=1_000_000)
"""So small that a few transactions between two polls are a backlog of several pages."""

RECIPE_A: Final = "select position, payload from outbox.events where position > $1 order by position"
RECIPE_B: Final = """
select transaction_id, position, payload from outbox.events
 where transaction_id < pg_snapshot_xmin(pg_current_snapshot()) and (transaction_id, position) > ($1, $2)
 order by transaction_id, position
"""


# ---------------------------------------------------------------------------------------------- the three readers


def identity(row: Record) -> str:
    return str(json.loads(row["payload"])["identity"])


@dataclass(slots=True)
class RecipeA:
    connection: Connection
    delivered: list[str] = field(default_factory=list)
    last: int = 0

    async def poll(self) -> int:
        rows = await self.connection.fetch(RECIPE_A, self.last)
        self.delivered += map(identity, rows)
        self.last = max([self.last, *(row["position"] for row in rows)])
        return len(rows)


@dataclass(slots=True)
class RecipeB:
    connection: Connection
    delivered: list[str] = field(default_factory=list)
    last: tuple[int, int] = (0, 0)

    async def poll(self) -> int:
        rows = await self.connection.fetch(RECIPE_B, *self.last)
        self.delivered += map(identity, rows)
        if rows:
            self.last = rows[-1]["transaction_id"], rows[-1]["position"]
        return len(rows)


@dataclass(slots=True)
class Ours:
    """The relay's reading, short of Kafka; every other page of a backlog it crashes, and goes on from the log."""

    pool: Pool
    connection: Connection
    cursor: Snapshot
    delivered: list[str] = field(default_factory=list)
    rest: Span | None = None
    windows: list[tuple[Span, list[int]]] = field(default_factory=list)
    happened: Counter[str] = field(default_factory=Counter)

    async def poll(self) -> int:
        if self.rest is not None:
            return await self.page()
        found = await window.read(self.connection, 0, self.cursor, BOUNDS)
        if found is None:
            return 0
        if isinstance(found, TooLarge):
            return await self.page()
        return self.log(*found)

    async def page(self) -> int:
        count = 0
        async with (
            window.backlog(self.pool, 0, self.cursor, self.rest) as backlog,
            aclosing(backlog.pages(BOUNDS)) as pages,
        ):
            async for number, (span, rows) in aenumerate(pages):
                self.happened["page"] += 1
                count += self.log(span, rows)
                if number == 1 and span.through is not None:
                    self.happened["crash between pages"] += 1
                    self.rest = replace(backlog.span, after=span.through)
                    return count
        self.rest = None
        return count

    def log(self, span: Span, rows: Sequence[Record]) -> int:
        self.happened["window"] += 1
        self.windows.append((span, [row["position"] for row in rows]))
        self.delivered += map(identity, rows)
        if span.through is None:
            self.cursor = span.s2
        return len(rows)

    async def replayed(self) -> list[tuple[Span, list[int]]]:
        """The same windows as a successor reads them, long after."""
        return [
            (
                span,
                [
                    row["position"]
                    for row in await window.SQL.replay.fetch(
                        self.connection, 0, number, span.s1, span.s2, span.after, span.through
                    )
                ],
            )
            for number, (span, _) in enumerate(self.windows, 1)
        ]


async def aenumerate(pages: AsyncIterator[Any]) -> AsyncIterator[tuple[int, Any]]:
    number = 0
    async for page in pages:
        yield number, page
        number += 1


@asynccontextmanager
async def ours(pool: Pool) -> AsyncIterator[Ours]:
    async with pool.acquire() as connection:
        await window.SQL.prepare_session.execute(connection)
        resume = await window.load(connection, 0)
        yield Ours(pool, connection, resume.cursor)
        await connection.execute("reset all")


@dataclass(frozen=True, slots=True)
class Score:
    """One reader's deliveries against the truth."""

    lost: int
    duplicated: int
    inverted: int
    phantoms: int


def score(delivered: Sequence[str], truth: Mapping[str, tuple[str, int]]) -> Score:
    newest: Counter[str] = Counter()
    inverted = 0
    for one in delivered:
        key, version = truth.get(one, ("", 0))
        inverted += version < newest[key]
        newest[key] = max(newest[key], version)
    return Score(
        lost=len(truth.keys() - set(delivered)),
        duplicated=len(delivered) - len(set(delivered)),
        inverted=inverted,
        phantoms=len(set(delivered) - truth.keys()),
    )


CORRECT: Final = Score(lost=0, duplicated=0, inverted=0, phantoms=0)


# ------------------------------------------------------------------------------------------------------- the load


@pytest.fixture
async def pool(any_database: str) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(any_database, min_size=1, max_size=20) as pool:
        await migrate.up(pool)
        yield pool


class TwoPhaseWriters(Writers):
    """Also commits in two phases; through SQL emit, because asyncpg does not join a transaction begun by hand."""

    async def _write_prepared(self, connection: Connection, _: random.Random, key: str) -> None:
        name, identity = uuid4().hex, uuid4().hex
        await connection.execute("begin")
        await connection.execute(
            "with up as (update accounts set version = version + 1 where key = $1 returning version)"
            " insert into changes (key, version, identity) select $1, version, $2 from up",
            key,
            identity,
        )
        await connection.execute(
            "select outbox.emit('account.changed', $1, $2, jsonb_build_object('key', $2::text, 'identity', $3::text))",
            self.topic,
            key,
            identity,
        )
        await connection.execute(f"prepare transaction '{name}'")
        await connection.execute("select count(*) from accounts")
        await connection.execute(f"commit prepared '{name}'")


@pytest.fixture
async def writers(pool: Pool) -> TwoPhaseWriters:
    modes = dict(MODES)
    if await pool.fetchval("select current_setting('max_prepared_transactions')::int >= $1", WRITERS):
        modes["prepared"] = 3
    made = TwoPhaseWriters(pool, "topic", keys=(*HOT_KEYS, *STAGED_KEYS), modes=modes)
    await made.set_up()
    made.keys = HOT_KEYS
    return made


async def truth(pool: Pool) -> dict[str, tuple[str, int]]:
    rows = await pool.fetch("select identity, key, version from changes")
    return {row["identity"]: (row["key"], row["version"]) for row in rows}


async def stage_late_commit(writers: Writers, passed_by_a: Callable[[int], Awaitable[None]]) -> None:
    """A smaller position commits after recipe A has passed a larger one."""
    async with outbox.transaction(writers.pool) as late:
        # Inside a caller's transaction the unit of work flushes at its end: the position is taken, nothing committed.
        async with outbox.transaction(late.connection) as unit:
            await writers.change(unit, "staged-A")
        position = await late.fetchval(
            "select position from outbox.events where key = 'staged-A' and transaction_id = pg_current_xact_id()"
        )
        async with outbox.transaction(writers.pool) as early:
            await writers.change(early, "staged-A'")
        await passed_by_a(position)


async def stage_early_xid(writers: Writers) -> None:
    """The second writer of a key has the smaller transaction id."""
    async with outbox.transaction(writers.pool) as second:
        await second.execute("select pg_current_xact_id()")
        async with outbox.transaction(writers.pool) as first:
            await writers.change(first, "staged-B")
        await writers.change(second, "staged-B")


async def test_under_one_load_the_known_recipes_lose_and_invert_and_ours_does_neither(
    pool: Pool, writers: Writers
) -> None:
    """The commit-inversion test: 8 writers, hot keys, early xids, savepoints, 2PC, rollbacks, three readers."""
    ended = asyncio.Event()

    async with pool.acquire() as for_a, pool.acquire() as for_b, ours(pool) as mine:
        a, b = RecipeA(for_a), RecipeB(for_b)

        async def follow(reader: RecipeA | RecipeB | Ours) -> None:
            while not ended.is_set():
                await reader.poll()
            while await reader.poll():
                pass

        async def passed_by_a(position: int) -> None:
            async def look() -> bool:
                return a.last > position

            await eventually(look, what=f"recipe A passes position {position}")

        async def load() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for work in (
                        writers.run(writers=WRITERS, transactions=TRANSACTIONS),
                        stage_late_commit(writers, passed_by_a),
                        stage_early_xid(writers),
                        writers.burst(6 * BOUNDS.max_events, "staged-burst"),
                    ):
                        group.create_task(work)
            finally:
                ended.set()

        async with asyncio.TaskGroup() as group:
            for work in (load(), follow(a), follow(b), follow(mine)):
                group.create_task(work)
        facts = await truth(pool)

        async def b_is_through() -> bool:
            await b.poll()  # whatever else the cluster does, autovacuum included, has to end first
            return len(b.delivered) == len(facts)

        await eventually(b_is_through, what="recipe B has read everything")

        assert len(facts) > WRITERS * TRANSACTIONS / 2
        missing = [mode for mode in writers.modes if not writers.happened[mode]]
        assert not missing, f"did not happen: {missing}"
        assert min(mine.happened[name] for name in ("window", "page", "crash between pages")) > 0, mine.happened
        scores = {"A": score(a.delivered, facts), "B": score(b.delivered, facts), "ours": score(mine.delivered, facts)}
        assert scores["ours"] == CORRECT, scores
        assert scores["A"].lost > 0, scores
        assert scores["B"].inverted > 0, scores
        assert await mine.replayed() == mine.windows, "a window replays as it was read, whatever committed since"


# --------------------------------------------------------------------------------------- each rule, taken out once


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a statement, what stands there without it, and what goes wrong then."""

    statement: str
    text: LiteralString
    without: LiteralString
    symptom: str
    burst: int = 5 * BOUNDS.max_events


RULES: Final = {
    "read remembers who was in progress": Rule(
        "read", "e.transaction_id = x.id", "e.transaction_id = '1'", "lost", burst=0
    ),
    "backlog remembers who was in progress": Rule(
        "read_backlog", "e.transaction_id = x.id", "e.transaction_id = '1'", "lost"
    ),
    "the rest of a backlog ends at its s2": Rule(
        "read_backlog", "pg_visible_in_snapshot(r.transaction_id, $4)", "$4::pg_snapshot is not null", "duplicated"
    ),
    "the rest of a backlog starts behind its last page": Rule(
        "read_backlog", "r.position > $5", "$5::bigint is not null", "duplicated"
    ),
}


async def settle(reader: Ours) -> None:
    for _ in range(20):  # a reader without a rule may never come to an end
        if not await reader.poll():
            return


async def write_around_polls(pool: Pool, writers: Writers, reader: Ours, *, burst: int) -> Score:
    """A writer open over a poll; with a burst its event is read in pages, and the first crash comes before them."""
    async with outbox.transaction(pool) as late:
        await late.execute("select pg_current_xact_id()")
        await writers.write(random.Random(0), key="staged-A")  # moves s1 beyond the open writer
        await settle(reader)
        await writers.change(late, "staged-B")
    if burst:
        await writers.burst(burst, "staged-burst")
        await reader.poll()
        await writers.write(random.Random(0), key="staged-burst")  # belongs to no page of the crashed backlog
    await settle(reader)
    return score(reader.delivered, await truth(pool))


@pytest.mark.parametrize("kept", [True, False], ids=["rule kept", "rule removed"])
@pytest.mark.parametrize("name", RULES)
async def test_each_rule_of_reading_is_needed(
    pool: Pool,
    writers: Writers,
    name: str,
    kept: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    rule = RULES[name]
    async with ours(pool) as reader:
        if kept:
            assert await write_around_polls(pool, writers, reader, burst=rule.burst) == CORRECT
            return
        with broken_statement(window.SQL, rule.statement, rule.text, rule.without):
            found = await write_around_polls(pool, writers, reader, burst=rule.burst)
        assert getattr(found, rule.symptom) > 0, found


@pytest.mark.parametrize("kept", [True, False], ids=["rule kept", "rule removed"])
async def test_a_window_is_ordered_by_position_not_by_transaction(
    pool: Pool,
    writers: Writers,
    kept: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    async with ours(pool) as reader:
        await stage_early_xid(writers)
        if kept:
            await settle(reader)
        else:
            with broken_statement(
                window.SQL,
                "read",
                """and r.position = size.first then pg_current_snapshot() end as s2
  from found r cross join size
 where size.fits or r.position = size.first
 order by r.position""",
                """then pg_current_snapshot() end as s2
  from found r cross join size
 where size.fits or r.position = size.first
 order by r.transaction_id, r.position""",
            ):
                await settle(reader)
        found = score(reader.delivered, await truth(pool))
        assert found == (CORRECT if kept else replace(CORRECT, inverted=1))


# ------------------------------------------------------------------------------------------------- nobody stalls us


@pytest.mark.parametrize("elsewhere", ["writer in another database", "writer in this database", "reader"])
async def test_a_long_transaction_does_not_stall_the_relay(
    any_postgres: Databases, any_database: str, pool: Pool, writers: Writers, elsewhere: str
) -> None:
    """Recipe B stands still behind any open writer of the cluster; a long reader has no transaction id."""
    connection = await asyncpg.connect(any_postgres.dsn() if "another" in elsewhere else any_database)
    try:
        async with pool.acquire() as for_b, ours(pool) as mine:
            b = RecipeB(for_b)
            long = (
                connection.transaction(isolation="repeatable_read", readonly=True)
                if elsewhere == "reader"
                else connection.transaction()
            )
            await long.start()
            await connection.fetchval(
                "select count(*) from pg_class" if elsewhere == "reader" else "select pg_current_xact_id()"
            )
            await writers.write(random.Random(0), key="staged-A")
            assert await mine.poll() == 1, "read at once"
            if elsewhere == "reader":
                await eventually(b.poll, what="recipe B reads behind a reader")
            else:
                assert await b.poll() == 0, "recipe B would not stand still, so this test shows nothing"
                await writers.write(random.Random(0), key="staged-A")
                assert (await mine.poll(), await b.poll()) == (1, 0)
            if elsewhere == "writer in this database":
                async with outbox.transaction(connection) as tx:
                    await writers.change(tx, "staged-B")
            await long.commit()
            await settle(mine)
            facts = await truth(pool)

            async def b_is_through() -> bool:
                await b.poll()
                return len(b.delivered) == len(facts)

            await eventually(b_is_through, what="recipe B goes on")
            assert score(mine.delivered, facts) == CORRECT
    finally:
        await connection.close()
