"""Inboxes without Kafka: effects once, in order, together with all that belongs to them."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

import outbox
from outbox import Event, Inbox, Pool, Transaction, crash_sites, limits, retry
from outbox.consumer import apply, messages
from outbox.consumer.apply import Engine
from tests.support.caching import (
    NEWER_LOG,
    TOPIC,
    AgentDeleted,
    AgentIgnored,
    AgentRenamed,
    Kafka,
    consume,
    create_table,
    feed,
    make_cache,
    make_engine,
    numbered,
    parked,
    rows,
)
from tests.support.consumer_process import SETTINGS, vocabulary
from tests.support.faults import eventually
from tests.support.inboxes import NAME, create_notes, emitted, make_inbox, notes, notes_of
from tests.support.kafka_server import create_topic
from tests.support.mutations import break_function, broken_statement


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> AsyncIterator[Pool]:
    await create_notes(log_pool)
    yield log_pool
    crash_sites.hook = None


@pytest_asyncio.fixture
async def engine(pool: Pool) -> Engine:
    return await make_engine(pool, make_inbox())


def renamed(agent: UUID, *names: str) -> list[Event]:
    return [AgentRenamed(agent_id=agent, agent_name=name) for name in names]


async def test_effects_emits_ids_and_position_commit_together(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    events = [*renamed(agent, "a", "b"), AgentIgnored(agent_id=agent), AgentDeleted(agent_id=agent)]
    outcome = await consume(engine, numbered(events))
    assert (outcome.applied, outcome.unknown, outcome.dropped, outcome.parked) == (3, 1, 0, 0)
    assert await notes(pool) == [(agent, "a"), (agent, "b"), (agent, "gone")]
    assert await emitted(pool) == [(str(agent), "a"), (str(agent), "b")]
    ids = await pool.fetch("select distinct message_id from outbox.inbox_messages where inbox = $1", NAME)
    assert len(ids) == 3
    assert await pool.fetchval("select next_offset from outbox.positions") == 4


async def test_a_transient_error_keeps_the_batch(pool: Pool, engine: Engine) -> None:
    """Wherever it strikes nothing is left, and the next try has every effect once."""
    agent = uuid4()
    kafka = numbered(renamed(agent, "a", "b"))
    partition = await engine.claim(TOPIC, 0, 0)
    for site, side in (("receive", "before"), ("receive", "after"), ("flush", "before"), ("flush", "after")):

        async def lose_connection(at: str, on: str, site: str = site, side: str = side) -> None:
            if at.endswith(f".{site}") and on == side:
                raise ConnectionResetError("injected")

        crash_sites.hook = lose_connection
        with pytest.raises(ConnectionResetError):
            await engine.apply(partition, kafka.records)
        crash_sites.hook = None
        assert await notes(pool) == []
        assert await emitted(pool) == []
        assert await parked(pool, NAME) == {}
        assert await pool.fetchval("select count(*) from outbox.inbox_messages") == 0
        assert await pool.fetchval("select next_offset from outbox.positions") == 0
    assert (await engine.apply(partition, kafka.records)).applied == 2
    assert await notes_of(pool, agent) == ["a", "b"]
    assert await emitted(pool) == [(str(agent), "a"), (str(agent), "b")]


# ------------------------------------------------------------------------------------------------ poison


@pytest.mark.parametrize("poison", ["explode", "forbidden"])
async def test_one_poison_event_in_a_batch_of_1000(pool: Pool, engine: Engine, poison: str) -> None:
    """One key is parked and the other 999 commit, each with its effect and its event once.

    Red when `InboxWork.run` goes the fast way whatever it is told, and when `_alone` has no savepoint.
    """
    agents = [uuid4() for _ in range(1_000)]
    events = [AgentRenamed(agent_id=agent, agent_name=poison if n == 500 else "ok") for n, agent in enumerate(agents)]
    outcome = await consume(engine, numbered(events))
    assert (outcome.applied, outcome.parked) == (999, 1)
    assert await parked(pool, NAME) == {str(agents[500]): ["agent.renamed"]}
    others = [agent for agent in agents if agent != agents[500]]
    assert await notes(pool) == [(agent, "ok") for agent in others]
    assert await emitted(pool) == [(str(agent), "ok") for agent in others]


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
async def test_order_is_kept_across_a_failing_event(pool: Pool, engine: Engine, batch: int) -> None:
    """Also in later batches; red when `_Queues.passing` lets a key's later events pass."""
    poisoned, other = uuid4(), uuid4()
    names = ["1", "explode", "3", "4"]
    events = [event for name in names for event in (*renamed(poisoned, name), *renamed(other, name[:1]))][:7]
    outcome = await consume(engine, numbered(events), batch=batch)
    assert (outcome.applied, outcome.parked) == (4, 3)
    assert await notes_of(pool, poisoned) == ["1"]
    assert await notes_of(pool, other) == ["1", "e", "3"]
    waiting = await pool.fetch("select payload from outbox.parked_events where parker = $1 order by id", NAME)
    assert [AgentRenamed.model_validate_json(row["payload"]).agent_name for row in waiting] == ["explode", "3", "4"]
    key = await pool.fetchrow("select reason, detail from outbox.parked_keys where parker = $1", NAME)
    assert key is not None
    assert tuple(key) == ("ExplodedError", "a bug in the handler")


