"""The cache of every measurement, its table, its events as a consuming service declares them, and records of them.

The events are those of `workload`: about 200 bytes of JSON. Here the keys are counted out in turn, because how many
keys a batch has decides how much of it is left to write once it is folded.
"""

from collections.abc import Iterator
from typing import Final
from uuid import UUID

from pydantic import BaseModel

from benchmarks import workload
from outbox import Cache, Event, Key, kafka, wire

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


def declare(topic: str) -> Cache[CachedAgent]:
    """The cache: a full row of each event. The topic has a name of its own where the broker is not ours alone."""

    class AgentRenamed(Event, type=EVENT_TYPE, topic=topic):
        agent_id: Key[UUID]
        agent_name: str
        instructions: str
        version: int
        model: str

    agents = Cache(CachedAgent, table=TABLE, key="agent_id", topic=topic)

    @agents.on
    def renamed(event: AgentRenamed) -> CachedAgent:
        return CachedAgent(
            agent_id=event.agent_id,
            agent_name=event.agent_name,
            instructions=event.instructions,
            version=event.version,
            model=event.model,
        )

    return agents


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
