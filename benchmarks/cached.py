"""The cache of every measurement, its table, its events as a consuming service declares them, and records of them.

The events are those of `workload`: about 200 bytes of JSON. Here the keys are counted out in turn, because how many
keys a batch has decides how much of it is left to write once it is folded.
"""

from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID

from pydantic import BaseModel

from benchmarks import workload
from outbox import Cache, Event, Inbox, Key, Transaction, kafka, wire
from outbox.cache.owner import Owner

TABLE: Final = "agent_cache"
EVENT_TYPE: Final = "agent.renamed"
LOG: Final = "19a00000000-abcd"
WINDOW_EVENTS: Final = 2_500

CREATE_TABLE: Final = f"""
create table {TABLE} (
    agent_id uuid primary key, agent_name text not null, instructions text not null, version integer not null,
    model text not null
)
"""
CREATE_NOTES: Final = "create table notes (agent_id uuid not null, agent_name text not null, version integer not null)"
NOTE: Final = "insert into notes (agent_id, agent_name, version) values ($1, $2, $3)"
CREATE_OWNER: Final = """
create table agents (
    id uuid primary key, name text not null, instructions text not null, version integer not null, model text not null
)
"""
FILL_OWNER: Final = """
insert into agents
select lpad(to_hex(i), 32, '0')::uuid, 'Agent ' || i, md5(i::text) || ' ' || md5((-i)::text), 0, 'model-' || i % 7
  from generate_series(0, $1::bigint - 1) i
"""
OWNER_QUERY: Final = "select id as agent_id, name as agent_name, instructions, version, model from agents"
CHANGE: Final = """
with changed as (
    update agents set version = version + 1, instructions = md5(($2::bigint)::text) || ' ' || md5((-$2::bigint)::text)
     where id in (select lpad(to_hex(i), 32, '0')::uuid from unnest($1::bigint[]) i)
    returning id, name, instructions, version, model
)
select outbox.emit('agent.renamed', $3, id::text,
                   jsonb_build_object('agent_id', id, 'agent_name', name, 'instructions', instructions,
                                      'version', version, 'model', model))
  from changed
"""
DIFFERENT: Final = f"""
select count(*) from agents a full join {TABLE} c on c.agent_id = a.id
 where (c.agent_name, c.instructions, c.version, c.model) is distinct from (a.name, a.instructions, a.version, a.model)
"""  # noqa: S608 - a constant
PREPARE: Final = f"select outbox.prepare_cache('{TABLE}')"

Row = tuple[int, bytes, bytes, list[wire.Header]]
"""Time stamp, key, value and headers of one record."""


class CachedAgent(BaseModel):
    """A row."""

    agent_id: UUID
    agent_name: str
    instructions: str
    version: int
    model: str


def events(topic: str) -> type[Any]:
    """The event as a consuming service declares it; on a broker shared with others its topic has a name of its own."""

    class AgentRenamed(Event, type=EVENT_TYPE, topic=topic):
        agent_id: Key[UUID]
        agent_name: str
        instructions: str
        version: int
        model: str

    return AgentRenamed


def declare(topic: str, owner: Owner | None = None) -> Cache[CachedAgent]:
    """The cache: a full row of each event."""
    agents = Cache(CachedAgent, table=TABLE, key="agent_id", topic=topic, owner=owner)

    def renamed(event: Any) -> CachedAgent:
        return CachedAgent(
            agent_id=event.agent_id,
            agent_name=event.agent_name,
            instructions=event.instructions,
            version=event.version,
            model=event.model,
        )

    renamed.__annotations__["event"] = events(topic)
    agents.on(renamed)
    return agents


def declare_inbox(topic: str) -> Inbox:
    """An inbox that writes a row for each event, with a statement of its own."""
    inbox = Inbox("bench", topic=topic)

    async def note(tx: Transaction, event: Any) -> None:
        await tx.execute(NOTE, event.agent_id, event.agent_name, event.version)

    note.__annotations__["event"] = events(topic)
    inbox.on(note)
    return inbox


def dealt(count: int, keys: int) -> Iterator[list[list[Row]]]:
    """Records as the relay publishes them, by partition, window by window."""
    fixed = wire.type_headers("bench", EVENT_TYPE, 1)
    for window_no, first in enumerate(range(0, count, WINDOW_EVENTS), 1):
        prefix = wire.position_prefix(LOG, 0, window_no)
        window: list[list[Row]] = [[] for _ in range(workload.PARTITIONS)]
        for ordinal, number in enumerate(range(first, min(first + WINDOW_EVENTS, count)), 1):
            event = workload.renamed(number, keys)
            position = b"%b%d/%d/%d" % (prefix, ordinal, number + 1, number + 1_000)
            identity = UUID(int=(0x019A_0000_0000_7000_8000 << 48) + number)
            headers = [*fixed, ("ce_id", str(identity).encode()), (wire.POSITION_HEADER, position)]
            at = kafka.partition_hash(event.agent_id) % workload.PARTITIONS
            body = event.__pydantic_serializer__.to_json(event)
            window[at].append((1_750_000_000_000 + number, event.agent_id.encode(), body, headers))
        yield window
