"""The engine without Kafka: once, in order, by one owner; each hazard beside the rule that answers it."""

import asyncio
import gc
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from outbox import Pool, crash_sites, retry
from outbox.cache.fold import Step
from outbox.consumer import apply
from outbox.consumer.apply import Engine
from tests.support.caching import (
    LOG,
    NEWER_LOG,
    TABLE,
    TOPIC,
    AgentDeleted,
    AgentIgnored,
    AgentNamePatched,
    AgentRenamed,
    AgentTagged,
    CachedAgent,
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
from tests.support.mutations import broken_statement


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> AsyncIterator[Pool]:
    await create_table(log_pool)
    yield log_pool
    crash_sites.hook = None


@pytest_asyncio.fixture
async def engine(pool: Pool) -> Engine:
    return await make_engine(pool, make_cache())


async def test_a_row_carries_the_event_it_is_from(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    before = await pool.fetchval("select clock_timestamp()")
    await consume(
        engine, numbered([AgentRenamed(agent_id=agent, agent_name="a"), AgentTagged(agent_id=agent, tags=["x"])])
    )
    row = await pool.fetchrow(f"select * from {TABLE}")
    assert row is not None
    assert (row["outbox_log"], row["outbox_position"], row["outbox_transaction_id"]) == (LOG, 1002, 1002)
    assert row["last_synced_at"] >= before
    assert (row["agent_name"], row["tags"]) == ("a", ["x"])
    second = numbered([AgentRenamed(agent_id=agent, agent_name="b")], window=2)
    second.records[0].offset = 2
    await consume(engine, second)
    again = await pool.fetchrow(f"select * from {TABLE}")
    assert again is not None
    assert again["last_synced_at"] > row["last_synced_at"]


async def test_h11_delete_of_a_row_with_not_null_columns(pool: Pool, engine: Engine) -> None:
    """Red when Merge sends deletions among the full rows: the NOT NULL columns refuse them, and the key is parked."""
    agent = uuid4()
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name="a"), AgentDeleted(agent_id=agent)])
    outcome = await consume(engine, kafka, batch=1)
    assert outcome.parked == 0
    assert await rows(pool) == {}
    stone = await pool.fetchrow("select * from outbox.tombstones")
    assert stone is not None
    assert (stone["cache"], stone["key"], stone["log_id"], stone["position"]) == (TABLE, str(agent), LOG, 1002)
    late = kafka.again(kafka.records[0])
    outcome = await consume(engine, Kafka(records=[late]))
    assert outcome.dropped == 1
    assert await rows(pool) == {}


async def test_a_row_returns_after_its_deletion(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    events = [AgentRenamed(agent_id=agent, agent_name="a"), AgentDeleted(agent_id=agent)]
    kafka = numbered([*events, AgentRenamed(agent_id=agent, agent_name="b")])
    await consume(engine, kafka, batch=1)
    assert await rows(pool) == {agent: ("b", [])}
    assert await pool.fetchval("select count(*) from outbox.tombstones") == 0


async def test_h12_patches_of_different_columns_in_one_batch(pool: Pool, engine: Engine) -> None:
    """Red when the fold keeps only the last patch (`folded.columns = ...` in place of `|=`)."""
    agent = uuid4()
    partition = await engine.claim(TOPIC, 0, 0)
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name="old", tags=["old"])])
    await feed(engine, partition, kafka.records)
    kafka.put(AgentNamePatched(agent_id=agent, agent_name="new"), (2, 1))
    kafka.put(AgentTagged(agent_id=agent, tags=["new"]), (2, 2))
    await feed(engine, partition, kafka.records[1:])
    assert await rows(pool) == {agent: ("new", ["new"])}


async def test_h12_patches_over_a_full_row_in_one_batch(pool: Pool, engine: Engine) -> None:
    """Red when the fold takes a later patch for all there is (no `patched(folded.base, changes)`)."""
    agent = uuid4()
    events = [
        AgentRenamed(agent_id=agent, agent_name="old", tags=["old"]),
        AgentNamePatched(agent_id=agent, agent_name="new"),
        AgentTagged(agent_id=agent, tags=["new"]),
    ]
    await consume(engine, numbered(events))
    assert await rows(pool) == {agent: ("new", ["new"])}


