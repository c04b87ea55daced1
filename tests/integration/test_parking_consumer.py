"""Parked keys of caches and inboxes, from the first retry to the last: H43, backoff, order, discard.

Hazards stand here with the version that lacks the rule and fails.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, LiteralString
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from outbox import Cache, Consumer, Inbox, Patch, Pool, Transaction, crash_sites, limits, parking
from outbox.consumer import parking as consumer_parking
from outbox.consumer import retries
from outbox.consumer.apply import Engine, Outcome, Partition
from outbox.consumer.lanes import State
from tests.integration.test_consumer_lanes import Broker, poll, started
from tests.support.caching import (
    NEWER_LOG,
    TABLE,
    TOPIC,
    AgentNamePatched,
    AgentRenamed,
    AgentTagged,
    CachedAgent,
    Kafka,
    create_table,
    feed,
    make_engine,
    parked,
    rows,
)
from tests.support.consumer_process import SETTINGS, vocabulary
from tests.support.consumer_process import TABLE as NAMES
from tests.support.consumer_process import create_table as create_names
from tests.support.faults import eventually
from tests.support.inboxes import NAME, Notified, create_notes, emitted, notes
from tests.support.kafka_server import create_topic
from tests.support.mutations import broken_statement
from tests.support.producing import produce

RULE: Final = pytest.mark.parametrize("rule", ["kept", "removed"])
LOCK_WAIT: Final = (
    "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database())"
)
UNLOCKED: Final[tuple[LiteralString, LiteralString]] = ("do update set key = excluded.key where false", "do nothing")
"""How a batch would queue behind a key without locking it."""
EARLY: Final = timedelta(seconds=0.9)


@dataclass(slots=True)
class Bug:
    """In a handler; patches with these names make it raise."""

    names: frozenset[str] = frozenset({"explode"})

    def check(self, name: str) -> None:
        if name in self.names:
            raise RuntimeError(f"a bug that {name} meets")


def buggy_cache(bug: Bug) -> Cache[CachedAgent]:
    cache = Cache(CachedAgent, table=TABLE, key="agent_id", topic=TOPIC)

    @cache.on
    def renamed(event: AgentRenamed) -> CachedAgent:
        return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name, tags=event.tags)

    @cache.on
    def name_patched(event: AgentNamePatched) -> Patch:
        bug.check(event.agent_name)
        return Patch(event.agent_id, agent_name=event.agent_name)

    @cache.on
    def tagged(event: AgentTagged) -> Patch:
        return Patch(event.agent_id, tags=event.tags)

    return cache


def buggy_inbox(bug: Bug) -> Inbox:
    inbox = Inbox(NAME, topic=TOPIC)

    @inbox.on
    async def note(tx: Transaction, event: AgentNamePatched) -> None:
        await tx.execute("insert into notes (agent_id, note) values ($1, $2)", event.agent_id, event.agent_name)
        tx.emit(Notified(agent_id=event.agent_id, note=event.agent_name))
        bug.check(event.agent_name)

    return inbox


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> AsyncIterator[Pool]:
    await create_table(log_pool)
    await create_notes(log_pool)
    yield log_pool
    crash_sites.hook = None


@pytest.fixture
def bug() -> Bug:
    return Bug()


@pytest_asyncio.fixture
async def engine(pool: Pool, bug: Bug) -> Engine:
    return await make_engine(pool, buggy_cache(bug))


@dataclass(slots=True)
class Stream:
    """One partition, what was written to it, and how far it was applied."""

    engine: Engine
    partition: Partition
    kafka: Kafka
    applied: int = 0

    @classmethod
    async def claimed(cls, engine: Engine) -> "Stream":
        return cls(engine, await engine.claim(TOPIC, 0, 0), Kafka())

    def put(self, *events: Any) -> None:
        for event in events:
            self.kafka.put(event, (1, len(self.kafka.records) + 1))

    async def apply(self, *events: Any) -> Outcome:
        self.put(*events)
        outcome = await feed(self.engine, self.partition, self.kafka.records[self.applied :])
        self.applied = len(self.kafka.records)
        return outcome

    async def retry(self) -> Outcome:
        return await self.engine.retry(self.partition)


def named(agent: UUID, name: str) -> AgentRenamed:
    return AgentRenamed(agent_id=agent, agent_name=name)


def patched(agent: UUID, name: str) -> AgentNamePatched:
    return AgentNamePatched(agent_id=agent, agent_name=name)


def tagged(agent: UUID, *tags: str) -> AgentTagged:
    return AgentTagged(agent_id=agent, tags=list(tags))


async def insert_row(pool: Pool, agent: UUID) -> None:
    """As a page of the owner would."""
    await pool.execute(f"insert into {TABLE} (agent_id, agent_name, tags) values ($1, 'from its owner', '{{}}')", agent)


async def ask(pool: Pool) -> int:
    return await parking.retry_all(pool)


async def state_of(pool: Pool) -> tuple[int, timedelta | None]:
    """Failed attempts of the one parked key, and when it is tried again."""
    row = await pool.fetchrow("select attempts, retry_at - clock_timestamp() as delay from outbox.parked_keys")
    assert row is not None
    return row["attempts"], row["delay"]


@contextmanager
def paused(site: str, side: str) -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Whoever passes a site first stands still there: an event that it has arrived, and one that lets it go on."""
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def hook(at: str, on: str) -> None:
        if (at, on) == (site, side) and not arrived.is_set():
            arrived.set()
            await go_on.wait()

    crash_sites.hook = hook
    try:
        yield arrived, go_on
    finally:
        go_on.set()
        crash_sites.hook = None


