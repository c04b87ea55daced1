"""Poison: an event that cannot be applied parks its own key, keeps its order, and heals by a full row."""

from collections.abc import Callable, Sequence
from typing import Final
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from outbox import Event, ParkingFull, Pool, limits
from outbox.consumer.apply import Engine
from tests.support.caching import (
    LOG,
    NEWER_LOG,
    TABLE,
    TOPIC,
    AgentDeleted,
    AgentNamePatched,
    AgentRenamed,
    AgentTagged,
    Kafka,
    consume,
    create_table,
    feed,
    make_cache,
    make_engine,
    numbered,
    parked,
    payload,
    rows,
)


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> Pool:
    await create_table(log_pool)
    return log_pool


@pytest_asyncio.fixture
async def engine(pool: Pool) -> Engine:
    return await make_engine(pool, make_cache())


def forbidden(kafka: Kafka, agent: UUID, at: tuple[int, int]) -> None:
    """Refused by the table (SQLSTATE 23514)."""
    kafka.put(AgentRenamed(agent_id=agent, agent_name="forbidden"), at)


def exploding(kafka: Kafka, agent: UUID, at: tuple[int, int]) -> None:
    """Refused by the handler."""
    kafka.put(AgentRenamed(agent_id=agent, agent_name="explode"), at)


def undecodable(kafka: Kafka, agent: UUID, at: tuple[int, int]) -> None:
    """Refused by the event class."""
    record = kafka.put(AgentRenamed(agent_id=agent, agent_name="-"), at)
    record.value = b'{"agent_id": "no uuid"'


def unstorable(kafka: Kafka, agent: UUID, at: tuple[int, int]) -> None:
    """Refused by PostgreSQL as text (SQLSTATE 22P05)."""
    kafka.put(AgentRenamed(agent_id=agent, agent_name="a\x00b"), at)


def without_value(kafka: Kafka, agent: UUID, at: tuple[int, int]) -> None:
    """A type and no payload."""
    kafka.put(AgentRenamed(agent_id=agent, agent_name="-"), at).value = None