async def test_what_a_failed_event_emitted_is_not_published(pool: Pool, engine: Engine) -> None:
    """Neither by the batch that failed as a whole nor by the event that failed alone."""
    first, poisoned, last = uuid4(), uuid4(), uuid4()
    events = [*renamed(first, "a"), *renamed(poisoned, "explode"), *renamed(last, "b")]
    await consume(engine, numbered(events))
    assert await emitted(pool) == [(str(first), "a"), (str(last), "b")]


@pytest.mark.parametrize("seed", range(4))
async def test_each_key_has_its_events_in_order_up_to_the_first_that_fails(pool: Pool, seed: int) -> None:
    """Random poison, duplicates, batches and restarts; what is handled and what waits is each key's sequence."""
    dice = random.Random(seed)
    agents = [UUID(int=number) for number in range(12)]
    events: list[Event] = []
    for number in range(200):
        name = "explode" if dice.random() < 0.02 else f"{number}"
        events += renamed(dice.choice(agents), name)
    originals = numbered(events).records
    delivered = Kafka()
    for original in originals:
        delivered.put_raw(original.key, original.value, original.headers)
        if dice.random() < 0.3:
            delivered.again(originals[dice.randrange(original.offset + 1)])
    at = 0
    engine = await make_engine(pool, make_inbox())
    partition = await engine.claim(TOPIC, 0, 0)
    while at < len(delivered.records):
        if dice.random() < 0.2:
            engine = await make_engine(pool, make_inbox())
            partition = await engine.claim(TOPIC, 0, 0)
        await engine.apply(partition, delivered.records[max(0, at - dice.randrange(5)) : at + dice.randrange(1, 40)])
        at = partition.next_offset
    for agent in agents:
        names = [event.agent_name for event in events if isinstance(event, AgentRenamed) and event.agent_id == agent]
        healthy = names[: names.index("explode")] if "explode" in names else names
        assert await notes_of(pool, agent) == healthy
        waiting = (await parked(pool, NAME)).get(str(agent), [])
        assert len(waiting) == len(names) - len(healthy)
    assert await emitted(pool) == [(str(agent), note) for agent, note in await notes(pool)]


async def test_what_cannot_be_read_parks_its_key(pool: Pool, engine: Engine) -> None:
    broken, empty, other = uuid4(), uuid4(), uuid4()
    kafka = Kafka()
    kafka.put_raw(str(broken).upper().encode(), b"{", [("ce_type", b"agent.renamed")])
    kafka.put_raw(str(empty).encode(), None, [("ce_type", b"agent.renamed")])
    kafka.put_raw(None, b"[]", [("ce_type", b"agent.renamed")])
    kafka.put_raw(b"no uuid", b"[]", [("ce_type", b"agent.renamed")])
    for event in (*renamed(broken, "behind"), *renamed(other, "fine")):
        kafka.put(event)
    outcome = await consume(engine, kafka)
    assert (outcome.applied, outcome.parked) == (1, 5)
    assert await notes(pool) == [(other, "fine")]
    assert await parked(pool, NAME) == {
        str(broken): ["agent.renamed"] * 2,
        str(empty): ["agent.renamed"],
        "offset 2 of partition 0": ["agent.renamed"],
        "no uuid": ["agent.renamed"],
    }


