"""How fresh a cache is known to be: H18 on the consumer's side, each rule beside what goes wrong without it.

Watermarks are made by hand here; test_relay_watermarks has those of relays, and the last tests have all of it together.
"""

import json
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import pytest
import pytest_asyncio

from outbox import Cache, OwnerPage, Pool, Stale, StaleReason
from outbox.cache import freshness
from outbox.cache.pages import Pages
from outbox.consumer import watermarks
from outbox.consumer.apply import Engine
from outbox.consumer.watermarks import Watermarks
from outbox.errors import OwnerRowInvalid, PageRefused
from outbox.settings import Settings
from tests.support.caching import (
    LOG,
    NEWER_LOG,
    TABLE,
    TOPIC,
    AgentDeleted,
    AgentRenamed,
    CachedAgent,
    Kafka,
    Rec,
    consume,
    create_table,
    make_cache,
    make_engine,
    numbered,
)
from tests.support.handmade import page, pages_of
from tests.support.mutations import broken_statement

RULE: Final = pytest.mark.parametrize("rule", ["kept", "removed"])
SKEW: Final = 0.5
AGENT, OTHER, ABSENT = (UUID(int=n) for n in (1, 2, 3))


@dataclass(slots=True)
class Mark:
    """A watermark in Kafka; `age` seconds old."""

    age: float = 0.0
    offsets: dict[int, int] = field(default_factory=lambda: {0: 2})
    shard: int = 0
    shard_count: int = 1
    log_id: str = LOG
    parked: list[int] = field(default_factory=list)
    oldest_xid: int = 5_000
    topic: str = TOPIC

    def record(self) -> Rec:
        as_of = datetime.now(UTC) - timedelta(seconds=self.age)
        body = {
            "as_of": as_of.isoformat(),
            "oldest_xid": self.oldest_xid,
            "shard": self.shard,
            "shard_count": self.shard_count,
            "next_offsets": {self.topic: self.offsets},
            "parked": self.parked,
        }
        sent = int(datetime.now(UTC).timestamp() * 1000)
        return Rec(0, f"{self.log_id}/{self.shard}".encode(), json.dumps(body).encode(), timestamp=sent)


@dataclass(slots=True)
class Scene:
    """One cache with two applied events, and what follows the watermarks."""

    pool: Pool
    engine: Engine
    cache: Cache[CachedAgent]
    following: Watermarks

    async def hear(self, *marks: Mark) -> bool:
        return await self.following.take([mark.record() for mark in marks])

    async def lag(self) -> float | None:
        """How old the cache is known to be, at most, in seconds."""
        lag: float | None = await self.pool.fetchval(
            "select date_part('epoch', clock_timestamp() - complete_as_of) from outbox.freshness"
        )
        return lag

    async def reach(self, partition: int, next_offset: int, state: str = "running") -> None:
        await self.pool.execute(
            "insert into outbox.positions (consumer, topic, partition, next_offset, owner, state)"
            " values ('workflow', $1, $2, $3, 'test', $4) on conflict (consumer, topic, partition)"
            " do update set next_offset = excluded.next_offset, state = excluded.state",
            TOPIC, partition, next_offset, state,
        )  # fmt: skip

    async def pending(self) -> Sequence[float]:
        """The ages of the watermarks that are kept, the oldest first."""
        rows = await self.pool.fetch(
            "select date_part('epoch', clock_timestamp() - as_of) as age from outbox.watermarks order by as_of"
        )
        return [row["age"] for row in rows]

    async def get(self, within: float = 5.0, key: UUID = AGENT) -> CachedAgent | None:
        return await self.cache.get(self.pool, key, fresh_within=within)

    async def doubt(self, within: float = 5.0, key: UUID = AGENT) -> tuple[StaleReason, float]:
        with pytest.raises(Stale) as stale:
            await self.get(within, key)
        return stale.value.reason, stale.value.lag_seconds