async def test_h24_late_bytes_of_a_zombie_relay_are_dropped(pool: Pool, engine: Engine) -> None:
    """Red when `Engine._read` does not compare a record's mark."""
    agent = uuid4()
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name=name) for name in "abc"])
    newer = kafka.put(AgentRenamed(agent_id=agent, agent_name="d"), (2, 1))
    for record in kafka.records[:3]:
        kafka.again(record)
    partition = await engine.claim(TOPIC, 0, 0)
    await feed(engine, partition, kafka.records[: newer.offset + 1])
    outcome = await feed(engine, partition, kafka.records[newer.offset + 1 :], batch=2)
    assert outcome.dropped == 3
    assert await rows(pool) == {agent: ("d", [])}
    assert partition.next_offset == len(kafka.records)


async def test_h24_also_after_a_restart(pool: Pool, engine: Engine) -> None:
    """Red when `claim` does not load the stored marks."""
    agent = uuid4()
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name=name) for name in "ab"])
    await consume(engine, kafka)
    late = kafka.again(kafka.records[0])
    successor = await make_engine(pool, make_cache())
    outcome = await consume(successor, Kafka(records=[late]))
    assert outcome.dropped == 1
    assert await rows(pool) == {agent: ("b", [])}


async def test_h25_a_late_claim_costs_a_claim_and_nothing_else(pool: Pool) -> None:
    """The owner that is outbid claims again. `test_consumer_lanes` has the part that does so by itself."""
    agent = uuid4()
    former, owner = await make_engine(pool, make_cache()), await make_engine(pool, make_cache())
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name=name) for name in "abcd"])
    await former.claim(TOPIC, 0, 0)
    mine = await owner.claim(TOPIC, 0, 0)
    await feed(owner, mine, kafka.records[:1])
    theirs = await former.claim(TOPIC, 0, 0)
    assert (await owner.apply(mine, kafka.records[1:2])).fenced
    mine = await owner.claim(TOPIC, 0, 0)
    outcome = await feed(owner, mine, kafka.records[mine.next_offset :])
    assert outcome.applied == 3
    assert (await former.apply(theirs, kafka.records[1:2])).fenced
    assert await rows(pool) == {agent: ("d", [])}


async def zombie_overwrites(pool: Pool) -> bool:
    """Whether a former owner's batch, read before the takeover, is applied after it."""
    agent = uuid4()
    zombie, owner = await make_engine(pool, make_cache()), await make_engine(pool, make_cache())
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name=name) for name in "ab"])
    stale = await zombie.claim(TOPIC, 0, 0)
    await owner.claim(TOPIC, 0, 0)
    outcome = await zombie.apply(stale, kafka.records)
    return not outcome.fenced or agent in await rows(pool)


async def test_a_zombie_is_fenced_by_its_epoch(pool: Pool) -> None:
    assert not await zombie_overwrites(pool)


async def test_without_the_epoch_a_zombie_gets_through(pool: Pool) -> None:
    with broken_statement(apply.SQL, "advance", "and p.epoch = $4", "and $4::bigint > 0"):
        assert await zombie_overwrites(pool)


async def applied_twice(engine: Engine) -> bool:
    """Whether a batch whose COMMIT was answered into the void is applied again by the same owner."""
    kafka = Kafka()
    agent = uuid4()
    kafka.put(AgentRenamed(agent_id=agent, agent_name="foreign"))
    partition = await engine.claim(TOPIC, 0, 0)
    unaware = replace(partition, marks={})
    await feed(engine, partition, kafka.records)
    return not (await engine.apply(unaware, kafka.records)).fenced


async def test_the_position_is_compared_and_swapped(engine: Engine) -> None:
    assert not await applied_twice(engine)


