"""The events, and how they get into PostgreSQL: in one transaction, or in one of their own each.

About 200 bytes of JSON, 10,000 keys in turn, text that compresses about as badly as text does. They are made inside
the database, so that the loader costs the measured processes nothing, by the same functions for every relay that is
compared.
"""

from typing import Final

from outbox import Event, Key

KEYS: Final = 10_000
PARTITIONS: Final = 8
TOPIC: Final = "llm.agents"


class AgentEvent(Event, topic=TOPIC):
    """What happens to an agent."""

    agent_id: Key[str]


class AgentRenamed(AgentEvent, type="agent.renamed"):
    """The event of every measurement that emits through `outbox.transaction`."""

    agent_name: str
    instructions: str
    version: int
    model: str


CREATE_MAKERS: Final = """
create schema bench;
create function bench.key(i bigint) returns text language sql immutable as $$
    select md5((i % 10000)::text)::uuid::text
$$;
create function bench.payload(i bigint) returns text language sql immutable as $$
    select '{"agent_id":"' || bench.key(i) || '","agent_name":"Agent ' || i % 10000 || '","instructions":"'
           || md5(i::text) || ' ' || md5((-i)::text) || '","version":' || i || ',"model":"model-' || i % 7 || '"}'
$$;
create procedure bench.load_singly(p_topic text, p_first bigint, p_last bigint) language plpgsql as $$
begin
    for i in p_first .. p_last loop
        insert into outbox.events (shard, topic, key, event_id, event_type, payload)
        values (0, p_topic, bench.key(i), outbox.uuid7(), 'agent.renamed', convert_to(bench.payload(i), 'UTF8'));
        commit;
    end loop;
end $$;
"""

LOAD_AT_ONCE: Final = """
insert into outbox.events (shard, topic, key, event_id, event_type, payload)
select 0, $1, bench.key(i), outbox.uuid7(), 'agent.renamed', convert_to(bench.payload(i), 'UTF8')
  from generate_series($2::bigint, $3::bigint) i
"""

WAKE: Final = "select outbox.wake(0::smallint)"  # as every emit does; without it an idle relay looks after 5 s

LOAD_SINGLY: Final = "call bench.load_singly($1, $2, $3)"


def renamed(number: int, keys: int = KEYS) -> AgentRenamed:
    """One event of the same size as the ones made in the database, of so many keys in turn."""
    key = f"{number % keys:032x}"
    return AgentRenamed(
        agent_id=f"{key[:8]}-{key[8:12]}-{key[12:16]}-{key[16:20]}-{key[20:]}",
        agent_name=f"Agent {number % keys}",
        instructions=f"{number * 2_654_435_761 % 2**128:032x} {number * 40_503 % 2**128:032x}",
        version=number,
        model=f"model-{number % 7}",
    )