def following(pool: Pool, *topics: str) -> Watermarks:
    settings = Settings(max_clock_skew_seconds=SKEW)
    return Watermarks(pool, "nowhere:1", "workflow", topics or [TOPIC], settings)


@pytest_asyncio.fixture
async def scene(log_pool: Pool) -> AsyncIterator[Scene]:
    await create_table(log_pool)
    cache = make_cache()
    engine = await make_engine(log_pool, cache)
    await consume(
        engine, numbered([AgentRenamed(agent_id=AGENT, agent_name="a"), AgentRenamed(agent_id=OTHER, agent_name="b")])
    )
    yield Scene(log_pool, engine, cache, following(log_pool))


# -------------------------------------------------------------------------------------------------- reading


async def test_a_row_is_as_fresh_as_the_watermark_that_was_applied(scene: Scene) -> None:
    assert await scene.doubt() == (StaleReason.UNKNOWN, math.inf)
    assert not await scene.hear(Mark(age=2))
    row = await scene.get()
    assert row is not None
    assert row.agent_name == "a"
    assert await scene.get(key=ABSENT) is None
    reason, lag = await scene.doubt(within=1.0)
    assert reason is StaleReason.BEHIND
    assert 2.5 <= lag < 60
    rows = await scene.cache.get_many(scene.pool, [AGENT, OTHER, ABSENT], fresh_within=timedelta(seconds=5))
    assert sorted(row.agent_name for row in rows) == ["a", "b"]
    with pytest.raises(Stale):
        await scene.cache.get_many(scene.pool, [AGENT], fresh_within=1)
    row = await scene.cache.get(scene.pool, AGENT)
    assert row is not None, "without fresh_within nothing is asked"


async def test_a_stopped_relay_is_noticed_although_nothing_lags(scene: Scene) -> None:
    """Every record is applied, and no watermark comes any more: the age alone tells."""
    await scene.hear(Mark(age=6))
    assert not await scene.hear()
    assert (await scene.doubt())[0] is StaleReason.BEHIND


class Owner:
    """An owner of one agent; it takes one key at a time."""

    def __init__(self, **columns: Any) -> None:
        self.asked: list[object] = []
        self.columns = columns

    async def page(self, after: object | None, limit: int) -> OwnerPage:
        raise NotImplementedError

    async def get(self, key: object) -> OwnerPage:
        self.asked.append(key)
        row = {"agent_id": str(key), "agent_name": "of the owner", "tags": [], **self.columns}
        return OwnerPage(log=LOG, snapshot="1:1:", rows=[row] if key == AGENT else [], last=True)


async def test_the_owner_answers_where_the_cache_cannot(scene: Scene) -> None:
    """Not filled from its pages yet; then filled and fresh; then old."""
    owner = Owner()
    owned = Cache(CachedAgent, table=TABLE, key="agent_id", topic=TOPIC, owner=owner)
    await scene.hear(Mark())

    async def names(*keys: UUID) -> list[str]:
        rows = await owned.get_many(scene.pool, keys, fresh_within=5)
        return sorted(row.agent_name for row in rows)

    row = await owned.get(scene.pool, AGENT, fresh_within=5)
    assert row is not None
    assert row.agent_name == "of the owner"
    assert await owned.get(scene.pool, ABSENT, fresh_within=5) is None
    assert await names(AGENT, ABSENT) == ["of the owner"]
    assert owner.asked[:2] == [AGENT, ABSENT]
    await scene.pool.execute("update outbox.caches set complete_log = $1", LOG)
    assert await names(AGENT, OTHER) == ["a", "b"]
    await scene.pool.execute("update outbox.freshness set parked = array[outbox.key_hash($1, $2)]", TOPIC, str(AGENT))
    assert await names(AGENT, OTHER) == ["b", "of the owner"]


async def test_an_owners_row_that_does_not_fit_is_no_answer(scene: Scene) -> None:
    owned = Cache(CachedAgent, table=TABLE, key="agent_id", topic=TOPIC, owner=Owner(tags=None))
    with pytest.raises(OwnerRowInvalid, match="tags") as caught:
        await owned.get(scene.pool, AGENT, fresh_within=5)
    assert "input_value" not in str(caught.value), "what the owner has is nobody's business in a log"
    assert caught.value.__cause__ is None