Poison = Callable[[Kafka, UUID, tuple[int, int]], None]
POISONS: Final[Sequence[Poison]] = (forbidden, exploding, undecodable, unstorable, without_value)
REASONS: Final = {
    "forbidden": "CheckViolationError",
    "exploding": "RuntimeError",
    "undecodable": "ValidationError",
    "unstorable": "UntranslatableCharacterError",
    "without_value": "PayloadMissing",
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("place", [0, 500, 999], ids=["first", "middle", "last"])
async def test_one_poison_in_a_thousand_parks_one_key(pool: Pool, engine: Engine, poison: Poison, place: int) -> None:
    agents = [uuid4() for _ in range(1_000)]
    kafka = Kafka()
    for number, agent in enumerate(agents):
        if number == place:
            poison(kafka, agent, (1, number + 1))
        else:
            kafka.put(AgentRenamed(agent_id=agent, agent_name=f"agent {number}"), (1, number + 1))
    outcome = await consume(engine, kafka)
    assert (outcome.applied, outcome.parked) == (999, 1)
    assert set(await rows(pool)) == {*agents} - {agents[place]}
    assert await parked(pool) == {str(agents[place]): ["agent.renamed"]}
    key = await pool.fetchrow("select * from outbox.parked_keys")
    assert key is not None
    assert (key["topic"], key["partition"], key["reason"]) == (TOPIC, 0, REASONS[poison.__name__])
    event = await pool.fetchrow("select * from outbox.parked_events")
    assert event is not None
    assert (event["log_id"], event["window_no"], event["ordinal"], event["offset"]) == (LOG, 1, place + 1, place)
    assert event["payload"] == kafka.records[place].value
    assert event["event_id"] is not None


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("batch", [1, 5], ids=["apart", "together"])
@pytest.mark.parametrize("place", range(5))
async def test_poison_among_full_rows_of_a_key(
    pool: Pool, engine: Engine, poison: Poison, place: int, batch: int
) -> None:
    """The next full row heals it; last, it leaves the row as the event before it had it."""
    agent = uuid4()
    kafka = Kafka()
    for number in range(5):
        if number == place:
            poison(kafka, agent, (1, number + 1))
        else:
            kafka.put(AgentRenamed(agent_id=agent, agent_name=f"name {number}"), (1, number + 1))
    await consume(engine, kafka, batch=batch)
    last = 3 if place == 4 else 4
    assert await rows(pool) == {agent: (f"name {last}", [])}
    assert await parked(pool) == ({str(agent): ["agent.renamed"]} if place == 4 else {})
    assert await pool.fetchval("select count(*) from outbox.parked_events") == (place == 4)


@pytest.mark.parametrize("batch", [1, 2, 9], ids=["apart", "in twos", "together"])
async def test_patches_queue_behind_a_parked_event(pool: Pool, engine: Engine, batch: int) -> None:
    agent, other = uuid4(), uuid4()
    kafka = Kafka()
    kafka.put(AgentRenamed(agent_id=agent, agent_name="a", tags=["a"]), (1, 1))
    forbidden(kafka, agent, (1, 2))
    kafka.put(AgentTagged(agent_id=agent, tags=["behind"]), (1, 3))
    kafka.put(AgentRenamed(agent_id=other, agent_name="other"), (1, 4))
    kafka.put(AgentTagged(agent_id=agent, tags=["behind too"]), (1, 5))
    await consume(engine, kafka, batch=batch)
    assert await rows(pool) == {agent: ("a", ["a"]), other: ("other", [])}
    assert await parked(pool) == {str(agent): ["agent.renamed", "agent.tagged", "agent.tagged"]}


async def test_a_value_that_nobody_would_have_seen_is_no_poison(pool: Pool, engine: Engine) -> None:
    """A batch is one step for readers: a refused value that a later patch of the batch replaces never exists."""
    agent = uuid4()
    kafka = Kafka()
    forbidden(kafka, agent, (1, 1))
    kafka.put(AgentNamePatched(agent_id=agent, agent_name="fine"), (1, 2))
    await consume(engine, kafka)
    assert await rows(pool) == {agent: ("fine", [])}
    assert await parked(pool) == {}


@pytest.mark.parametrize("healing", ["full row", "deletion"])
@pytest.mark.parametrize("together", [False, True])
async def test_what_is_whole_heals_a_parked_key(pool: Pool, engine: Engine, healing: str, together: bool) -> None:  # noqa: FBT001
    agent = uuid4()
    kafka = Kafka()
    forbidden(kafka, agent, (1, 1))
    kafka.put(AgentTagged(agent_id=agent, tags=["lost"]), (1, 2))
    partition = await engine.claim(TOPIC, 0, 0)
    if not together:
        await feed(engine, partition, kafka.records)
        assert len((await parked(pool))[str(agent)]) == 2
    healer: Event = (
        AgentRenamed(agent_id=agent, agent_name="healed") if healing == "full row" else AgentDeleted(agent_id=agent)
    )
    kafka.put(healer, (2, 1))
    kafka.put(AgentTagged(agent_id=agent, tags=["after"]), (2, 2))
    outcome = await feed(engine, partition, kafka.records[partition.next_offset :])
    assert outcome.resolved == (0 if together else 2)
    if healing == "full row":
        assert await rows(pool) == {agent: ("healed", ["after"])}
        assert await parked(pool) == {}
    else:
        assert await rows(pool) == {}
        assert await parked(pool) == {str(agent): ["agent.tagged"]}
        reasons = await pool.fetch("select reason from outbox.parked_keys")
        assert [row["reason"] for row in reasons] == ["RowMissing"]


async def test_a_full_row_of_an_older_log_does_not_resolve_what_a_newer_log_parked(pool: Pool, engine: Engine) -> None:
    """Red when `resolve` does not compare logs."""
    agent = uuid4()
    kafka = Kafka()
    kafka.put(AgentTagged(agent_id=agent, tags=["newer"]), (1, 1), log_id=NEWER_LOG)
    kafka.put(AgentRenamed(agent_id=agent, agent_name="older"), (1, 1))
    await consume(engine, kafka, batch=1)
    assert await parked(pool) == {str(agent): ["agent.tagged"]}


@pytest.mark.parametrize("batch", [1, 3])
async def test_a_patch_waits_for_its_row(pool: Pool, engine: Engine, batch: int) -> None:
    agent = uuid4()
    kafka = numbered([AgentNamePatched(agent_id=agent, agent_name="n"), AgentTagged(agent_id=agent, tags=["t"])])
    await consume(engine, kafka, batch=batch)
    assert await rows(pool) == {}
    assert await parked(pool) == {str(agent): ["agent.name_patched", "agent.tagged"]}
    assert await pool.fetchval("select reason from outbox.parked_keys") == "RowMissing"


async def test_a_patch_after_a_deletion_waits(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    kafka = numbered(
        [
            AgentRenamed(agent_id=agent, agent_name="a"),
            AgentDeleted(agent_id=agent),
            AgentTagged(agent_id=agent, tags=["t"]),
        ]
    )
    await consume(engine, kafka)
    assert await rows(pool) == {}
    assert await parked(pool) == {str(agent): ["agent.tagged"]}


async def test_several_poisons_in_one_batch(pool: Pool, engine: Engine) -> None:
    agents = [uuid4() for _ in range(64)]
    kafka = Kafka()
    for number, agent in enumerate(agents, start=1):
        if number % 3:
            kafka.put(AgentRenamed(agent_id=agent, agent_name="fine"), (1, number))
        else:
            POISONS[number % len(POISONS)](kafka, agent, (1, number))
    outcome = await consume(engine, kafka)
    assert outcome.parked == 21
    assert set(await rows(pool)) == {agent for number, agent in enumerate(agents, start=1) if number % 3}
    assert set(await parked(pool)) == {str(agent) for number, agent in enumerate(agents, start=1) if not number % 3}


async def test_a_deferred_constraint_is_poison_too(pool: Pool, engine: Engine) -> None:
    """Red without `set constraints all immediate`: the error comes at COMMIT, and the batch never gets through."""
    await pool.execute(f"alter table {TABLE} add unique (agent_name) deferrable initially deferred")
    first, second, third = uuid4(), uuid4(), uuid4()
    kafka = numbered(
        [AgentRenamed(agent_id=agent, agent_name=name) for agent, name in ((first, "x"), (second, "x"), (third, "y"))]
    )
    outcome = await consume(engine, kafka)
    assert (outcome.applied, outcome.parked) == (2, 1)
    assert third in await rows(pool)


async def test_a_trigger_may_refuse(pool: Pool, engine: Engine) -> None:
    await pool.execute(
        "create function refuse() returns trigger language plpgsql as $$ begin "
        "if new.agent_name = 'x' then raise exception 'not here'; end if; return new; end $$; "
        f"create trigger refuse before insert or update on {TABLE} for each row execute function refuse()"
    )
    first, second = uuid4(), uuid4()
    await consume(engine, numbered([AgentRenamed(agent_id=a, agent_name=n) for a, n in ((first, "x"), (second, "y"))]))
    assert set(await rows(pool)) == {second}
    assert set(await parked(pool)) == {str(first)}


async def test_keys_that_decode_to_one_row_apply_in_order(pool: Pool, engine: Engine) -> None:
    """A foreign producer may write a uuid in capitals; it is the same row."""
    agent = uuid4()
    kafka = Kafka()
    kafka.put(AgentRenamed(agent_id=agent, agent_name="a"))
    kafka.put(AgentRenamed(agent_id=agent, agent_name="b")).key = str(agent).upper().encode()
    undecodable(kafka, agent, (1, 1))
    kafka.records[-1].key = str(agent).upper().encode()
    await consume(engine, kafka)
    assert await rows(pool) == {agent: ("b", [])}
    assert set(await parked(pool)) == {str(agent)}


async def test_undecodable_records_without_a_usable_key(pool: Pool, engine: Engine) -> None:
    kafka = Kafka()
    headers = [("ce_type", b"agent.renamed"), ("ce_id", b"no uuid"), ("odd", b"\xff\x00"), ("none", None)]
    kafka.put_raw(None, b"{", headers)
    kafka.put_raw(b"\xff\x00", b"{", headers)
    kafka.put_raw(b"k" * 5_000, b"{", headers)
    outcome = await consume(engine, kafka)
    assert outcome.parked == 3
    keys = sorted(await parked(pool))
    assert keys[0] == "\\xff\\x00"
    assert keys[2] == "offset 0 of partition 0"
    assert keys[1].startswith("k" * 100 + "... sha256:")


async def test_a_full_park_stops_the_partition_and_loses_nothing(
    pool: Pool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PARKED_MAX_EVENTS", 2)
    agents = [uuid4() for _ in range(3)]
    kafka = Kafka()
    for number, agent in enumerate(agents, start=1):
        forbidden(kafka, agent, (1, number))
    partition = await engine.claim(TOPIC, 0, 0)
    await feed(engine, partition, kafka.records[:2], batch=1)
    with pytest.raises(ParkingFull, match=TABLE):
        await feed(engine, partition, kafka.records[2:])
    assert len(await parked(pool)) == 2
    assert partition.next_offset == 2
    await pool.execute("delete from outbox.parked_events; delete from outbox.parked_keys")
    await feed(engine, partition, kafka.records[2:])
    assert set(await parked(pool)) == {str(agents[2])}


async def test_a_parked_event_keeps_all_that_a_retry_needs(pool: Pool, engine: Engine) -> None:
    agent = uuid4()
    kafka = Kafka()
    kafka.put(AgentTagged(agent_id=agent, tags=["t"]), (3, 4))
    kafka.records[0].headers = [*kafka.records[0].headers, ("ob-schema-version", b"7"), ("traceparent", b"00-1")]
    await consume(engine, kafka)
    row = await pool.fetchrow("select * from outbox.parked_events")
    assert row is not None
    assert (row["schema_version"], row["event_type"], row["position"]) == (7, "agent.tagged", 3004)
    assert payload(row) == {"agent_id": str(agent), "tags": ["t"]}
    assert '"traceparent": "00-1"' in row["headers"]
    assert row["created_at"].timestamp() == 1_750_000_000
