"""`outbox cache explain`: each verdict by the rule that the consumer and the merge go by, and the screen."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from outbox import Consumer, Pool, kafka
from outbox.cache.explain import Explanation, Wanted, explain
from outbox.cache.verdicts import Known, Scan, Verdict, judge
from outbox.consumer.apply import Engine
from outbox.consumer.record import arrival
from outbox.errors import CacheDeclarationError, CacheNotFed
from tests.support.caching import (
    NEWER_LOG,
    TABLE,
    TOPIC,
    AgentDeleted,
    AgentIgnored,
    AgentRenamed,
    Kafka,
    Rec,
    create_table,
    feed,
    make_cache,
    make_engine,
    numbered,
)
from tests.support.consumer_process import SETTINGS, vocabulary
from tests.support.consumer_process import TABLE as NAMES
from tests.support.consumer_process import create_table as create_names
from tests.support.faults import eventually
from tests.support.handmade import page, pages_of
from tests.support.kafka_server import create_topic
from tests.support.owning import owned_cache
from tests.support.producing import produce

ROOT = Path(__file__).parents[2]
OUTBOX = str(Path(sys.executable).with_name("outbox"))
LOW, HIGH = UUID(int=1 << 120), UUID(int=2 << 120)
KEY = str(LOW)


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> Pool:
    await create_table(log_pool)
    return log_pool


@pytest_asyncio.fixture
async def engine(pool: Pool) -> Engine:
    return await make_engine(pool, make_cache())


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Kafka:
    """One partition in place of Kafka."""
    made = Kafka()

    class Tail:
        def __init__(self, _servers: str) -> None: ...

        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *exc: object) -> None: ...

        async def ends(self, topic: str, _count: int) -> dict[int, tuple[int, int]]:
            return {0: (made.first, made.first + len(made.records))} if topic == TOPIC else {}

        async def read(self, _topic: str, ranges: Mapping[int, tuple[int, int]]) -> AsyncIterator[Rec]:
            for record in made.records:
                if ranges[0][0] <= record.offset < ranges[0][1]:
                    yield record

    monkeypatch.setattr(kafka, "Tail", Tail)
    return made


def renamed(name: str, agent: UUID = LOW) -> AgentRenamed:
    return AgentRenamed(agent_id=agent, agent_name=name)


async def told(pool: Pool, key: str = KEY, **wanted: Any) -> Explanation:
    return await explain(pool, TABLE, key, Wanted(**{"cache": make_cache(), "servers": "kafka", **wanted}))


def verdicts(found: Explanation) -> dict[int, tuple[Verdict, int | None]]:
    assert found.scanned is not None
    return {record.offset: (record.verdict, record.because) for record in found.scanned.records}


async def test_events_alone(pool: Pool, engine: Engine, log: Kafka) -> None:
    partition = await engine.claim(TOPIC, 0, 0)
    log.put(renamed("a"), (1, 1))
    log.put(renamed("other", HIGH), (1, 2))
    log.put(AgentIgnored(agent_id=LOW), (1, 3))
    log.put(renamed("b"), (1, 4))
    log.again(log.records[0])
    log.put(renamed("forbidden"), (2, 1))
    await feed(engine, partition, log.records)
    log.put(renamed("later"), (3, 1))
    found = await told(pool)
    assert verdicts(found) == {
        0: (Verdict.SUPERSEDED, 3),
        2: (Verdict.UNKNOWN_TYPE, None),
        3: (Verdict.APPLIED_LAST, None),
        4: (Verdict.DUPLICATE, 0),
        5: (Verdict.PARKED, None),
        6: (Verdict.NOT_READ, None),
    }
    assert found.row is not None
    assert (found.row["agent_name"], found.is_known) == ("b", True)
    origin = found.row_origin
    assert origin is not None
    assert (origin.partition, origin.offset, origin.position, origin.by_page) == (0, 3, 1004, False)
    assert [(one.parker, one.events) for one in found.parked] == [(TABLE, 1)]
    without = await told(pool, cache=None)
    assert verdicts(without)[2] == (Verdict.SUPERSEDED, 3), "nobody knows the handlers"
    assert set(verdicts(await told(pool, records=3))) == {4, 5, 6}
    assert (await told(pool, servers=None)).scanned is None


async def test_a_page_of_the_owner(pool: Pool, engine: Engine, log: Kafka) -> None:
    """Red where verdicts do not ask `page_sees`: what the page contains would have no reason."""
    partition = await engine.claim(TOPIC, 0, 0)
    log.put(renamed("in the page"), (1, 1))
    await feed(engine, partition, log.records)
    owner = await pages_of(pool, make_cache())
    await owner.merge(page([(LOW, "page")], xmax=2002), after=None, through=None)
    log.put(renamed("in the page, too"), (2, 1))
    await feed(engine, partition, log.records[1:])
    found = await told(pool)
    (one,) = found.pages
    assert verdicts(found) == {0: (Verdict.SEEN_BY_PAGE, one.id), 1: (Verdict.SEEN_BY_PAGE, one.id)}
    assert found.row_origin is not None
    assert (found.row_origin.by_page, found.row_origin.page_id, found.row_origin.position) == (True, one.id, 1001)
    log.put(renamed("newer"), (3, 1))
    await feed(engine, partition, log.records[2:])
    found = await told(pool)
    assert verdicts(found)[2] == (Verdict.APPLIED_LAST, None)
    assert found.row_origin is not None
    assert (found.row_origin.by_page, found.row_origin.page_id) == (False, one.id)
    absent = await told(pool, str(HIGH))
    assert (absent.row, absent.is_known, [seen.id for seen in absent.pages]) == (None, False, [one.id])


async def test_deleted_keys(pool: Pool, engine: Engine, log: Kafka) -> None:
    partition = await engine.claim(TOPIC, 0, 0)
    log.put(renamed("a"), (1, 1))
    log.put(AgentDeleted(agent_id=LOW), (1, 2))
    await feed(engine, partition, log.records)
    found = await told(pool)
    assert (found.row, found.is_known) == (None, True)
    assert found.tombstone is not None
    assert (found.tombstone.position, found.tombstone.by_page) == (1002, False)
    assert verdicts(found) == {0: (Verdict.SUPERSEDED, 1), 1: (Verdict.APPLIED_LAST, None)}
    owner = await pages_of(pool, make_cache())
    await owner.merge_keys(page([], xmax=5000), [HIGH])
    found = await told(pool, str(HIGH))
    assert found.tombstone is not None
    assert (found.tombstone.by_page, found.is_known) == (True, True)


async def test_an_older_log(pool: Pool, engine: Engine, log: Kafka) -> None:
    partition = await engine.claim(TOPIC, 0, 0)
    log.put(renamed("newer log"), (1, 1), log_id=NEWER_LOG)
    await feed(engine, partition, log.records)
    log.put(renamed("late bytes"), (9, 1))
    await feed(engine, partition, log.records[1:])
    assert verdicts(await told(pool)) == {0: (Verdict.APPLIED_LAST, None), 1: (Verdict.OLDER_LOG, None)}


async def test_other_hands(pool: Pool, engine: Engine, log: Kafka) -> None:
    partition = await engine.claim(TOPIC, 0, 0)
    log.put(renamed("a"), (1, 1))
    await feed(engine, partition, log.records)
    await pool.execute(f"delete from {TABLE}")
    assert verdicts(await told(pool)) == {0: (Verdict.NO_TRACE, None)}


def test_replayed_records_are_told_apart() -> None:
    log = Kafka()
    log.put(renamed("a"), (1, 1))
    again = log.again(log.records[0])
    again.headers = [*again.headers, ("ob-replay", b"1")]
    scan = Scan()
    for record in log.records:
        scan.take(arrival(record), is_of_key=True)
    dropped, taken = (
        [one.verdict for one in judge(scan, Known(next_offset=9, offset=0, replays=replays), {})]
        for replays in (False, True)
    )
    assert dropped == [Verdict.APPLIED_LAST, Verdict.REPLAYED]
    assert taken == [Verdict.APPLIED_LAST, Verdict.NO_TRACE]


async def test_the_owners_row(pool: Pool, log: Kafka) -> None:
    await pool.execute(
        "create table agents (id uuid primary key, name text not null, tags text[] not null default '{}')"
    )
    cache = owned_cache(pool)
    engine = await make_engine(pool, cache)
    await feed(engine, await engine.claim(TOPIC, 0, 0), numbered([renamed("ours")]).records)
    found = await told(pool, cache=cache)
    assert found.owner is not None
    assert (found.owner.row, found.owner.error) == (None, None)
    await pool.execute("insert into agents values ($1, 'theirs')", LOW)
    found = await told(pool, cache=cache)
    assert found.owner is not None
    assert found.owner.differs == ("agent_name",)
    await pool.execute("drop table agents")
    found = await told(pool, cache=cache)
    assert found.owner is not None
    assert "agents" in (found.owner.error or "")


async def test_keys_and_tables_that_cannot_be(pool: Pool, engine: Engine, log: Kafka) -> None:
    with pytest.raises(CacheNotFed, match="no consumer has fed"):
        await explain(pool, "elsewhere", KEY, Wanted())
    with pytest.raises(CacheDeclarationError, match="no UUID"):
        await told(pool, "no uuid")
    assert (await told(pool, KEY.upper())).key == KEY
    await pool.execute(f"alter table {TABLE} add unique (agent_name)")
    with pytest.raises(CacheDeclarationError, match="--app"):
        await told(pool, cache=None)
    assert not (await told(pool)).is_known
    log.first = 5
    found = await told(pool, partition=3)
    assert found.scanned is not None
    assert found.scanned.why_not == f"topic {TOPIC} has no partition 3"


async def test_the_screen(log_pool: Pool, broker: str, database: str, topic: str, tmp_path: Path) -> None:
    """On a real broker: the partition is worked out from the key, text of events cannot address the terminal."""
    words = vocabulary(topic)
    await create_names(log_pool)
    await create_topic(broker, topic, partitions=3)
    agent = uuid4()
    await produce(
        broker,
        topic,
        [words.named(agent_id=agent, name="first"), words.named(agent_id=agent, name="\x1b[31mred")],
        window=1,
        partitions=3,
    )
    async with Consumer(log_pool, broker, words.cache, settings=SETTINGS):

        async def cached() -> bool:
            return bool(await log_pool.fetchval(f"select count(*) from {NAMES} where outbox_position = 100002"))

        await eventually(cached, what="the row")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SAGABOX_", "PG"))},
        "DATABASE_URL": database, "KAFKA_BOOTSTRAP_SERVERS": broker, "COLUMNS": "110", "NO_COLOR": "1",
    }  # fmt: skip

    async def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return await asyncio.to_thread(
            subprocess.run, [OUTBOX, "cache", "explain", *arguments], env=environment, cwd=tmp_path,
            capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    done = await run(NAMES, str(agent))
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("made by", "offset 1, log", "superseded by offset 1", "applied last", "\\u001b[31mred"):
        assert line in done.stdout, done.stdout
    assert "\x1b" not in done.stdout
    done = await run(NAMES, str(agent), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, [record["verdict"] for record in found["scanned"]["records"]]) == (
        0,
        ["superseded", "applied last"],
    )
    done = await run(NAMES, str(uuid4()), "--newest", "0")
    assert (done.returncode, "nothing is known of this key" in done.stdout) == (1, True)
    environment["KAFKA_BOOTSTRAP_SERVERS"] = "localhost:1"
    assert (await run(NAMES, str(agent))).returncode == 4
