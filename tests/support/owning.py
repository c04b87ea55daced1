"""An owner with a table of agents and a real log, its relay in small, and a cache of it in the same database."""

from dataclasses import dataclass, field
from typing import Any, Final, LiteralString
from uuid import UUID

from outbox import Cache, Connection, Pool, SqlOwner, Transaction
from outbox.cache.owner import Owner
from tests.support.caching import TOPIC, AgentDeleted, AgentRenamed, CachedAgent, Kafka, create_table, make_cache

QUERY: Final[LiteralString] = "select id as agent_id, name as agent_name, tags from agents"


async def create_agents(pool: Pool) -> None:
    """The owner's table, and the cache's."""
    await pool.execute(
        "create table agents (id uuid primary key, name text not null, tags text[] not null default '{}')"
    )
    await create_table(pool)


def owned_cache(pool: Pool, owner: Owner | None = None) -> Cache[CachedAgent]:
    """The cache of `caching`, with an owner."""
    cache = make_cache()
    cache.owner = owner or SqlOwner(pool, QUERY)  # type: ignore[misc]
    return cache


async def rename(tx: Transaction, key: UUID, name: str) -> None:
    """Write an agent and emit the event about it."""
    await tx.execute(
        "insert into agents (id, name) values ($1, $2) on conflict (id) do update set name = excluded.name", key, name
    )
    tx.emit(AgentRenamed(agent_id=key, agent_name=name))


async def delete(tx: Transaction, key: UUID) -> None:
    """Delete an agent and emit the event about it."""
    await tx.execute("delete from agents where id = $1", key)
    tx.emit(AgentDeleted(agent_id=key))


async def owned(db: Pool | Connection) -> dict[UUID, tuple[str, list[str]]]:
    """What the owner has, as `caching.rows` has the cache."""
    return {row["id"]: (row["name"], row["tags"]) for row in await db.fetch("select * from agents")}


@dataclass(slots=True)
class SmallRelay:
    """Turns what has committed since the last look into records, window by window, as the relay does."""

    pool: Pool
    kafka: Kafka = field(default_factory=Kafka)
    snapshot: str | None = None
    window: int = 0

    async def publish(self) -> list[Any]:
        """The records of one window; none if nothing has committed."""
        async with self.pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            now = await connection.fetchval("select pg_current_snapshot()::text")
            events = await connection.fetch(
                "select e.*, l.log_id from outbox.events e, outbox.logs l where l.is_current and e.topic = $1"
                " and ($2::text is null or not pg_visible_in_snapshot(e.transaction_id, $2::text::pg_snapshot))"
                " order by e.position",
                TOPIC,
                self.snapshot,
            )
        if not events:
            return []
        self.snapshot = now
        self.window += 1
        found = []
        for ordinal, event in enumerate(events, start=1):
            at = f"{event['log_id']}/0/{self.window}/{ordinal}/{event['position']}/{event['transaction_id']}"
            headers = [
                ("ce_id", str(event["event_id"]).encode()),
                ("ce_type", event["event_type"].encode()),
                ("ob-pos", at.encode()),
            ]
            found.append(self.kafka.put_raw(event["key"].encode(), bytes(event["payload"]), headers))
        return found
