"""Rebuilds: pages and live events in any order, resumed, begun again, refused."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from outbox import (
    OwnerError,
    OwnerPage,
    OwnerPageInvalid,
    OwnerUnavailable,
    Pool,
    SqlOwner,
    crash_sites,
    limits,
    transaction,
)
from outbox.cache import rebuild as rebuild_module
from outbox.cache.pages import Pages
from outbox.cache.rebuild import Progress, Rebuild, check_order
from outbox.errors import CacheNotFed, RebuildBusy
from tests.integration.test_cache import Everything, with_everything
from tests.support.caching import TABLE, TOPIC, AgentNamePatched, AgentTagged, feed, make_engine, rows
from tests.support.mutations import broken_statement
from tests.support.owning import QUERY, SmallRelay, create_agents, delete, owned, owned_cache, rename


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> Pool:
    await create_agents(log_pool)
    return log_pool


@pytest.fixture(autouse=True)
def _small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OWNER_PAGE_ROWS", 10)


async def agents(pool: Pool, count: int = 95) -> list[UUID]:
    """Agents that were there before anybody emitted events."""
    keys = sorted(uuid4() for _ in range(count))
    await pool.executemany("insert into agents (id, name) values ($1, $2)", [(key, f"agent {key}") for key in keys])
    return keys


async def state(pool: Pool) -> Any:
    return await pool.fetchrow(
        "select r.*, c.complete_log from outbox.caches c left join outbox.rebuilds r using (cache) where name = $1",
        TABLE,
    )


class Watched(SqlOwner):
    """Does something before it answers page n."""

    def __init__(self, pool: Pool, before: Any) -> None:
        super().__init__(pool, QUERY)
        self.pages = 0
        self.before = before

    async def page(self, after: object | None, limit: int) -> OwnerPage:
        self.pages += 1
        await self.before(self.pages)
        return await super().page(after, limit)


async def test_a_cache_is_filled_and_ghosts_are_gone(pool: Pool) -> None:
    await agents(pool)
    cache = owned_cache(pool)
    await make_engine(pool, cache)
    ghosts = [(uuid4(), "ghost", []) for _ in range(25)]
    await pool.copy_records_to_table(TABLE, records=ghosts, columns=["agent_id", "agent_name", "tags"])
    seen: list[Progress] = []
    done = await Rebuild(pool, cache).run(report=seen.append)
    assert await rows(pool) == await owned(pool)
    assert done == Progress(pages=10, rows=95, changed=95, removed=25, finished=True)
    assert [progress.pages for progress in seen] == list(range(1, 11))
    found = await state(pool)
    assert found["complete_log"] == await pool.fetchval("select log_id from outbox.logs")
    assert found["finished_at"] is not None
    assert found["lease_until"] is None
    assert await Rebuild(pool, cache).run(unless_complete=True) == Progress(finished=True)
    assert (await state(pool))["pages"] == 10
    assert (await Rebuild(pool, cache).run()).pages == 10, "asked for, it is done again"


async def test_an_empty_owner_empties_the_cache(pool: Pool) -> None:
    cache = owned_cache(pool)
    await make_engine(pool, cache)
    await pool.execute(f"insert into {TABLE} (agent_id, agent_name, tags) values ($1, 'ghost', '{{}}')", uuid4())
    assert await Rebuild(pool, cache).run() == Progress(pages=1, rows=0, changed=0, removed=1, finished=True)
    assert await rows(pool) == {}


async def test_live_events_between_any_pages(pool: Pool) -> None:
    """Events are written and applied before each page is read, to keys on both sides of the page."""
    keys = await agents(pool)
    relay = SmallRelay(pool)

    async def live(number: int) -> None:
        async with transaction(pool) as tx:
            for key in keys[number::11]:
                await rename(tx, key, f"live {number}")
            await delete(tx, keys[number * 7 % 95])
            await rename(tx, uuid4(), f"new {number}")
        if number % 3:
            await feed(engine, partition, await relay.publish())

    cache = owned_cache(pool, Watched(pool, live))
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    await Rebuild(pool, cache).run()
    await feed(engine, partition, await relay.publish())
    assert await rows(pool) == await owned(pool)


async def test_values_of_every_type_arrive_as_the_owner_has_them(pool: Pool) -> None:
    """Red with `_with_bytes` left out: the digits of bytea would be stored as text."""
    cache = await with_everything(pool)
    await pool.execute(
        "create table theirs (like everything including defaults);"
        "insert into theirs (id, flag, small, amount, label, born, seen, span, raw, mood, words, grid, ids, nested,"
        " anything)"
        " select n, n % 2 = 0, case n when 1 then 'NaN' when 2 then '-Infinity' else n / 3.0 end,"
        " 12345678901234567890.123456789 + n, nullif('label ' || n, 'label 2'), '2024-02-29',"
        " '2024-02-29 23:59:59.123456+05:30', make_interval(days => n, secs => 1.5), decode('00ff5c78', 'hex'),"
        " 'bad', array['a,b', null, '{\"'], '{{1,2},{3,4}}', array[gen_random_uuid()],"
        ' \'{"numbers": [1], "at": "2024-01-01T00:00:00Z"}\', \'{"a": [null, 1.5]}\' from generate_series(1, 15) n'
    )
    columns = ", ".join(name for name in Everything.model_fields if name != "last_synced_at")
    cache.owner = SqlOwner(pool, f"select {columns} from theirs")  # type: ignore[misc]
    await make_engine(pool, cache)
    assert (await Rebuild(pool, cache).run()).rows == 15
    comparable = columns.replace("nested", "nested::jsonb").replace("anything", "anything::jsonb")
    difference = f"select {comparable} from theirs except select {comparable} from everything"
    assert [tuple(row) for row in await pool.fetch(difference)] == []
    assert await cache.get(pool, 3) is not None


# -------------------------------------------------------------------------------------------------- hazards H16, H41


@pytest.mark.parametrize("event_first", [False, True])
async def test_a_page_that_was_read_while_an_older_event_was_in_flight_converges(
    pool: Pool, *, event_first: bool
) -> None:
    """H16, with a real owner: the older event has a lower position than what the page shows, and commits after it.

    Red with the position as the version: with `page_sees` in `merge_rows` replaced by a comparison of positions the
    event is rejected for ever. Red with `page_sees` in `merge_page` always true.
    """
    (key, other) = await agents(pool, 2)
    cache = owned_cache(pool)
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    relay = SmallRelay(pool)
    async with pool.acquire() as connection:
        slow = connection.transaction()
        await slow.start()
        async with transaction(connection) as tx:
            await rename(tx, key, "slow, with the lower position")
        async with transaction(pool) as tx:
            await rename(tx, other, "quick")
        page = await SqlOwner(pool, QUERY).page(None, 10)
        await slow.commit()
    records = await relay.publish()
    assert [record.key for record in records] == [str(key).encode(), str(other).encode()]
    stale = owned_cache(pool, Answering(pool, page))
    if event_first:
        await feed(engine, partition, records)
        await Rebuild(pool, stale).run()
    else:
        await Rebuild(pool, stale).run()
        await feed(engine, partition, records)
    assert await rows(pool) == await owned(pool)


async def test_a_key_that_a_page_lacks_is_not_revived_by_its_old_create(pool: Pool) -> None:
    """H41: created and deleted before the page; the create arrives after it, the deletion later still.

    Red with the ranges of pages not asked in `merge_rows`.
    """
    await agents(pool, 20)
    key = uuid4()
    cache = owned_cache(pool)
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    relay = SmallRelay(pool)
    async with transaction(pool) as tx:
        await rename(tx, key, "short-lived")
    create = await relay.publish()
    async with transaction(pool) as tx:
        await delete(tx, key)
    await Rebuild(pool, cache).run()
    await feed(engine, partition, create)
    assert key not in await rows(pool)
    await feed(engine, partition, await relay.publish())
    assert await rows(pool) == await owned(pool)
    async with transaction(pool) as tx:
        await rename(tx, key, "born again")
    await feed(engine, partition, await relay.publish())
    assert (await rows(pool))[key][0] == "born again"


class Answering(SqlOwner):
    """Gives one page that was read before."""

    def __init__(self, pool: Pool, page: OwnerPage) -> None:
        super().__init__(pool, QUERY)
        self._given = page

    async def page(self, after: object | None, limit: int) -> OwnerPage:  # noqa: ARG002
        return self._given


# ----------------------------------------------------------------------- rows that an event has changed before the page


class Overtaken(SqlOwner):
    """After each of its first answers, and before they are merged, a patch of a row is written and applied."""

    def __init__(self, pool: Pool, overtake: Callable[[int], Awaitable[None]]) -> None:
        super().__init__(pool, QUERY)
        self._overtake = overtake
        self.answers = 0

    async def page(self, after: object | None, limit: int) -> OwnerPage:
        return await self._overtaken(await super().page(after, limit))

    async def get_many(self, keys: Sequence[object]) -> OwnerPage:
        return await self._overtaken(await super().get_many(keys))

    async def _overtaken(self, page: OwnerPage) -> OwnerPage:
        self.answers += 1
        await self._overtake(self.answers)
        return page


async def rename_only(pool: Pool, key: UUID, name: str) -> None:
    """What the owner says of this change is the name alone."""
    async with transaction(pool) as tx:
        await tx.execute("update agents set name = $2 where id = $1", key, name)
        tx.emit(AgentNamePatched(agent_id=key, agent_name=name))


@pytest.mark.parametrize("times", [1, 2, 6])
async def test_a_lost_event_is_made_up_for_although_patches_overtake_the_page(pool: Pool, times: int) -> None:
    """The row is stale; the page that would mend it is older than a patch that was applied to the stale row.

    Red with the keys that a page was too late for not read again. However often a patch comes between, the last
    question is asked under the cache's lock: with six red with `_LOOSE_TRIES` made endless.
    """
    (key,) = await agents(pool, 1)
    relay = SmallRelay(pool)
    late: list[asyncio.Task[Any]] = []

    async def overtake(answer: int) -> None:
        if answer > times:
            return
        await rename_only(pool, key, f"patch {answer}")
        feeding = asyncio.create_task(feed(engine, partition, await relay.publish()))
        late.append(feeding)
        if answer <= 3:  # to the fourth, no batch is open
            await feeding

    owner = Overtaken(pool, overtake)
    cache = owned_cache(pool, owner)
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    async with transaction(pool) as tx:
        await rename(tx, key, "stale")
    await feed(engine, partition, await relay.publish())
    async with transaction(pool) as tx:
        await tx.execute("update agents set tags = '{lost}' where id = $1", key)
        tx.emit(AgentTagged(agent_id=key, tags=["lost"]))
    await relay.publish()  # Kafka deletes it before anybody has read it

    done = await Rebuild(pool, cache).run(free=True)
    await asyncio.gather(*late)
    assert (done.pages, done.rows, owner.answers) == (1, 1, min(times + 1, 4))
    assert await rows(pool) == await owned(pool)


# ---------------------------------------------------------------------------------------------- interrupted, resumed


class Killed(BaseException):
    """As kill -9 would, but for the process."""


async def test_it_goes_on_after_the_last_committed_page(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker dies while page 6 is merged; the next one waits for its lease and reads from page 6 on."""
    monkeypatch.setattr(limits, "REBUILD_LEASE_SECONDS", 0.5)
    await agents(pool)
    cache = owned_cache(pool)
    await make_engine(pool, cache)
    first = Rebuild(pool, cache)

    def die(progress: Progress) -> None:
        if progress.pages == 5:
            raise Killed

    with broken_statement(rebuild_module.SQL, "release", "lease_until = null", "lease_until = lease_until"):  # noqa: SIM117
        with pytest.raises(Killed):
            await first.run(report=die)
    assert (await state(pool))["pages"] == 5

    async def nothing(_: int) -> None: ...

    owner = Watched(pool, nothing)
    done = await Rebuild(pool, owned_cache(pool, owner)).run()
    assert (done.pages, done.rows, owner.pages) == (10, 95, 5)
    assert await rows(pool) == await owned(pool)


