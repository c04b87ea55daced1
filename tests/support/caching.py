"""Caches over a small vocabulary of events, records without Kafka, and an engine on a fresh database."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import asyncpg
from pydantic import BaseModel, Field

from outbox import DELETE, Cache, Delete, Event, Key, Owner, Patch, Pool
from outbox.codec import uuid7
from outbox.consumer.apply import Engine, Outcome, Partition

TOPIC: Final = "llm.agents"
LOG: Final = "18c2a3b4d5e-ab12"
NEWER_LOG: Final = "18c2a3b4d5f-0001"
TABLE: Final = "workflow_agent_cache"


class AgentEvent(Event, topic=TOPIC):
    agent_id: Key[UUID]


class AgentRenamed(AgentEvent, type="agent.renamed"):
    agent_name: str
    tags: list[str] = Field(default_factory=list)


class AgentNamePatched(AgentEvent, type="agent.name_patched"):
    agent_name: str


class AgentTagged(AgentEvent, type="agent.tagged"):
    tags: list[str]


class AgentDeleted(AgentEvent, type="agent.deleted"):
    pass


class AgentIgnored(AgentEvent, type="agent.ignored"):
    pass


class CachedAgent(BaseModel):
    agent_id: UUID
    agent_name: str
    tags: list[str] = Field(default_factory=list)


def make_cache(
    table: str = TABLE, owner: Owner | None = None, *, memory_max_rows: int | None = None
) -> Cache[CachedAgent]:
    """A cache of agents; the name `explode` makes its handler raise, and the table refuses the name `forbidden`."""
    cache = Cache(CachedAgent, table=table, key="agent_id", topic=TOPIC, owner=owner, memory_max_rows=memory_max_rows)

    @cache.on
    def renamed(event: AgentRenamed) -> CachedAgent:
        if event.agent_name == "explode":
            raise RuntimeError("a bug in the handler")
        return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name, tags=event.tags)

    @cache.on
    def name_patched(event: AgentNamePatched) -> Patch:
        return Patch(event.agent_id, agent_name=event.agent_name)

    @cache.on
    def tagged(event: AgentTagged) -> Patch:
        return Patch(event.agent_id, tags=event.tags)

    @cache.on
    def deleted(event: AgentDeleted) -> Delete:
        return DELETE

    return cache


async def create_table(pool: Pool, table: str = TABLE) -> None:
    """The table of `make_cache`; its columns are not null, as a service would have them."""
    await pool.execute(
        f"create table {table} (agent_id uuid primary key, agent_name text not null check (agent_name <> 'forbidden'), "
        "tags text[] not null)"
    )
    await pool.execute("select outbox.prepare_cache($1::text::regclass)", table)


@dataclass(slots=True)
class Rec:
    """A Kafka record, as far as the engine looks."""

    offset: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]] = ()
    timestamp: int = 1_750_000_000_000
    topic: str = TOPIC
    partition: int = 0


@dataclass(slots=True)
class Kafka:
    """One partition that a relay and others write to: offsets grow, positions are what the caller says."""

    records: list[Rec] = field(default_factory=list)
    first: int = 0
    log_id: str = LOG

    def put(self, event: Event, at: tuple[int, int] | None = None, *, log_id: str | None = None) -> Rec:
        """Append an event, from a relay at (window, ordinal) or from a foreign producer."""
        kind = type(event).__kind__
        assert kind is not None
        headers: list[tuple[str, bytes | None]] = [("ce_id", str(uuid7()).encode()), ("ce_type", kind.type.encode())]
        if at is not None:
            window, ordinal = at
            position = window * 1000 + ordinal
            headers.append(("ob-pos", f"{log_id or self.log_id}/0/{window}/{ordinal}/{position}/{position}".encode()))
        return self.put_raw(str(getattr(event, kind.key_field)).encode(), event.model_dump_json().encode(), headers)

    def put_raw(self, key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes | None]] = ()) -> Rec:
        """Append anything."""
        self.records.append(Rec(self.first + len(self.records), key, value, headers))
        return self.records[-1]

    def again(self, record: Rec) -> Rec:
        """Append the same bytes again, as a replay or a zombie does."""
        return self.put_raw(record.key, record.value, record.headers)


def numbered(events: Iterable[Event], window: int = 1) -> Kafka:
    """A partition with these events in one window."""
    kafka = Kafka()
    for ordinal, event in enumerate(events, start=1):
        kafka.put(event, (window, ordinal))
    return kafka


async def make_engine(pool: Pool, *caches: Cache[Any], name: str = "workflow") -> Engine:
    """An engine, prepared."""
    engine = Engine(pool, name, "test", caches)
    await engine.prepare()
    return engine


async def consume(engine: Engine, kafka: Kafka, *, batch: int | None = None, number: int = 0) -> Outcome:
    """Claim the partition and apply all that it has, in batches."""
    partition = await engine.claim(TOPIC, number, 0)
    return await feed(engine, partition, kafka.records, batch=batch)


async def feed(engine: Engine, partition: Partition, records: Sequence[Rec], *, batch: int | None = None) -> Outcome:
    """Apply records to a claimed partition, in batches."""
    total = Outcome()
    size = batch or max(len(records), 1)
    for start in range(0, len(records), size):
        total += await engine.apply(partition, records[start : start + size])
    return total


async def rows(pool: Pool, table: str = TABLE) -> dict[UUID, tuple[str, list[str]]]:
    """Name and tags of each cached agent."""
    found = await pool.fetch(f"select agent_id, agent_name, tags from {table}")
    return {row["agent_id"]: (row["agent_name"], row["tags"]) for row in found}


async def parked(pool: Pool, parker: str = TABLE) -> dict[str, list[str]]:
    """Keys that wait, with the types of their events in order."""
    keys: dict[str, list[str]] = {
        row["key"]: [] for row in await pool.fetch("select key from outbox.parked_keys where parker = $1", parker)
    }
    events = await pool.fetch(
        "select key, event_type, payload from outbox.parked_events where parker = $1 and state = 'parked' order by id",
        parker,
    )
    for event in events:
        keys[event["key"]].append(event["event_type"])
    return keys


def payload(row: asyncpg.Record) -> Any:
    """A parked event's payload, decoded."""
    return json.loads(row["payload"])