async def test_without_the_offset_a_batch_counts_twice(engine: Engine) -> None:
    with broken_statement(apply.SQL, "advance", "and p.next_offset = $5", "and $5::bigint >= 0"):
        assert await applied_twice(engine)


async def test_h42_duplicates_inside_one_batch(pool: Pool, engine: Engine) -> None:
    """Red when marks are compared with the stored ones only, not with the running maximum."""
    agent = uuid4()
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name=name) for name in "12"])
    kafka.again(kafka.records[0])
    outcome = await consume(engine, kafka)
    assert outcome.dropped == 1
    assert await rows(pool) == {agent: ("2", [])}


@pytest.mark.parametrize("seed", range(6))
async def test_redelivery_in_any_order_equals_the_fold(pool: Pool, seed: int) -> None:
    """First occurrences in order, each up to three times more, anywhere later; batches and claims at random."""
    dice = random.Random(seed)
    agents = [UUID(int=number) for number in range(5)]
    events = []
    for number in range(120):
        agent = dice.choice(agents)
        events.append(
            AgentDeleted(agent_id=agent)
            if dice.random() < 0.15
            else AgentRenamed(agent_id=agent, agent_name=f"name {number}", tags=[str(number)])
        )
    originals = numbered(events, window=7).records
    delivered = Kafka()
    late: list[int] = []
    for original in originals:
        delivered.put_raw(original.key, original.value, original.headers)
        late += [original.offset] * dice.randrange(4)
        for _ in range(dice.randrange(3)):
            if late:
                delivered.again(originals[late.pop(dice.randrange(len(late)))])
    for offset in dice.sample(late, len(late)):
        delivered.again(originals[offset])
    cache = make_cache()
    at = 0
    engine = await make_engine(pool, cache)
    partition = await engine.claim(TOPIC, 0, 0)
    while at < len(delivered.records):
        if dice.random() < 0.2:
            engine = await make_engine(pool, cache)
            partition = await engine.claim(TOPIC, 0, 0)
        start = max(0, at - dice.randrange(5))
        end = at + dice.randrange(1, 25)
        assert not (await engine.apply(partition, delivered.records[start:end])).fenced
        at = partition.next_offset
    expected = {row.agent_id: (row.agent_name, row.tags) for row in cache.fold(events)}
    assert await rows(pool) == expected


async def test_a_newer_log_wins_whatever_arrives_when(pool: Pool, engine: Engine) -> None:
    """Red when `outbox.supersedes` is left out of the merge."""
    kept, gone = uuid4(), uuid4()
    kafka = Kafka()
    kafka.put(AgentRenamed(agent_id=kept, agent_name="new"), (1, 1), log_id=NEWER_LOG)
    kafka.put(AgentDeleted(agent_id=gone), (1, 2), log_id=NEWER_LOG)
    for number, agent in enumerate((kept, gone), start=1):
        kafka.put(AgentRenamed(agent_id=agent, agent_name="old"), (9, number))
        kafka.put(AgentNamePatched(agent_id=agent, agent_name="old patch"), (9, number + 10))
        kafka.put(AgentDeleted(agent_id=agent), (9, number + 20))
        kafka.put(AgentRenamed(agent_id=agent, agent_name="old again"), (9, number + 30))
    for batch in (1, len(kafka.records)):
        await pool.execute(f"truncate {TABLE}, outbox.tombstones, outbox.positions cascade")
        await consume(engine, kafka, batch=batch)
        assert await rows(pool) == {kept: ("new", [])}
        assert await pool.fetchval("select log_id from outbox.tombstones where key = $1", str(gone)) == NEWER_LOG
        assert await parked(pool) == {}


async def test_a_newer_log_replaces_rows_and_tombstones(pool: Pool, engine: Engine) -> None:
    kept, gone = uuid4(), uuid4()
    kafka = Kafka()
    kafka.put(AgentDeleted(agent_id=kept), (9, 1))
    kafka.put(AgentRenamed(agent_id=gone, agent_name="old"), (9, 2))
    kafka.put(AgentRenamed(agent_id=kept, agent_name="new"), (1, 1), log_id=NEWER_LOG)
    kafka.put(AgentDeleted(agent_id=gone), (1, 2), log_id=NEWER_LOG)
    await consume(engine, kafka, batch=1)
    assert await rows(pool) == {kept: ("new", [])}
    assert [row["key"] for row in await pool.fetch("select key from outbox.tombstones")] == [str(gone)]