async def test_killed_at_any_statement_it_goes_on_and_ends_equal(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each statement of a rebuild of three pages, before and after it: nothing that follows is sent any more.

    The progress of a page that was not committed does not count, that of a committed one does.
    """
    monkeypatch.setattr(limits, "REBUILD_LEASE_SECONDS", 0.2)
    await agents(pool, 25)
    cache = owned_cache(pool)
    await make_engine(pool, cache)
    visits = 0
    last_visit = 0

    async def kill(name: str, side: str) -> None:
        nonlocal visits
        visits += name != "outbox.cache.rebuild.renew"  # which comes when it likes
        if last_visit and visits >= last_visit:
            raise Killed

    await Rebuild(pool, cache).run()  # the owner's query is described once
    monkeypatch.setattr(crash_sites, "hook", kill)
    await Rebuild(pool, cache).run()
    total = visits
    assert total > 40
    for last_visit in range(1, total, 2):
        monkeypatch.setattr(crash_sites, "hook", None)
        await pool.execute(f"truncate {TABLE}, outbox.rebuilds; update outbox.caches set complete_log = null")
        await pool.execute(f"insert into {TABLE} (agent_id, agent_name, tags) values ($1, 'ghost', '{{}}')", uuid4())
        visits = 0
        monkeypatch.setattr(crash_sites, "hook", kill)
        with pytest.raises(Killed):
            await Rebuild(pool, cache).run()
        monkeypatch.setattr(crash_sites, "hook", None)
        done = await Rebuild(pool, cache).run()
        assert (done.pages, done.rows, done.finished) == (3, 25, True), f"killed at visit {last_visit}"
        assert await rows(pool) == await owned(pool)


@pytest.mark.parametrize("page", [4, 10])
async def test_a_lost_reply_of_a_commit_costs_nothing(pool: Pool, monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    """In the middle it goes on behind the page; at the end it is done. Red with `done` not asked: all of it again."""
    await agents(pool)
    asked = 0

    async def count(_: int) -> None:
        nonlocal asked
        asked += 1

    cache = owned_cache(pool, Watched(pool, count))
    await make_engine(pool, cache)
    merged, merge = 0, Pages.merge

    async def loses_its_reply(self: Pages, *arguments: Any, **options: Any) -> Any:
        nonlocal merged
        found = await merge(self, *arguments, **options)
        merged += 1
        if merged == page:
            raise ConnectionResetError
        return found

    monkeypatch.setattr(Pages, "merge", loses_its_reply)
    done = await Rebuild(pool, cache).run()
    assert (done.pages, done.rows, done.finished, merged) == (10, 95, True, 10)
    assert await rows(pool) == await owned(pool)


async def test_one_worker_at_a_time(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second worker is told who works; a first one that was taken over commits no page more.

    Red with `r.worker = $2` removed from `moved`: the former worker goes on, and moves the row back.
    """
    monkeypatch.setattr(limits, "REBUILD_LEASE_SECONDS", 0.5)
    await agents(pool)
    waiting, go_on = asyncio.Event(), asyncio.Event()

    async def stop_at_4(number: int) -> None:
        if number == 4:
            waiting.set()
            await go_on.wait()

    cache = owned_cache(pool, Watched(pool, stop_at_4))
    await make_engine(pool, cache)
    first = asyncio.create_task(Rebuild(pool, cache).run())
    await waiting.wait()
    with pytest.raises(RebuildBusy, match="outbox cache status"):
        await Rebuild(pool, owned_cache(pool)).run()
    await pool.execute("update outbox.rebuilds set worker = 'somebody else', lease_until = now() + interval '9 s'")
    go_on.set()
    with pytest.raises(RebuildBusy, match="taken over"):
        await first
    assert (await state(pool))["pages"] == 3
    assert (await state(pool))["worker"] == "somebody else"


async def test_a_new_log_of_the_owner_begins_again(pool: Pool) -> None:
    """Red with `_check_log` not called: the table would be complete with pages of two logs."""
    keys = await agents(pool)

    async def adopt(number: int) -> None:
        if number == 6:
            await pool.execute("update outbox.logs set is_current = false")
            await pool.execute("select outbox.open_log(1::smallint, (select max(ordinal) + 1 from outbox.logs))")
            await pool.execute("delete from agents where id = $1", keys[0])

    owner = Watched(pool, adopt)
    cache = owned_cache(pool, owner)
    await make_engine(pool, cache)
    done = await Rebuild(pool, cache).run()
    assert owner.pages > 10
    assert (done.pages, done.rows) == (10, 94)
    assert await rows(pool) == await owned(pool)
    assert (await state(pool))["complete_log"] == await pool.fetchval("select log_id from outbox.logs where is_current")


async def test_a_page_of_an_older_log_is_refused(pool: Pool) -> None:
    await agents(pool, 5)
    cache = owned_cache(pool)
    await make_engine(pool, cache)
    await Rebuild(pool, cache).run()
    page = await SqlOwner(pool, QUERY).page(None, 10)
    await pool.execute("update outbox.rebuilds set finished_at = null, log_id = 'fffffffffff-0000'")
    with pytest.raises(OwnerUnavailable, match="see which is right"):
        await Rebuild(pool, owned_cache(pool, Answering(pool, page))).run()


async def test_a_page_below_the_floor_is_read_again(pool: Pool) -> None:
    """Red with PageRefused not caught in `run`."""
    await agents(pool)
    old = await SqlOwner(pool, QUERY).page(None, 10)
    for _ in range(3):
        await pool.execute("select pg_current_xact_id()")

    class OldOnce(Watched):
        async def page(self, after: object | None, limit: int) -> OwnerPage:
            page = await super().page(after, limit)
            return page if self.pages > 1 else old

    async def nothing(_: int) -> None: ...

    cache = owned_cache(pool, OldOnce(pool, nothing))
    await make_engine(pool, cache)
    await pool.execute(
        "update outbox.caches set floor_log = $1, floor_xid = pg_snapshot_xmin(pg_current_snapshot())", old.log
    )
    assert (await Rebuild(pool, cache).run()).rows == 95
    assert await rows(pool) == await owned(pool)


async def test_halted_partitions_are_set_free_and_begin_the_rebuild_again(pool: Pool) -> None:
    """Pages from before a partition lost records do not count.

    Red with the rebuilds left alone by `free`, and with `halted` not asked at the end.
    """
    keys = await agents(pool)
    relay = SmallRelay(pool)

    async def lose(number: int) -> None:
        if number == 8:
            async with transaction(pool) as tx:
                await rename(tx, keys[0], "the event of this is lost")
            await relay.publish()
            await pool.execute("update outbox.positions set state = 'needs_rebuild' where partition = 0")

    owner = Watched(pool, lose)
    cache = owned_cache(pool, owner)
    engine = await make_engine(pool, cache)
    for number in range(3):
        await engine.claim(TOPIC, number, 0)
    await pool.execute("update outbox.positions set state = 'recreated' where partition = 1")
    await pool.execute(
        "insert into outbox.rebuilds (cache, log_id, after_key, pages) select cache, $1, $2, 9 from outbox.caches",
        await pool.fetchval("select log_id from outbox.logs"),
        str(keys[80]),
    )
    await Rebuild(pool, cache).run(free=True)
    assert await rows(pool) == await owned(pool)
    states = await pool.fetch("select state from outbox.positions order by partition")
    assert [row["state"] for row in states] == ["restarting", "restarting", "running"]
    assert (await state(pool))["complete_log"] is not None


async def test_without_the_word_a_halted_partition_stays_halted(pool: Pool) -> None:
    await agents(pool, 5)
    cache = owned_cache(pool)
    engine = await make_engine(pool, cache)
    await engine.claim(TOPIC, 0, 0)
    await pool.execute("update outbox.positions set state = 'needs_rebuild'")
    await Rebuild(pool, cache).run()
    assert await pool.fetchval("select state from outbox.positions") == "needs_rebuild"


# ------------------------------------------------------------------------------------------------------------ refused


async def test_a_cache_without_owner_or_consumer_is_explained(pool: Pool) -> None:
    cache = owned_cache(pool)
    with pytest.raises(CacheNotFed, match="start the consumer"):
        await Rebuild(pool, cache).run()
    cache.owner = None  # type: ignore[misc]
    with pytest.raises(OwnerError, match="has no owner"):
        Rebuild(pool, cache)


def page_of(*keys: object, last: bool = True) -> OwnerPage:
    return OwnerPage(log="1-0000", snapshot="1:1:", rows=[{"id": key} for key in keys], last=last)


ONE, TWO = str(UUID(int=1)), str(UUID(int=2))


@pytest.mark.parametrize(
    ("keys", "key_type", "after"),
    [
        ((ONE, TWO), UUID, None),
        ((TWO.upper(),), UUID, ONE),
        ((9, 10, 11), int, "8"),
        (("10", "11", "9", "B", "a", "ä"), str, None),
        ((), str, "x"),
    ],
)
def test_keys_in_order_pass(keys: tuple[object, ...], key_type: type, after: str | None) -> None:
    assert check_order(page_of(*keys), "id", key_type, after) == [str(key) for key in keys]


@pytest.mark.parametrize(
    ("keys", "key_type", "after", "says"),
    [
        ((TWO, ONE), UUID, None, "does not follow"),
        ((ONE,), UUID, ONE, "does not follow"),
        ((ONE, ONE), UUID, None, "does not follow"),
        (("no",), UUID, None, "no uuid"),
        ((9, 10), str, None, "has to be text"),
        (("9", "10"), int, None, "has to be a number"),
        ((True,), int, None, "has to be a number"),
        (("9", "10"), str, None, "does not follow"),
        (("a", "B"), str, None, "does not follow"),
        ((None,), str, None, "no key of this cache"),
        ((1,), int, "1", "does not follow"),
    ],
)
def test_keys_out_of_order_would_delete_rows(
    keys: tuple[object, ...], key_type: type, after: str | None, says: str
) -> None:
    with pytest.raises(OwnerPageInvalid, match=says) as caught:
        check_order(page_of(*keys), "id", key_type, after)
    assert caught.value.field == "id"
