"""The LLM agent service: owns the agents, and says in events what happens to them.

Each function writes and emits in one transaction: the event exists if and only if the write does. They take a pool, or
the caller's transaction, in which they then are a savepoint.
"""

from uuid import UUID

import outbox
from examples.agents.events import AgentCreated, AgentDeleted, AgentRenamed


class AgentNotFoundError(LookupError):
    """There is no such agent, or no longer."""


async def create(db: outbox.Db, agent_id: UUID, name: str) -> None:
    async with outbox.transaction(db) as tx:
        await tx.execute("insert into agents (id, name) values ($1, $2)", agent_id, name)
        tx.emit(AgentCreated(agent_id=agent_id, agent_name=name))


async def rename(db: outbox.Db, agent_id: UUID, name: str) -> None:
    async with outbox.transaction(db) as tx:
        found = await tx.fetchval(
            "update agents set name = $2 where id = $1 and deleted_at is null and status <> 'archived' returning id",
            agent_id,
            name,
        )
        if found is None:
            raise AgentNotFoundError(agent_id)
        tx.emit(AgentRenamed(agent_id=agent_id, agent_name=name))


async def delete(db: outbox.Db, agent_id: UUID) -> None:
    async with outbox.transaction(db) as tx:
        found = await tx.fetchval(
            "update agents set deleted_at = now() where id = $1 and deleted_at is null returning id", agent_id
        )
        if found is None:
            raise AgentNotFoundError(agent_id)
        tx.emit(AgentDeleted(agent_id=agent_id))