async def test_records_of_foreign_producers_apply_by_offset(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    kafka = Kafka()
    for name in "abc":
        kafka.put(AgentRenamed(agent_id=agent, agent_name=name))
    await consume(engine, kafka, batch=2)
    assert await rows(pool) == {agent: ("c", [])}
    assert await pool.fetchval(f"select outbox_position from {TABLE}") is None
    again = await consume(engine, kafka)
    assert again.dropped == 3


async def test_odd_records_pass_without_harm(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    renamed = b"agent.renamed"
    kafka = Kafka()
    kafka.put(AgentIgnored(agent_id=agent), (1, 1))
    kafka.put_raw(None, None)
    kafka.put_raw(b"k", None, [("ce_type", None), ("ob-pos", None)])
    kafka.put_raw(b"\xff\xfe", b"{}", [("ce_type", b"\xff\xfe"), ("ob-pos", b"\xff/\xff"), ("x", b"\xff")])
    for position in (b"", b"////", b"18c-ab12/0/1/-1/0/0", b"18c-ab12/99999/1/1/1/1", b"18c-ab12/0/%d/1/1/1" % 2**70):
        body = AgentRenamed(agent_id=agent, agent_name=position.decode()).model_dump_json().encode()
        kafka.put_raw(str(agent).encode(), body, [("ce_type", renamed), ("ob-pos", position), ("ob-pos", position)])
    kafka.put(AgentRenamed(agent_id=agent, agent_name="last"), (1, 2))
    outcome = await consume(engine, kafka)
    assert (outcome.unknown, outcome.applied, outcome.parked) == (4, 6, 0)
    assert await rows(pool) == {agent: ("last", [])}


async def test_a_transient_error_keeps_the_batch(pool: Pool, engine: Engine) -> None:
    """Nothing of it is applied, nothing is parked, and the next try applies all of it."""
    agent = uuid4()
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name="a")])
    partition = await engine.claim(TOPIC, 0, 0)
    for site, side in (("merge_rows", "before"), ("merge_rows", "after"), ("advance", "after")):

        async def lose_connection(at: str, on: str, site: str = site, side: str = side) -> None:
            if at.endswith(f".{site}") and on == side:
                raise ConnectionResetError("injected")

        crash_sites.hook = lose_connection
        with pytest.raises(ConnectionResetError) as caught:
            await engine.apply(partition, kafka.records)
        assert retry.is_transient(caught.value)
        crash_sites.hook = None
        assert await rows(pool) == {}
        assert await parked(pool) == {}
        assert await pool.fetchval("select next_offset from outbox.positions") == 0
    assert (await engine.apply(partition, kafka.records)).applied == 1
    assert await rows(pool) == {agent: ("a", [])}


async def test_a_deadlock_keeps_the_batch(pool: Pool, engine: Engine) -> None:
    """A real one, from the server: SQLSTATE 40P01 is transient, never poison."""
    first, second = sorted([uuid4(), uuid4()])
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name="a") for agent in (first, second)])
    await consume(engine, kafka)
    kafka.put(AgentDeleted(agent_id=first), (2, 1))
    await pool.execute(
        f"create function refuse() returns trigger language plpgsql as $$ begin "
        f"raise exception using errcode = '40P01', message = 'deadlock detected'; end $$; "
        f"create trigger refuse before delete on {TABLE} for each row execute function refuse()"
    )
    partition = await engine.claim(TOPIC, 0, 0)
    with pytest.raises(Exception, match="deadlock") as caught:
        await engine.apply(partition, kafka.records)
    assert retry.is_transient(caught.value)
    assert await parked(pool) == {}
    await pool.execute(f"drop trigger refuse on {TABLE}")
    await engine.apply(partition, kafka.records)
    assert set(await rows(pool)) == {second}