# ----------------------------------------------------------------------------------------------- what a retry does


async def test_patches_are_applied_once_their_row_has_come(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    stream = await Stream.claimed(engine)
    assert (await stream.apply(patched(agent, "new"), tagged(agent, "a"), tagged(agent, "b"))).parked == 3
    assert await engine.due([(TOPIC, 0)]) == [], "its time has not come"
    await ask(pool)
    assert await engine.due([(TOPIC, 0), (TOPIC, 1)]) == [(TOPIC, 0)]
    assert (await stream.retry()).retried == 0
    assert len((await parked(pool))[str(agent)]) == 3
    await insert_row(pool, agent)
    await ask(pool)
    assert (await stream.retry()).retried == 3
    assert await rows(pool) == {agent: ("new", ["b"])}
    assert await parked(pool) == {}
    row = await pool.fetchrow(f"select outbox_position, outbox_offset from {TABLE}")
    assert tuple(row) == (1003, 2)
    assert (await stream.apply(tagged(agent, "c"))).applied == 1
    assert await rows(pool) == {agent: ("new", ["c"])}


async def test_what_succeeds_goes_and_what_fails_stays_with_all_behind_it(pool: Pool, engine: Engine, bug: Bug) -> None:
    agent, other = uuid4(), uuid4()
    stream = await Stream.claimed(engine)
    events = [patched(agent, "explode"), tagged(agent, "a"), patched(agent, "explode too"), tagged(agent, "b")]
    await stream.apply(named(agent, "first"), named(other, "other"), *events, patched(other, "explode"))
    bug.names = frozenset({"explode too"})
    await ask(pool)
    assert (await stream.retry()).retried == 3
    assert await rows(pool) == {agent: ("explode", ["a"]), other: ("explode", [])}
    assert await parked(pool) == {str(agent): ["agent.name_patched", "agent.tagged"]}
    assert await pool.fetchval("select detail from outbox.parked_keys") == "a bug that explode too meets"
    assert (await stream.apply(tagged(agent, "c"))).parked == 1
    bug.names = frozenset()
    await ask(pool)
    assert (await stream.retry()).retried == 3
    assert await rows(pool) == {agent: ("explode too", ["c"]), other: ("explode", [])}
    assert await parked(pool) == {}


async def test_events_of_two_logs_are_not_folded_into_one(pool: Pool, engine: Engine, bug: Bug) -> None:
    """A row of the older log must not get the newer one's name by a patch: each log's events are tried alone."""
    agent = uuid4()
    stream = await Stream.claimed(engine)
    await stream.apply(named(agent, "first"), patched(agent, "explode"))
    stream.kafka.log_id = NEWER_LOG
    await stream.apply(tagged(agent, "newer"))
    bug.names = frozenset()
    await ask(pool)
    assert [(await stream.retry()).retried for _ in range(2)] == [1, 1]
    assert await rows(pool) == {agent: ("explode", ["newer"])}
    assert await parked(pool) == {}


async def test_a_refused_value_is_found_in_the_middle_of_a_queue(pool: Pool, engine: Engine, bug: Bug) -> None:
    """The table refuses one of the waiting events: those before it are applied, those behind it stay."""
    agent = uuid4()
    stream = await Stream.claimed(engine)
    await stream.apply(
        named(agent, "first"), patched(agent, "explode"), tagged(agent, "a"), patched(agent, "forbidden")
    )
    bug.names = frozenset()
    await ask(pool)
    assert (await stream.retry()).retried == 2
    assert await rows(pool) == {agent: ("explode", ["a"])}
    assert await parked(pool) == {str(agent): ["agent.name_patched"]}
    assert await pool.fetchval("select reason from outbox.parked_keys") == "CheckViolationError"


async def test_a_retry_waits_longer_each_time_and_then_for_a_person(pool: Pool, engine: Engine) -> None:
    """After a second, then twice as long up to ten minutes, twelve times; a person may always ask for one more."""
    agent = uuid4()
    stream = await Stream.claimed(engine)
    await stream.apply(named(agent, "first"), patched(agent, "explode"))
    attempts, delay = await state_of(pool)
    assert attempts == 0
    assert delay is not None
    assert timedelta(0) < delay <= timedelta(seconds=limits.PARKED_RETRY_FIRST_SECONDS)
    for attempt in range(1, limits.PARKED_RETRY_ATTEMPTS + 2):
        await ask(pool)
        await stream.retry()
        attempts, delay = await state_of(pool)
        assert attempts == attempt
        if attempt < limits.PARKED_RETRY_ATTEMPTS:
            assert delay is not None
            wanted = timedelta(seconds=min(2**attempt, limits.PARKED_RETRY_MAX_SECONDS))
            assert wanted - EARLY < delay <= wanted
        else:
            assert delay is None
    assert await engine.due([(TOPIC, 0)]) == []


async def test_a_turn_is_bounded_and_the_rest_stays_due(
    pool: Pool, engine: Engine, bug: Bug, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RETRY_MAX_KEYS", 2)
    monkeypatch.setattr(limits, "RETRY_MAX_EVENTS", 3)
    agents = [uuid4() for _ in range(3)]
    stream = await Stream.claimed(engine)
    for agent in agents:
        await stream.apply(named(agent, "first"), patched(agent, "explode"), *(tagged(agent, str(n)) for n in range(4)))
    bug.names = frozenset()
    await ask(pool)
    turns = []
    while await engine.due([(TOPIC, 0)]):
        turns.append((await stream.retry()).retried)
    assert sum(turns) == 15
    assert max(turns) <= 6
    assert await rows(pool) == {agent: ("explode", ["3"]) for agent in agents}


@pytest.mark.parametrize("by", ["a retry", "batches"])
async def test_a_long_queue_of_slow_events_gets_through(pool: Pool, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """What waits for a key may take longer than a batch may; some of it goes at a time, and batches go on.

    Seen red: without a look at the clock in `InboxTarget.replay` every try runs out of time, and comes to nothing.
    """
    monkeypatch.setattr(limits, "BATCH_TIMEOUT_SECONDS", 0.6)
    monkeypatch.setattr(limits, "RETRY_TURN_SECONDS", 0.1)
    inbox = Inbox(NAME, topic=TOPIC)
    is_broken = True

    @inbox.on
    async def slow(tx: Transaction, event: AgentNamePatched) -> None:
        if is_broken:
            raise RuntimeError
        await tx.execute("insert into notes (agent_id, note) select $1, $2 from pg_sleep(0.03)",
                         event.agent_id, event.agent_name)  # fmt: skip

    agent = uuid4()
    stream = await Stream.claimed(await make_engine(pool, inbox))
    await stream.apply(*(patched(agent, str(number)) for number in range(30)))
    is_broken = False
    number = 30
    while await parked(pool, NAME):
        await ask(pool)
        if by == "batches":
            await stream.apply(patched(agent, str(number)))
            number += 1
        else:
            await stream.retry()
    assert [note for _, note in await notes(pool)] == [str(n) for n in range(number)]


async def test_events_that_could_not_be_read_find_their_key_when_they_can(pool: Pool, engine: Engine) -> None:
    """Parked under a name made up for them, they keep behind what waits under the key that they turn out to have."""
    agent = uuid4()
    stream = await Stream.claimed(engine)
    await stream.apply(patched(agent, "of a missing row"))
    stream.kafka.put_raw(None, b"{", [("ce_type", b"agent.tagged")])
    await stream.apply()
    assert set(await parked(pool)) == {str(agent), "offset 1 of partition 0"}
    await pool.execute(
        'update outbox.parked_events set payload = $1 where "offset" = 1', tagged(agent, "t").model_dump_json().encode()
    )
    await ask(pool)
    await stream.retry()
    assert set(await parked(pool)) == {str(agent), "offset 1 of partition 0"}
    await insert_row(pool, agent)
    for _ in range(2):
        await ask(pool)
        await stream.retry()
    assert await rows(pool) == {agent: ("of a missing row", ["t"])}
    assert await parked(pool) == {}


async def test_an_inbox_has_the_effects_of_parked_events_once_and_in_order(pool: Pool, bug: Bug) -> None:
    agent = uuid4()
    stream = await Stream.claimed(await make_engine(pool, buggy_inbox(bug)))
    await stream.apply(patched(agent, "1"), patched(agent, "explode"), patched(agent, "3"))
    await ask(pool)
    assert (await stream.retry()).retried == 0
    assert (await notes(pool), await emitted(pool)) == ([(agent, "1")], [(str(agent), "1")])
    bug.names = frozenset({"3"})
    await ask(pool)
    assert (await stream.retry()).retried == 1
    bug.names = frozenset()
    await ask(pool)
    outcome = await stream.apply(patched(agent, "4"))
    assert (outcome.retried, outcome.applied, outcome.parked) == (1, 1, 0)
    wanted = ["1", "explode", "3", "4"]
    assert [note for _, note in await notes(pool)] == wanted
    assert [note for _, note in await emitted(pool)] == wanted
    assert await parked(pool, NAME) == {}


@RULE
async def test_a_batch_tries_flagged_keys_before_their_next_event(
    pool: Pool, engine: Engine, bug: Bug, rule: str
) -> None:
    """What waits goes first. Seen red: unasked for, the next patch queues although its key could be free."""
    agent = uuid4()
    stream = await Stream.claimed(engine)
    await stream.apply(named(agent, "first"), patched(agent, "explode"))
    bug.names = frozenset()
    await ask(pool)
    if rule == "removed":
        with broken_statement(consumer_parking.SQL, "waiting", "k.retry_at <= now()", "false"):
            assert (await stream.apply(tagged(agent, "a"))).parked == 1
        return
    outcome = await stream.apply(tagged(agent, "a"))
    assert (outcome.retried, outcome.applied, outcome.parked) == (1, 1, 0)
    assert await rows(pool) == {agent: ("explode", ["a"])}
    assert await parked(pool) == {}


# ----------------------------------------------------------------------------------------------------- who may


@RULE
async def test_h43_the_owner_of_the_partition_retries(pool: Pool, engine: Engine, bug: Bug, rule: str) -> None:
    """A retry empties the park while a batch parks the key's next event: they take turns on the partition's row.

    Seen red: with a retry that does not lock the partition's row, and no lock of the key's row on either side, the
    event is stranded: it waits behind a key that is not parked, for ever.
    """
    agent = uuid4()
    stream = await Stream.claimed(engine)
    await stream.apply(named(agent, "first"), patched(agent, "explode"))
    stream.put(tagged(agent, "next"))
    batch = stream.kafka.records[stream.applied :]
    with contextlib.ExitStack() as stack:
        if rule == "removed":
            stack.enter_context(broken_statement(consumer_parking.SQL, "waiting", "for update"))
            stack.enter_context(broken_statement(consumer_parking.SQL, "open_keys", *UNLOCKED))
        arrived, go_on = stack.enter_context(paused("outbox.consumer.parking.queue", "after"))
        applying = asyncio.create_task(engine.apply(stream.partition, batch))
        await arrived.wait()
        bug.names = frozenset()
        if rule == "kept":
            asking = asyncio.create_task(ask(pool))  # it waits for the key's row, too
            retrying = asyncio.create_task(stream.retry())
            await eventually(lambda: pool.fetchval(LOCK_WAIT), what="they wait for the batch")
            go_on.set()
            assert (await applying).parked == 1
            await asking
            await retrying  # fenced or not: the offset has moved
            assert (await stream.retry()).retried == 2
        else:
            await retry_as_anybody(pool, engine, str(agent))
            go_on.set()
            await applying
    stranded = await pool.fetchval(
        "select count(*) from outbox.parked_events e"
        " where not exists (select from outbox.parked_keys k where k.key = e.key)"
    )
    assert stranded == (0 if rule == "kept" else 1)
    if rule == "kept":
        assert await rows(pool) == {agent: ("explode", ["next"])}


async def retry_as_anybody(pool: Pool, engine: Engine, key: str) -> None:
    """The way that a command might do it: without the locks of the partition and of the key."""
    async with pool.acquire() as connection, connection.transaction():
        (target,) = engine._targets[TOPIC]
        await retries.retry(connection, target, 0, key, math.inf)


async def test_a_process_that_lost_the_partition_retries_nothing(pool: Pool, engine: Engine, bug: Bug) -> None:
    agent = uuid4()
    stream = await Stream.claimed(engine)
    await stream.apply(named(agent, "first"), patched(agent, "explode"))
    bug.names = frozenset()
    await ask(pool)
    successor = await engine.claim(TOPIC, 0, 0)
    assert (await stream.retry()).fenced
    assert await rows(pool) == {agent: ("first", [])}
    assert (await engine.retry(successor)).retried == 1


@RULE
async def test_a_discard_waits_for_the_batch_that_parks_one_more(pool: Pool, engine: Engine, rule: str) -> None:
    """Also where the batch brings nothing but events that cannot be read, which lock no key to look behind it.

    Seen red: with `do nothing` the batch does not lock the key that it queues behind, and the event is stranded.
    """
    agent = uuid4()
    stream = await Stream.claimed(engine)
    await stream.apply(named(agent, "first"), patched(agent, "explode"))
    (place,) = await parking.find(pool, str(agent))
    stream.put(patched(agent, "explode"))
    with paused("outbox.consumer.parking.queue", "before") as (arrived, go_on):
        if rule == "removed":
            with broken_statement(consumer_parking.SQL, "open_keys", *UNLOCKED):
                applying = asyncio.create_task(engine.apply(stream.partition, stream.kafka.records[2:]))
                await arrived.wait()
            assert await parking.discard(pool, place) == 1
        else:
            applying = asyncio.create_task(engine.apply(stream.partition, stream.kafka.records[2:]))
            await arrived.wait()
            discarding = asyncio.create_task(parking.discard(pool, place))
            await eventually(lambda: pool.fetchval(LOCK_WAIT), what="the discard waits for the batch")
        go_on.set()
        await applying
        if rule == "kept":
            assert await discarding == 2
    assert await pool.fetchval("select count(*) from outbox.parked_keys") == 0
    assert await pool.fetchval("select count(*) from outbox.parked_events") == (0 if rule == "kept" else 1)


async def test_after_a_discard_the_key_goes_on(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    stream = await Stream.claimed(engine)
    await stream.apply(named(agent, "first"), patched(agent, "explode"), tagged(agent, "lost"))
    (place,) = await parking.find(pool, str(agent))
    assert (place.events, await parking.discard(pool, place), await parking.discard(pool, place)) == (2, 2, None)
    await stream.apply(tagged(agent, "next"))
    assert await rows(pool) == {agent: ("first", ["next"])}


# -------------------------------------------------------------------------------------------------- when it happens


async def test_lanes_look_for_due_keys_and_a_failed_look_harms_nobody(pool: Pool, engine: Engine, bug: Bug) -> None:
    agent = uuid4()
    broker = Broker()
    lanes = await started(engine, broker)
    broker.log.put(named(agent, "first"), (1, 1))
    broker.log.put(patched(agent, "explode"), (1, 2))
    await poll(lanes, broker)
    await eventually(lambda: pool.fetchval("select exists (select from outbox.parked_keys)"), what="the key is parked")
    bug.names = frozenset()
    await ask(pool)

    async def lose_connection(site: str, side: str) -> None:
        if site == "outbox.consumer.retries.free" and side == "after":
            raise ConnectionResetError("injected")

    crash_sites.hook = lose_connection
    await lanes.retry_parked()
    assert (lanes.failures, lanes.totals.retried) == (1, 0)
    assert list(lanes.states.values()) == [State.RUNNING]
    crash_sites.hook = None
    await lanes.retry_parked()
    assert lanes.totals.retried == 1
    assert await rows(pool) == {agent: ("explode", [])}
    await lanes.close()
    await lanes.retry_parked()


async def test_a_consumer_heals_by_itself_and_when_asked(log_pool: Pool, broker: str, topic: str) -> None:
    """On a broker: a patch waits for its row, and is applied soon after the row is there; nobody has to do anything."""
    words = vocabulary(topic)
    await create_names(log_pool)
    await create_topic(broker, topic, partitions=2)
    agents = [uuid4() for _ in range(4)]
    notes_ = [
        words.noted.model_validate({"agent_id": agent, "note": f"note {n}"}) for agent in agents for n in range(3)
    ]
    await produce(broker, topic, notes_, window=1, partitions=2)
    async with Consumer(log_pool, broker, words.cache, group=topic, settings=SETTINGS) as consumer:

        async def all_parked() -> bool:
            return bool(await log_pool.fetchval("select count(*) = 12 from outbox.parked_events"))

        await eventually(all_parked, what="all patches are parked")
        await log_pool.executemany(
            f"insert into {NAMES} (agent_id, name, note) values ($1, 'n', '')", [(agent,) for agent in agents]
        )

        async def nothing_parked() -> bool:
            return not await log_pool.fetchval("select exists (select from outbox.parked_keys)")

        await eventually(nothing_parked, what="all patches are applied")
        assert consumer.totals.retried == 12
    assert {row["note"] for row in await log_pool.fetch(f"select note from {NAMES}")} == {"note 2"}