async def test_an_event_that_only_the_log_refuses_is_its_senders_fault(pool: Pool, engine: Engine) -> None:
    """Larger than its topic takes: found at the flush of the batch, and then at that of the event.

    Red when careful events share one flush.
    """
    await pool.execute(
        "insert into outbox.topics (topic, partition_count, max_message_bytes) values ('notifications', 1, 2000)"
    )
    agents = [uuid4() for _ in range(3)]
    events = [
        AgentRenamed(agent_id=agent, agent_name=name)
        for agent, name in zip(agents, ("a", "x" * 3_000, "b"), strict=True)
    ]
    outcome = await consume(engine, numbered(events))
    assert (outcome.applied, outcome.parked) == (2, 1)
    assert list(await parked(pool, NAME)) == [str(agents[1])]
    assert await emitted(pool) == [(str(agents[0]), "a"), (str(agents[2]), "b")]


async def test_deferred_constraints(pool: Pool) -> None:
    """One that a handler violates is that event's fault; one that it satisfies in the end is none, also when careful.

    Red when `end_event` or `begin_event` is left out.
    """
    await pool.execute(
        "create table parents (id uuid primary key); "
        "create table children (parent uuid references parents deferrable initially deferred)"
    )
    inbox = Inbox(NAME, topic=TOPIC)

    @inbox.on
    async def child_first(tx: Transaction, event: AgentRenamed) -> None:
        await tx.execute("insert into children values ($1)", event.agent_id)
        if event.agent_name == "with parent":
            await tx.execute("insert into parents values ($1)", event.agent_id)

    agents = [uuid4() for _ in range(3)]
    names = ("with parent", "orphan", "with parent")
    events = [AgentRenamed(agent_id=agent, agent_name=name) for agent, name in zip(agents, names, strict=True)]
    outcome = await consume(await make_engine(pool, inbox), numbered(events))
    assert (outcome.applied, outcome.parked) == (2, 1)
    assert list(await parked(pool, NAME)) == [str(agents[1])]
    assert {row["parent"] for row in await pool.fetch("select parent from children")} == {agents[0], agents[2]}


@pytest.mark.parametrize("names", [("a", "forbidden", "b"), ("a", "forbidden"), ("forbidden",)])
async def test_a_swallowed_error_is_found_out(pool: Pool, names: tuple[str, ...]) -> None:
    """A handler that hides what a statement of its own said leaves a transaction in which nothing works any more.

    Seen red: unless the end of the unit of work counts as the handlers' own error, one that is last stops all.
    """
    inbox = Inbox(NAME, topic=TOPIC)

    @inbox.on
    async def swallowing(tx: Transaction, event: AgentRenamed) -> None:
        with contextlib.suppress(asyncpg.CheckViolationError):
            await tx.execute("insert into notes (agent_id, note) values ($1, $2)", event.agent_id, event.agent_name)

    agents = [uuid4() for _ in names]
    events = [AgentRenamed(agent_id=agent, agent_name=name) for agent, name in zip(agents, names, strict=True)]
    outcome = await consume(await make_engine(pool, inbox), numbered(events))
    assert (outcome.applied, outcome.parked) == (len(names) - 1, 1)
    wanted = [(agent, name) for agent, name in zip(agents, names, strict=True) if name != "forbidden"]
    assert await notes(pool) == wanted


async def test_a_savepoint_in_a_handler(pool: Pool) -> None:
    """Rolled back alone, with what was emitted in it; the event goes on."""
    inbox = Inbox(NAME, topic=TOPIC)

    @inbox.on
    async def trying(tx: Transaction, event: AgentRenamed) -> None:
        tx.emit(event)
        try:
            async with outbox.transaction(tx) as inner:
                inner.emit(AgentDeleted(agent_id=event.agent_id))
                await inner.execute("insert into notes (agent_id, note) values ($1, 'forbidden')", event.agent_id)
        except asyncpg.CheckViolationError:
            await tx.execute("insert into notes (agent_id, note) values ($1, 'saved')", event.agent_id)

    agent = uuid4()
    outcome = await consume(await make_engine(pool, inbox), numbered(renamed(agent, "a", "b")))
    assert (outcome.applied, outcome.parked) == (2, 0)
    assert await notes_of(pool, agent) == ["saved", "saved"]
    types = [row["event_type"] for row in await pool.fetch("select event_type from outbox.events")]
    assert types == ["agent.renamed"] * 2


@pytest.mark.parametrize("names", [("commit",), ("explode", "commit")], ids=["at once", "carefully"])
async def test_a_handler_that_ends_the_transaction_is_told(pool: Pool, names: tuple[str, ...]) -> None:
    """And its key is not parked: nothing of the batch is left to roll back to."""
    inbox = Inbox(NAME, topic=TOPIC)

    @inbox.on
    async def committing(tx: Transaction, event: AgentRenamed) -> None:
        if event.agent_name == "explode":
            raise RuntimeError
        await tx.execute("commit")

    with pytest.raises(Exception, match="ended the batch's transaction") as caught:
        await consume(
            await make_engine(pool, inbox),
            numbered([*(AgentRenamed(agent_id=uuid4(), agent_name=name) for name in names)]),
        )
    assert not retry.is_data(caught.value)
    assert await parked(pool, NAME) == {}