# ------------------------------------------------------------------------------------------------------ H18


@RULE
@pytest.mark.parametrize("parker", ["the owner's relay", "this cache"])
async def test_h18_a_parked_key_is_stale_whatever_the_watermark_says(scene: Scene, parker: str, rule: str) -> None:
    """Seen red: without one of the two looks for parked keys."""
    key_hash = await scene.pool.fetchval("select outbox.key_hash($1, $2)", TOPIC, str(AGENT))
    if parker == "this cache":
        await scene.pool.execute(
            "insert into outbox.parked_keys (parker, topic, key, reason, detail) values ($1, $2, $3, '-', '-')",
            TABLE, TOPIC, str(AGENT),
        )  # fmt: skip
        look = ("k.parker = $3", "p.parker = $3")
    else:
        look = ("= any (f.parked)", "= any (known.parked)")
    await scene.hear(Mark(parked=[key_hash] if parker != "this cache" else []))
    if rule == "kept":
        assert (await scene.doubt())[0] is StaleReason.PARKED
        with pytest.raises(Stale):
            await scene.cache.get_many(scene.pool, [AGENT, OTHER], fresh_within=5)
        assert await scene.get(key=OTHER) is not None
        return
    with (
        broken_statement(freshness.SQL, "one", look[0], f"{look[0]} and false"),  # type: ignore[arg-type]
        broken_statement(freshness.SQL, "many", look[1], f"{look[1]} and false"),  # type: ignore[arg-type]
    ):
        scene.cache = make_cache()
        assert await scene.get() is not None
        assert len(await scene.cache.get_many(scene.pool, [AGENT, OTHER], fresh_within=5)) == 2


@RULE
async def test_h18_a_shard_that_nobody_has_heard_of(scene: Scene, rule: str) -> None:
    """Seen red: the minimum over those shards that have spoken."""
    removed = "" if rule == "kept" else "or true"
    with broken_statement(
        watermarks.SQL,
        "advance",
        "having count(*) = l.shard_count",
        f"having count(*) = l.shard_count {removed}",  # type: ignore[arg-type]
    ):
        await scene.hear(Mark(shard=0, shard_count=2))
        if rule == "removed":
            assert await scene.lag() is not None
            return
        assert await scene.doubt() == (StaleReason.UNKNOWN, math.inf)
        await scene.hear(Mark(shard=1, shard_count=2, topic="another-topic", age=3))
    lag = await scene.lag()
    assert lag is not None
    assert 3.5 <= lag < 60, "the oldest shard counts, though it has never published to the topic"


@RULE
async def test_h18_the_clocks_may_differ(scene: Scene, rule: str) -> None:
    """Seen red: without the allowance for the skew of the clocks."""
    removed = "" if rule == "kept" else " * 0"
    text = "- make_interval(secs => $3)"
    with broken_statement(watermarks.SQL, "advance", text, f"{text}{removed}"):  # type: ignore[arg-type]
        await scene.hear(Mark(age=10))
    lag = await scene.lag()
    assert lag is not None
    assert (lag >= 10 + SKEW) == (rule == "kept")