async def test_a_claim_waits_for_the_open_batch_of_the_former_owner(pool: Pool) -> None:
    """And then sees its marks: red when the marks are read by the statement that claims."""
    agent = uuid4()
    former, owner = await make_engine(pool, make_cache()), await make_engine(pool, make_cache())
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name=name) for name in "ab"])
    merged, go_on = asyncio.Event(), asyncio.Event()

    async def hold(site: str, side: str) -> None:
        if site.endswith(".merge_rows") and side == "after" and not merged.is_set():
            merged.set()
            await go_on.wait()

    crash_sites.hook = hold
    theirs = await former.claim(TOPIC, 0, 0)
    batch = asyncio.create_task(former.apply(theirs, kafka.records))
    await merged.wait()
    claim = asyncio.create_task(owner.claim(TOPIC, 0, 0))
    while not await pool.fetchval("select exists (select from pg_stat_activity where wait_event_type = 'Lock')"):
        assert not claim.done()
    go_on.set()
    assert not (await batch).fenced
    mine = await claim
    assert (mine.next_offset, mine.epoch, mine.marks) == (2, 2, {(LOG, 0): (1, 2)})


async def test_two_caches_of_one_topic(log_pool: Pool) -> None:
    await create_table(log_pool, "first_cache")
    await create_table(log_pool, "second_cache")
    await log_pool.execute("alter table second_cache add check (agent_name <> 'refused by the second')")
    engine = await make_engine(log_pool, make_cache("first_cache"), make_cache("second_cache"))
    agent = uuid4()
    kafka = numbered([AgentRenamed(agent_id=agent, agent_name="refused by the second")])
    outcome = await consume(engine, kafka)
    assert (outcome.applied, outcome.parked) == (1, 1)
    assert await rows(log_pool, "first_cache") == {agent: ("refused by the second", [])}
    assert await rows(log_pool, "second_cache") == {}
    assert await parked(log_pool, "first_cache") == {}
    assert await parked(log_pool, "second_cache") == {str(agent): ["agent.renamed"]}


async def test_every_statement_uses_an_index(pool: Pool) -> None:
    """Without statistics and with sequential scans made dear, no plan of a batch scans a table of ours."""
    tables = ("positions", "applied", "parked_keys", "parked_events")
    arguments = {
        "claim": ("c", "t", 0, 0, "o"),
        "applied": ("c", "t", 0),
        "advance": ("c", "t", 0, 1, 0, 1, "id", ["1-aaaa"], [0], [1], [1], ["cache"], "1000", ["cache"], False),
    }
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("set local enable_seqscan = off")
        for name, args in arguments.items():
            text = getattr(apply.SQL, name).text
            plan = "\n".join(row[0] for row in await connection.fetch("explain " + text, *args))
            assert not any(f"Seq Scan on {table}" in plan for table in tables), plan


async def test_a_batch_holds_no_event_and_no_row_while_it_is_written(pool: Pool, engine: Engine) -> None:
    """Nor is the garbage collector held then, which would have to look at them.

    Red when `Work` keeps the steps, when `Change` keeps what was folded, and when `_read` is not all that is held.
    """
    kafka = numbered(AgentRenamed(agent_id=uuid4(), agent_name=str(number), tags=["x"]) for number in range(50))
    gc.collect()
    before = [sum(type(found) is kind for found in gc.get_objects()) for kind in (AgentRenamed, CachedAgent, Step)]
    counted: list[list[int]] = []

    async def count(site: str, side: str) -> None:
        if site.endswith(".merge_rows") and side == "before":
            assert gc.isenabled()
            kinds = (AgentRenamed, CachedAgent, Step)
            counted.append([sum(type(found) is kind for found in gc.get_objects()) for kind in kinds])

    crash_sites.hook = count
    try:
        assert (await consume(engine, kafka)).applied == 50
    finally:
        crash_sites.hook = None
    assert counted == [before]