async def test_a_full_park_stops_the_partition(pool: Pool, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PARKED_MAX_EVENTS", 1)
    kafka = numbered([*renamed(uuid4(), "explode"), *renamed(uuid4(), "explode"), *renamed(uuid4(), "fine")])
    with pytest.raises(outbox.ParkingFull, match=NAME):
        await consume(engine, kafka)
    assert await notes(pool) == []
    assert await pool.fetchval("select next_offset from outbox.positions") == 0


# ------------------------------------------------------------------------------------------- whose fault it is


class WrappedError(Exception):
    """As libraries wrap what the driver raised."""


async def deadlock(tx: Transaction) -> None:
    await tx.execute("do $$ begin raise exception using errcode = '40P01', message = 'deadlock detected'; end $$")


async def wrapped_deadlock(tx: Transaction) -> None:
    try:
        await deadlock(tx)
    except asyncpg.DeadlockDetectedError as error:
        raise WrappedError from error


async def slow_statement(tx: Transaction) -> None:
    await tx.connection.execute("select pg_sleep(60)", timeout=0.05)


async def lost_connection(tx: Transaction) -> None:
    await tx.execute("select pg_terminate_backend(pg_backend_pid())")


@pytest.mark.parametrize("trouble", [deadlock, wrapped_deadlock, slow_statement, lost_connection])
async def test_trouble_of_the_database_is_nobodys_fault(pool: Pool, trouble: object) -> None:
    """The batch is kept, and nothing is parked, whatever way it went.

    Red when `handling.is_transient` looks at the error only, and when `_has_hurt` is left out.
    """
    inbox = Inbox(NAME, topic=TOPIC)
    is_over = False

    @inbox.on
    async def troubled(tx: Transaction, event: AgentRenamed) -> None:
        await tx.execute("insert into notes (agent_id, note) values ($1, $2)", event.agent_id, event.agent_name)
        if not is_over:
            assert callable(trouble)
            await trouble(tx)

    engine = await make_engine(pool, inbox)
    agent = uuid4()
    kafka = numbered(renamed(agent, "a", "b"))
    partition = await engine.claim(TOPIC, 0, 0)
    with pytest.raises((WrappedError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await engine.apply(partition, kafka.records)
    assert await parked(pool, NAME) == {}
    assert await notes(pool) == []
    is_over = True
    assert (await engine.apply(partition, kafka.records)).applied == 2
    assert await notes_of(pool, agent) == ["a", "b"]


@pytest.mark.parametrize("error", [TimeoutError, FileNotFoundError, KeyError, outbox.EmitError])
async def test_what_a_handler_raises_itself_is_its_events_fault(pool: Pool, error: type[Exception]) -> None:
    """Also what looks like a lost connection: the transaction is as it was, so it was not the database."""
    inbox = Inbox(NAME, topic=TOPIC)

    @inbox.on
    async def failing(tx: Transaction, event: AgentRenamed) -> None:
        if event.agent_name == "poison":
            raise error("a", "b", "c")
        await tx.execute("insert into notes (agent_id, note) values ($1, $2)", event.agent_id, event.agent_name)

    poisoned, other = uuid4(), uuid4()
    outcome = await consume(
        await make_engine(pool, inbox), numbered([*renamed(poisoned, "poison"), *renamed(other, "fine")])
    )
    assert (outcome.applied, outcome.parked) == (1, 1)
    assert list(await parked(pool, NAME)) == [str(poisoned)]
    assert await pool.fetchval("select reason from outbox.parked_keys") == error.__name__


# ------------------------------------------------------------------------------------------------ once


async def handled_again_after_adoption(pool: Pool, engine: Engine) -> list[str]:
    """An adoption brings the log's last events under a new log id, at marks that nobody has seen."""
    agent = uuid4()
    kafka = numbered(renamed(agent, "a", "b"))
    partition = await engine.claim(TOPIC, 0, 0)
    await feed(engine, partition, kafka.records)
    for number, record in enumerate(kafka.records[:2], start=1):
        headers = [(name, value) for name, value in record.headers if name != "ob-pos"]
        kafka.put_raw(record.key, record.value, [*headers, ("ob-pos", f"{NEWER_LOG}/0/1/{number}/{number}/9".encode())])
    kafka.put(AgentRenamed(agent_id=agent, agent_name="c"), (1, 3), log_id=NEWER_LOG)
    outcome = await feed(engine, partition, kafka.records[2:])
    assert outcome.dropped in {0, 2}
    return await notes_of(pool, agent)


async def test_h23_an_adoption_has_no_effect_twice(pool: Pool, engine: Engine) -> None:
    assert await handled_again_after_adoption(pool, engine) == ["a", "b", "c"]


async def test_h23_without_the_ids_it_has(pool: Pool, engine: Engine) -> None:
    with broken_statement(
        messages.SQL, "receive", "::text from asked a except", "::text from asked a where false except"
    ):
        assert await handled_again_after_adoption(pool, engine) == ["a", "b", "a", "b", "c"]


async def test_h23_a_replay_of_the_relay_has_no_effect_twice(pool: Pool, engine: Engine) -> None:
    """By position; it would have none by id either."""
    agent = uuid4()
    kafka = numbered(renamed(agent, "a", "b"))
    for record in list(kafka.records):
        kafka.again(record)
    assert (await consume(engine, kafka, batch=3)).dropped == 2
    assert await notes_of(pool, agent) == ["a", "b"]


def foreign(kafka: Kafka, agent: UUID, name: str, identity: bytes | None, source: bytes | None = b"shop") -> None:
    headers: list[tuple[str, bytes | None]] = [("ce_type", b"agent.renamed")]
    headers += [("ce_id", identity)] if identity is not None else []
    headers += [("ce_source", source)] if source is not None else []
    kafka.put_raw(
        str(agent).encode(), AgentRenamed(agent_id=agent, agent_name=name).model_dump_json().encode(), headers
    )


@pytest.mark.parametrize("batch", [1, 2, 9])
async def test_duplicates_of_foreign_producers(pool: Pool, engine: Engine, batch: int) -> None:
    """By source and id; a message without an id cannot be known again, and has its effect each time."""
    agent = uuid4()
    kafka = Kafka()
    same = str(agent).encode()
    for name, identity, source in (
        ("a", b"1", b"shop"), ("b", b"2", b"shop"), ("again", b"1", b"shop"), ("other source", b"1", b"depot"),
        ("c", same, b"shop"), ("again", same, b"shop"), ("same id, other source", same, b"depot"),
        ("no id", None, b"shop"), ("no id", None, b"shop"), ("d", b"1s", None), ("not d", b"1", b"s"),
    ):  # fmt: skip
        foreign(kafka, agent, name, identity, source)
    outcome = await consume(engine, kafka, batch=batch)
    assert outcome.dropped == 2
    assert await notes_of(pool, agent) == [
        "a", "b", "other source", "c", "same id, other source", "no id", "no id", "d", "not d"
    ]  # fmt: skip


async def test_a_duplicate_in_another_partition(pool: Pool, engine: Engine) -> None:
    """Where a topic grew under a foreign producer, or it sends without keys (H15)."""
    agent = uuid4()
    first, second = Kafka(), Kafka()
    foreign(first, agent, "a", b"1")
    foreign(second, agent, "a", b"1")
    assert (await consume(engine, first, number=0)).applied == 1
    assert (await consume(engine, second, number=1)).dropped == 1
    assert await notes_of(pool, agent) == ["a"]


async def test_the_same_message_in_two_partitions_at_the_same_moment(pool: Pool, engine: Engine) -> None:
    """The second batch waits for the first one's id. Red without the unique index of the day."""
    agent = uuid4()
    first, second = Kafka(), Kafka()
    foreign(first, agent, "a", b"1")
    foreign(second, agent, "a", b"1")
    received, go_on = asyncio.Event(), asyncio.Event()

    async def hold(site: str, side: str) -> None:
        if site.endswith(".receive") and side == "after" and not received.is_set():
            received.set()
            await go_on.wait()

    await consume(engine, numbered(renamed(uuid4(), "so that the day is known")), number=2)
    crash_sites.hook = hold
    one = asyncio.create_task(consume(engine, first, number=0))
    await received.wait()
    other = asyncio.create_task(consume(engine, second, number=1))
    while not await pool.fetchval("select exists (select from pg_stat_activity where wait_event_type = 'Lock')"):
        assert not other.done()
    go_on.set()
    assert ((await one).applied, (await other).dropped) == (1, 1)
    assert await notes_of(pool, agent) == ["a"]


async def message_around_midnight(pool: Pool, engine: Engine) -> int:
    """One message in two partitions: a batch that began a second before midnight, and one that began a second after.

    Returns how often it had its effect.
    """
    await pool.execute("create table shift (seconds float8 not null)")
    await pool.execute("insert into shift values (-1)")
    await break_function(
        pool, "inbox_day", "floor(extract(epoch from p_at) / 86400)",
        "floor((extract(epoch from p_at - now()) + (select s.seconds from public.shift s) + 86400 * 20000) / 86400)",
    )  # fmt: skip
    agent = uuid4()
    first, second = Kafka(), Kafka()
    foreign(first, agent, "a", b"1")
    foreign(second, agent, "a", b"1")
    received, go_on = asyncio.Event(), asyncio.Event()
    calls = 0

    async def hold(site: str, side: str) -> None:
        nonlocal calls
        if site.endswith(".receive") and side == "after":
            calls += 1
            if calls == 2:  # the first call asks for the day
                received.set()
                await go_on.wait()

    crash_sites.hook = hold
    one = asyncio.create_task(consume(engine, first, number=0))
    await received.wait()
    await pool.execute("update shift set seconds = 1")
    other = asyncio.create_task(consume(engine, second, number=1))
    waiting = "select exists (select from pg_stat_activity where wait_event_type = 'Lock')"
    while not other.done() and not await pool.fetchval(waiting):
        pass
    go_on.set()
    await asyncio.gather(one, other)
    return len(await notes_of(pool, agent))


async def test_the_same_message_in_two_partitions_on_both_sides_of_midnight(pool: Pool, engine: Engine) -> None:
    assert await message_around_midnight(pool, engine) == 1


async def test_without_a_look_into_yesterdays_slot_it_has_two_effects(pool: Pool, engine: Engine) -> None:
    with broken_statement(
        messages.SQL, "receive", "make_interval(secs => $5::float8)", "make_interval(secs => $5::float8 * 0)"
    ):
        assert await message_around_midnight(pool, engine) == 2


async def test_a_parked_message_is_known_too(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    kafka = Kafka()
    foreign(kafka, agent, "explode", b"1")
    foreign(kafka, agent, "explode", b"1")
    outcome = await consume(engine, kafka, batch=1)
    assert (outcome.parked, outcome.dropped) == (1, 1)


async def test_two_inboxes_keep_their_own_ids(pool: Pool) -> None:
    agent = uuid4()
    kafka = numbered(renamed(agent, "a"))
    engine = await make_engine(pool, make_inbox("first"), make_inbox("second"))
    assert (await consume(engine, kafka)).applied == 2
    assert await notes_of(pool, agent) == ["a", "a"]


async def test_an_inbox_beside_a_cache(pool: Pool) -> None:
    """In one transaction; what one of them cannot take parks the key there, and is applied by the other."""
    await create_table(pool)
    engine = await make_engine(pool, make_inbox(), make_cache())
    agent, unwelcome = uuid4(), uuid4()
    await pool.execute("alter table notes add check (note <> 'only for the cache')")
    events = [*renamed(agent, "a"), *renamed(unwelcome, "only for the cache")]
    outcome = await consume(engine, numbered(events))
    assert (outcome.applied, outcome.parked) == (3, 1)
    assert await rows(pool) == {agent: ("a", []), unwelcome: ("only for the cache", [])}
    assert await notes(pool) == [(agent, "a")]
    assert await parked(pool, NAME) == {str(unwelcome): ["agent.renamed"]}


async def replayed(pool: Pool, *, replays: bool) -> tuple[list[str], int]:
    """What a handled, a replayed, a twice replayed record do, and a live one behind them."""
    agent = uuid4()
    kafka = numbered(renamed(agent, "a", "b"))
    old = kafka.records[0]
    for occasion in (b"first", b"first", b"second"):
        kafka.put_raw(old.key, old.value, [*old.headers, ("ob-replay", occasion)])
    kafka.put(AgentRenamed(agent_id=agent, agent_name="c"), (1, 3))
    outcome = await consume(await make_engine(pool, make_inbox(replays=replays)), kafka, batch=2)
    return await notes_of(pool, agent), outcome.dropped


async def test_replayed_records_are_for_those_who_want_them(pool: Pool) -> None:
    """Red when `InboxTarget.work` does not ask."""
    assert await replayed(pool, replays=False) == (["a", "b", "c"], 3)


async def test_a_replay_has_its_effects_once_for_each_occasion(pool: Pool) -> None:
    """Red when `Engine._read` compares the marks of replayed records."""
    assert await replayed(pool, replays=True) == (["a", "b", "a", "a", "c"], 1)


@pytest.mark.parametrize("replays", [False, True])
async def test_caches_and_replayed_records(pool: Pool, replays: bool) -> None:  # noqa: FBT001
    await create_table(pool)
    agent = uuid4()
    kafka = numbered(renamed(agent, "a", "b"))
    old = kafka.records[0]
    kafka.put_raw(old.key, old.value, [*old.headers, ("ob-replay", b"")])
    cache = make_cache()
    cache.replays = replays  # type: ignore[misc]
    outcome = await consume(await make_engine(pool, cache), kafka)
    assert outcome.dropped == (0 if replays else 1)
    assert await rows(pool) == {agent: ("a" if replays else "b", [])}


async def zombie_has_effects(pool: Pool) -> bool:
    """Whether a former owner's batch, read before the takeover, has effects after it."""
    zombie, owner = await make_engine(pool, make_inbox()), await make_engine(pool, make_inbox())
    kafka = numbered(renamed(uuid4(), "a"))
    stale = await zombie.claim(TOPIC, 0, 0)
    await owner.claim(TOPIC, 0, 0)
    outcome = await zombie.apply(stale, kafka.records)
    return not outcome.fenced or bool(await notes(pool)) or bool(await emitted(pool))


async def test_a_zombies_batch_is_rejected(pool: Pool) -> None:
    assert not await zombie_has_effects(pool)


async def test_without_the_epoch_a_zombie_has_effects(pool: Pool) -> None:
    with broken_statement(apply.SQL, "advance", "and p.epoch = $4", "and $4::bigint > 0"):
        assert await zombie_has_effects(pool)


# ------------------------------------------------------------------------------------------------ rotation


async def on_day(pool: Pool, day: int) -> None:
    """Let the database believe that it is that day."""
    await pool.execute(
        "create or replace function outbox.inbox_day(p_at timestamptz default now()) returns integer language sql "
        f"stable as $$ select {day} $$"
    )


async def test_a_message_is_known_for_seven_whole_days_and_then_forgotten(pool: Pool, engine: Engine) -> None:
    """The day's slot is emptied on the eighth day after it. Red when a slot less is looked at."""
    agent = uuid4()
    kafka = Kafka()
    partition = await engine.claim(TOPIC, 0, 0)
    handled = []
    for day in range(20_000, 20_020):
        await on_day(pool, day)
        foreign(kafka, agent, f"day {day - 20_000}", b"1")
        outcome = await feed(engine, partition, kafka.records[-1:])
        handled += [day - 20_000] if outcome.applied else []
        await pool.fetchval("select outbox.rotate_inbox()")
    assert handled == [0, 8, 16]
    assert await notes_of(pool, agent) == ["day 0", "day 8", "day 16"]


async def test_rotation_is_late_and_nobody_minds(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    kafka = Kafka()
    partition = await engine.claim(TOPIC, 0, 0)
    for day, identity in ((20_000, b"old"), (20_009, b"new"), (20_009, b"old"), (20_016, b"new")):
        await on_day(pool, day)
        foreign(kafka, agent, f"{day} {identity.decode()}", identity)
        await feed(engine, partition, kafka.records[-1:])
    assert await notes_of(pool, agent) == ["20000 old", "20009 new"]


async def rotates_beside_an_open_batch(pool: Pool) -> bool:
    """Whether tomorrow's slot, which has old ids, can be emptied while a batch is open."""
    await pool.execute(
        "insert into outbox.inbox_messages select (outbox.inbox_day() + 1) % 9, 'other', gen_random_uuid()"
    )
    engine = await make_engine(pool, make_inbox())
    await consume(engine, numbered(renamed(uuid4(), "so that the day is known")), number=1)
    received, go_on = asyncio.Event(), asyncio.Event()

    async def hold(site: str, side: str) -> None:
        if site.endswith(".receive") and side == "after":
            received.set()
            await go_on.wait()

    crash_sites.hook = hold
    batch = asyncio.create_task(consume(engine, numbered(renamed(uuid4(), "a"))))
    try:
        await received.wait()
        return bool(await pool.fetchval("select outbox.rotate_inbox()"))
    except asyncpg.LockNotAvailableError:
        return False
    finally:
        go_on.set()
        assert (await batch).applied == 1


async def test_rotation_finds_the_slot_free(pool: Pool) -> None:
    assert await rotates_beside_an_open_batch(pool)
    assert await pool.fetchval("select count(*) from outbox.inbox_messages where inbox = 'other'") == 0


async def test_without_the_list_of_slots_it_does_not(pool: Pool) -> None:
    with broken_statement(messages.SQL, "receive", "m.slot = any ($4::smallint[])", "$4::smallint[] is not null"):
        assert not await rotates_beside_an_open_batch(pool)


async def test_rotation_waits_for_nobody(pool: Pool) -> None:
    """Whoever uses the slot is left alone; red without `nowait`: the statement would wait for ever."""
    await pool.execute(
        "insert into outbox.inbox_messages select (outbox.inbox_day() + 1) % 9, 'other', gen_random_uuid()"
    )
    async with pool.acquire() as reader, reader.transaction():
        await reader.fetch("select * from outbox.inbox_messages")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await pool.fetchval("select outbox.rotate_inbox()")
    assert await pool.fetchval("select outbox.rotate_inbox()")
    assert not await pool.fetchval("select outbox.rotate_inbox()")


async def rotates_at_midnight(pool: Pool) -> bool:
    """Whether a slot is emptied that was looked at a moment before midnight and is locked a moment after it."""
    await pool.execute("insert into outbox.inbox_messages values (20001 % 9, 'today', gen_random_uuid())")
    await pool.execute(
        "create sequence looks; create or replace function outbox.inbox_day(p_at timestamptz default now()) "
        "returns integer language sql volatile as $$ select 20000 + (nextval('looks') > 1)::integer $$"
    )
    return bool(await pool.fetchval("select outbox.rotate_inbox()"))


async def test_rotation_at_midnight_empties_nothing_new(pool: Pool) -> None:
    assert not await rotates_at_midnight(pool)
    assert await pool.fetchval("select count(*) from outbox.inbox_messages") == 1


async def test_without_a_look_under_the_lock_it_does(pool: Pool) -> None:
    await break_function(pool, "rotate_inbox", "outbox.inbox_day(clock_timestamp()) <> today", "false")
    assert await rotates_at_midnight(pool)


async def test_rotating_goes_on_after_an_error(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INBOX_ROTATION_AGAIN_SECONDS", 0.001)
    await pool.execute(
        "insert into outbox.inbox_messages select (outbox.inbox_day() + 1) % 9, 'other', gen_random_uuid()"
    )
    stopping, failed = asyncio.Event(), asyncio.Event()

    async def fail_once(site: str, side: str) -> None:
        if site.endswith(".rotate") and side == "before" and not failed.is_set():
            failed.set()
            raise ConnectionResetError("injected")
        if site.endswith(".rotate") and side == "after":
            stopping.set()

    crash_sites.hook = fail_once
    await messages.keep_rotating(pool, stopping)
    assert failed.is_set()
    assert await pool.fetchval("select count(*) from outbox.inbox_messages") == 0


async def test_a_consumer_with_an_inbox_rotates(log_pool: Pool, broker: str, topic: str) -> None:
    """Red when `Consumer` does not start `keep_rotating`."""
    words = vocabulary(topic)
    await create_topic(broker, topic)
    await log_pool.execute(
        "insert into outbox.inbox_messages select (outbox.inbox_day() + 1) % 9, 'other', gen_random_uuid()"
    )

    async def emptied() -> bool:
        return not await log_pool.fetchval("select exists (select from outbox.inbox_messages)")

    async with outbox.Consumer(log_pool, broker, words.inbox, group=topic, settings=SETTINGS):
        await eventually(emptied, what="tomorrow's slot is empty")


async def test_receiving_uses_the_index_of_each_slot(pool: Pool) -> None:
    """And neither reads nor locks the slot that is to be emptied."""
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("set local plan_cache_mode = force_custom_plan")
        day = await connection.fetchval("select outbox.inbox_day()")
        slots = [(day - days) % 9 for days in range(8)]
        ids = [str(uuid4()) for _ in range(1_000)]
        found = await connection.fetch("explain " + messages.SQL.receive.text, NAME, ids, day, slots, 0.0)
        plan = "\n".join(row[0] for row in found)
        assert "Seq Scan on inbox_messages" not in plan
        assert plan.count("Index Only Scan using inbox_messages_slot_") == 8
        locked = await connection.fetch(
            "select relation::regclass::text as name from pg_locks "
            "where pid = pg_backend_pid() and relation is not null"
        )
        assert f"outbox.inbox_messages_slot_{(day + 1) % 9}" not in {row["name"] for row in locked}