@RULE
async def test_h18_a_clock_that_is_ahead_is_not_believed(
    scene: Scene, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An owner's clock that is a minute ahead makes its watermarks look fresh for a minute longer than they are.

    Where the relay's clock, by which records are stamped, is right, it tells at once; where that is ahead too, this
    database's does. Seen red: without either comparison.
    """
    owners = Mark(age=-60).record()
    both = Mark(age=-60).record()
    both.timestamp += 60_000
    if rule == "kept":
        await scene.following.take([owners, owners, both])
        assert await scene.doubt() == (StaleReason.UNKNOWN, math.inf)
        assert caplog.text.count("clock is 60.0 s ahead") == 1
        return
    text = "x.as_of <= clock_timestamp() + make_interval(secs => $4)"
    with broken_statement(watermarks.SQL, "store", text, "make_interval(secs => $4) is not null"):
        await scene.following.take([owners])
        assert await scene.doubt() == (StaleReason.UNKNOWN, math.inf), "the one comparison"
        await scene.following.take([both])
        assert await scene.get(within=-30) is not None, "the other"


@RULE
@pytest.mark.parametrize("fault", ["no position", "position below", "stands still"])
async def test_h18_a_listed_partition_that_is_not_applied(scene: Scene, fault: str, rule: str) -> None:
    """Seen red: a partition without a row taken for applied; the offset not compared; the state not asked."""
    rules = {
        "no position": ("coalesce(o.next_offset >= p.next_offset and o.state = 'running', false)",
                        "coalesce(o.next_offset >= p.next_offset and o.state = 'running', true)"),
        "position below": ("o.next_offset >= p.next_offset", "o.next_offset >= 0"),
        "stands still": ("o.state = 'running'", "true"),
    }  # fmt: skip
    text, without = rules[fault]
    if fault == "position below":
        await scene.reach(1, 6)
    elif fault == "stands still":
        await scene.reach(1, 7, "needs_rebuild")
    with broken_statement(watermarks.SQL, "advance", text, text if rule == "kept" else without):  # type: ignore[arg-type]
        is_waiting = await scene.hear(Mark(offsets={0: 2, 1: 7}))
        assert is_waiting == (rule == "kept")
        if rule == "removed":
            assert await scene.get() is not None
            return
        assert await scene.doubt() == (StaleReason.UNKNOWN, math.inf)
        await scene.reach(1, 7)
        assert not await scene.hear()
        assert await scene.get() is not None


# ------------------------------------------------------------------------------------------------ watermarks


async def test_the_newest_applied_one_counts_and_older_ones_go(scene: Scene) -> None:
    await scene.hear(Mark(age=40), Mark(age=30), Mark(age=20), Mark(age=10, offsets={0: 3}), Mark(offsets={0: 4}))
    lag = await scene.lag()
    assert lag is not None
    assert 20 < lag < 30
    assert [round(age, -1) for age in await scene.pending()] == [20, 10, 0]
    await scene.reach(0, 4)
    assert not await scene.hear()
    assert len(await scene.pending()) == 1
    await scene.hear(Mark(age=15))
    assert len(await scene.pending()) == 1, "superseded ones, read again by another process, are not taken up"
    lag = await scene.lag()
    assert lag is not None
    assert lag < 10


@RULE
async def test_a_topic_that_was_recreated_proves_nothing(scene: Scene, rule: str) -> None:
    """The position is beyond what the new topic holds, and is not of it.

    Seen red: without the comparison with earlier watermarks of the shard.
    """
    removed = "i.is_lower is not true" if rule == "kept" else "true"
    with broken_statement(watermarks.SQL, "advance", "i.is_lower is not true", removed):  # type: ignore[arg-type]
        await scene.hear(Mark(age=60))
        await scene.hear(Mark(offsets={0: 1}))
    lag = await scene.lag()
    assert lag is not None
    assert (lag > 60) == (rule == "kept")


async def test_freshness_begins_anew_with_a_partition_that_was_set_free(scene: Scene) -> None:
    """After `outbox cache rebuild` the topic's new offsets count, though they are lower."""
    await scene.hear(Mark(age=60))
    await scene.pool.execute("update outbox.positions set state = 'restarting'")
    partition = await scene.engine.claim(TOPIC, 0, 0)
    await scene.engine.restart(partition, 0)
    assert await scene.doubt() == (StaleReason.UNKNOWN, math.inf)
    await scene.hear(Mark(offsets={0: 1}))
    assert await scene.lag() is None
    await scene.reach(0, 1)
    await scene.hear()
    assert await scene.lag() is not None


async def test_older_logs_and_shards_that_are_no_more_do_not_count(scene: Scene) -> None:
    await scene.hear(Mark(age=9, shard=0, shard_count=2), Mark(age=20, shard=1, shard_count=2))
    lag = await scene.lag()
    assert lag is not None
    assert lag > 20
    await scene.hear(Mark(age=3))
    lag = await scene.lag()
    assert lag is not None
    assert lag < 9, "one shard from now on"
    await scene.hear(Mark(age=2, log_id=NEWER_LOG), Mark(age=1))
    assert await scene.pool.fetchval("select log_id from outbox.freshness") == NEWER_LOG
    assert await scene.pool.fetchval("select array_agg(distinct log_id) from outbox.watermarks") == [NEWER_LOG]
    await scene.hear(Mark())
    assert await scene.pool.fetchval("select log_id from outbox.freshness") == NEWER_LOG


async def test_freshness_never_goes_back(scene: Scene) -> None:
    """Not even where the watermarks that it is from are gone."""
    await scene.hear(Mark())
    await scene.pool.execute("delete from outbox.watermarks")
    await scene.hear(Mark(age=50))
    lag = await scene.lag()
    assert lag is not None
    assert lag < 50


async def test_pending_watermarks_are_thinned(scene: Scene) -> None:
    """A consumer that lags for an hour keeps the oldest, the newest, and some between."""
    ages = range(400, 0, -2)
    for age in ages:
        await scene.hear(Mark(age=age, offsets={0: 1_000}))
    kept = await scene.pending()
    assert 32 <= len(kept) <= 64
    assert kept[0] > 399
    assert kept[-1] < 60
    await scene.reach(0, 1_000)
    await scene.hear()
    assert len(await scene.pending()) == 1


async def test_other_services_watermarks_and_broken_ones_are_left_alone(scene: Scene) -> None:
    good = Mark().record()
    assert good.value is not None
    body = json.loads(good.value)
    broken = [
        Rec(0, None, good.value),
        Rec(0, good.key, None),
        Rec(0, b"not-a-log/0", good.value),
        Rec(0, f"{LOG}/1".encode(), good.value),
        Rec(0, good.key, b"{"),
        *(
            Rec(0, good.key, json.dumps(body | change).encode())
            for change in (
                {"as_of": "yesterday"}, {"as_of": "2026-01-01T00:00:00"}, {"oldest_xid": -1}, {"shard_count": 0},
                {"next_offsets": {"a\x00b": {"0": 1}, TOPIC: {"0": 1}}}, {"next_offsets": {TOPIC: {"x": 1}}},
                {"next_offsets": {TOPIC: {"0": 2**63}}}, {"parked": ["x"]}, {"parked": [2**63]},
            )
        ),
    ]  # fmt: skip
    for record in broken:
        record.timestamp = good.timestamp
    await scene.following.take(broken)
    await scene.hear(Mark(topic="somebody-elses", log_id=NEWER_LOG))
    assert not await scene.pending()
    await scene.following.take([*broken, good, good])
    assert len(await scene.pending()) == 1


async def test_two_topics_of_two_owners_are_told_apart(scene: Scene) -> None:
    """Each topic has the newest log that names it, and only its own."""
    scene.following = following(scene.pool, TOPIC, "orders")
    await scene.pool.execute(
        "insert into outbox.positions (consumer, topic, partition, next_offset, owner)"
        " values ('workflow', 'orders', 0, 9, '')"
    )
    await scene.hear(Mark(age=3), Mark(age=5, topic="orders", log_id=NEWER_LOG))
    rows = await scene.pool.fetch("select topic, log_id from outbox.freshness order by topic")
    assert [tuple(row) for row in rows] == [(TOPIC, LOG), ("orders", NEWER_LOG)]
    assert len(await scene.pending()) == 2


# -------------------------------------------------------------------------------------------------- adoption


@RULE
async def test_after_an_adoption_nothing_is_fresh_until_the_cache_is_whole_again(scene: Scene, rule: str) -> None:
    """What the restored database has lost is in the cache still.

    Seen red: without the comparison of the logs.
    """
    owned = Cache(CachedAgent, table=TABLE, key="agent_id", topic=TOPIC, owner=Owner())
    await scene.pool.execute("update outbox.caches set complete_log = $1", LOG)
    text, without = (
        ("h.complete_log = f.log_id", "f.log_id is not null") if rule == "removed" else ("$4::boolean", "$4::boolean")
    )
    with broken_statement(freshness.SQL, "one", text, without):  # type: ignore[arg-type]
        await scene.hear(Mark(log_id=NEWER_LOG))
        row = await owned.get(scene.pool, AGENT, fresh_within=5)
        assert row is not None
        assert row.agent_name == ("of the owner" if rule == "kept" else "a")
        assert await scene.doubt() == (StaleReason.INCOMPLETE, math.inf), "without an owner nothing proves it"
        await scene.pool.execute("update outbox.caches set complete_log = $1", NEWER_LOG)
        row = await owned.get(scene.pool, AGENT, fresh_within=5)
        assert row is not None
        assert row.agent_name == "a"


@RULE
@pytest.mark.parametrize("gap", ["made anew", "joined late", "freed", "deleted before"])
async def test_a_cache_that_lacks_events_is_never_fresh_without_an_owner(scene: Scene, gap: str, rule: str) -> None:
    """Its table was made anew; its consumer had begun without it; its partition lost records, later or at first.

    Seen red: without `has_gap` in the statement `one`.
    """
    if gap in {"made anew", "joined late"}:
        await scene.pool.execute(f"drop table {TABLE}")
        if gap == "joined late":
            await scene.pool.execute("delete from outbox.caches")
        await create_table(scene.pool)
        await make_engine(scene.pool, make_cache())
    elif gap == "freed":
        await scene.pool.execute("update outbox.positions set state = 'restarting'")
        await scene.engine.restart(await scene.engine.claim(TOPIC, 0, 2), 2)
    else:
        await scene.engine.claim(TOPIC, 1, 7)
    await scene.hear(Mark())
    text, without = "f.is_only_log and not h.has_gap", "f.is_only_log"
    with broken_statement(freshness.SQL, "one", text, text if rule == "kept" else without):  # type: ignore[arg-type]
        scene.cache = make_cache()
        if rule == "kept":
            assert await scene.doubt() == (StaleReason.INCOMPLETE, math.inf)
        else:
            await scene.get()


# ------------------------------------------------------------------------------------------------ forgetting


@dataclass(slots=True)
class Remembered:
    """What a cache remembers beside its rows."""

    pages: int
    tombstones: int
    floor: int | None


async def remembered(pool: Pool) -> Remembered:
    row = await pool.fetchrow(
        "select (select count(*) from outbox.pages) as pages, (select count(*) from outbox.tombstones) as tombstones,"
        " (select floor_xid::text::bigint from outbox.caches) as floor"
    )
    assert row is not None
    return Remembered(**row)


async def merge_all(owner: Pages, xmax: int, open_ids: Sequence[int] = (), *, log_id: str = LOG) -> None:
    """A page that holds nothing and speaks for all keys."""
    await owner.merge(page([], xmax, open_ids, log_id=log_id), after=None, through=None)


async def test_pages_are_forgotten_when_all_that_they_do_not_see_is_applied(scene: Scene) -> None:
    owner = await pages_of(scene.pool, scene.cache)
    await merge_all(owner, 1_500, [1_400])
    await merge_all(owner, 3_000)
    assert await remembered(scene.pool) == Remembered(2, 0, None)
    await scene.hear(Mark(oldest_xid=1_499))
    assert await scene.following.forget(kept_seconds=0) == (0, 0)
    await scene.hear(Mark(oldest_xid=1_500))
    assert await scene.following.forget() == (0, 0), "whoever waits for a receipt may still look"
    assert await scene.following.forget(kept_seconds=0) == (1, 0)
    assert await remembered(scene.pool) == Remembered(1, 0, 1_500)
    with pytest.raises(PageRefused):
        await merge_all(owner, 2_000, [1_499])
    await merge_all(owner, 2_000, [1_500])


@RULE
async def test_deletions_are_forgotten_and_an_older_page_stays_out(scene: Scene, rule: str) -> None:
    """Seen red: a floor that does not rise lets an old page bring the deleted row back."""
    owner = await pages_of(scene.pool, scene.cache)
    kafka = numbered([AgentRenamed(agent_id=AGENT, agent_name="a"), AgentRenamed(agent_id=OTHER, agent_name="b"),
                      AgentDeleted(agent_id=AGENT)])  # fmt: skip
    await consume(scene.engine, kafka)
    assert (await remembered(scene.pool)).tombstones == 1
    await scene.hear(Mark(oldest_xid=1_003, offsets={0: 3}))
    assert await scene.following.forget(kept_seconds=0) == (0, 0), "1003 deleted it"
    await scene.hear(Mark(oldest_xid=1_004, offsets={0: 3}))
    before = page([(AGENT, "a"), (OTHER, "b")], 2_000, [1_003])
    text = "floor_log = k.log_id, floor_xid = x.floor::text::xid8, "
    with broken_statement(watermarks.SQL, "forget", text, text if rule == "kept" else ""):
        assert await scene.following.forget(kept_seconds=0) == (0, 1)
    if rule == "kept":
        assert await remembered(scene.pool) == Remembered(0, 0, 1_004)
        with pytest.raises(PageRefused):
            await owner.merge(before, after=None, through=None)
        assert await scene.get() is None
    else:
        await owner.merge(before, after=None, through=None)
        assert await scene.cache.get(scene.pool, AGENT) is not None, "what the rule is for"


async def test_the_deletion_of_a_page_is_forgotten_with_the_page(scene: Scene) -> None:
    owner = await pages_of(scene.pool, scene.cache)
    await owner.merge_keys(page([], 3_000), [AGENT])
    assert await remembered(scene.pool) == Remembered(1, 1, None)
    await scene.hear(Mark(oldest_xid=2_999))
    assert await scene.following.forget(kept_seconds=0) == (0, 0)
    await scene.hear(Mark(oldest_xid=3_000))
    assert await scene.following.forget(kept_seconds=0) == (1, 1)
    assert await remembered(scene.pool) == Remembered(0, 0, 3_000)


async def test_what_parked_events_may_still_meet_is_kept(scene: Scene) -> None:
    """An event that waits in parking is older than a page that sees it, whatever was applied since."""
    owner = await pages_of(scene.pool, scene.cache)
    await merge_all(owner, 3_000)
    await scene.pool.execute(
        "insert into outbox.parked_events (parker, topic, key, log_id, transaction_id, created_at)"
        " values ($1, $2, 'k', $3, '2500', now())",
        TABLE, TOPIC, LOG,
    )  # fmt: skip
    await scene.hear(Mark())
    assert await scene.following.forget(kept_seconds=0) == (0, 0)
    await scene.pool.execute("delete from outbox.parked_events")
    await scene.hear(Mark(parked=[7]))
    assert await scene.following.forget(kept_seconds=0) == (0, 0), "nor while the owner's relay has some"
    await scene.hear(Mark())
    assert await scene.following.forget(kept_seconds=0) == (1, 0)


async def test_what_parked_events_of_a_spare_table_may_still_meet_is_kept(scene: Scene) -> None:
    """They are parked by its own name. Red with the line drawn by the live table's parked events alone."""
    await create_table(scene.pool, "spare")
    await scene.pool.execute(
        "insert into outbox.caches (cache, name, role, consumer, topic)"
        " select 'spare'::regclass, name, 'spare', consumer, topic from outbox.caches"
    )
    oid = await scene.pool.fetchval("select 'spare'::regclass::oid")
    await merge_all(await pages_of(scene.pool, scene.cache, oid, "spare"), 3_000)
    await scene.pool.execute(
        "insert into outbox.parked_events (parker, topic, key, log_id, transaction_id, created_at)"
        " values ('spare', $1, 'k', $2, '2500', now())",
        TOPIC, LOG,
    )  # fmt: skip
    await scene.hear(Mark())
    assert await scene.following.forget(kept_seconds=0) == (0, 0)
    await scene.pool.execute("delete from outbox.parked_events")
    assert await scene.following.forget(kept_seconds=0) == (1, 0)


async def test_what_is_over_the_bound_is_forgotten_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red with the ten seconds waited for: more than 500 deletions a second would never be forgotten."""
    monkeypatch.setattr("outbox.limits.FORGET_MAX_ROWS", 2)
    owner = await pages_of(scene.pool, scene.cache)
    for xmax in (2_000, 2_100, 2_200):
        await merge_all(owner, xmax)
    await scene.pool.execute("update outbox.pages set merged_at = now() - interval '1 hour'")
    await scene.hear(Mark())
    await scene.following._forget_if_due()
    assert (await remembered(scene.pool)).pages == 1
    await scene.following._forget_if_due()
    assert (await remembered(scene.pool)).pages == 0
    await merge_all(owner, 9_000)
    await scene.pool.execute("update outbox.pages set merged_at = now() - interval '1 hour'")
    await scene.hear(Mark(oldest_xid=9_000))
    await scene.following._forget_if_due()
    assert (await remembered(scene.pool)).pages == 1, "but then it is not due"


async def test_deletions_of_foreign_producers_leave_nothing_to_forget(scene: Scene) -> None:
    """They have no place in a log, so nothing could be compared with them, and no watermark would end them."""
    foreign = Kafka(first=2)
    foreign.put(AgentDeleted(agent_id=AGENT))
    await consume(scene.engine, foreign)
    assert await scene.cache.get(scene.pool, AGENT) is None
    assert (await remembered(scene.pool)).tombstones == 0


async def test_an_older_logs_memory_goes_when_the_newer_one_is_whole(scene: Scene) -> None:
    owner = await pages_of(scene.pool, scene.cache)
    await merge_all(owner, 9_000)
    await scene.pool.execute("update outbox.caches set complete_log = $1", LOG)
    await scene.hear(Mark(log_id=NEWER_LOG, oldest_xid=10))
    assert await scene.following.forget(kept_seconds=0) == (0, 0)
    await scene.pool.execute("update outbox.caches set complete_log = $1", NEWER_LOG)
    assert await scene.following.forget(kept_seconds=0) == (1, 0)
    assert await remembered(scene.pool) == Remembered(0, 0, 0)
    with pytest.raises(PageRefused):
        await merge_all(owner, 9_000)
    await merge_all(owner, 20, log_id=NEWER_LOG)


async def test_forgetting_goes_in_bounded_steps(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.limits.FORGET_MAX_ROWS", 2)
    owner = await pages_of(scene.pool, scene.cache)
    for xmax in (2_000, 2_100, 2_200):
        await merge_all(owner, xmax)
    await scene.hear(Mark())
    assert await scene.following.forget(kept_seconds=0) == (2, 0)
    assert await remembered(scene.pool) == Remembered(1, 0, 2_100)
    assert await scene.following.forget(kept_seconds=0) == (1, 0)
    assert await remembered(scene.pool) == Remembered(0, 0, 2_200)


async def test_a_busy_cache_forgets_another_time(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """A batch that is open holds the cache's lock; whoever waited for long would keep later batches waiting too."""
    owner = await pages_of(scene.pool, scene.cache)
    await merge_all(owner, 2_000)
    await scene.pool.execute("update outbox.pages set merged_at = now() - interval '1 hour'")
    await scene.hear(Mark())
    caplog.set_level("INFO")
    async with scene.pool.acquire() as connection, connection.transaction():
        await connection.execute("select outbox.hold_caches(array[$1], $2)", TABLE, "workflow")
        await scene.following._forget_if_due()
    assert "is busy" in caplog.text
    assert (await remembered(scene.pool)).pages == 1
    assert await scene.following.forget() == (1, 0)
