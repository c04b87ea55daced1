"""The LLM agent service: owns the agents, and says in events what happens to them.

Each function writes and emits in one transaction: the event exists if and only if the write does. They take a pool, or
the caller's transaction, in which they then are a savepoint.
"""

from uuid import UUID

import outbox
from examples.agents.events import AgentCreated, AgentDeleted, AgentRenamed


class AgentNotFoundError(LookupError):
    """There is no such agent, or no longer."""


class ExecutionCancelledError(Exception):
    """The execution was cancelled, before it began or after."""


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


async def execute(db: outbox.Db, execution_id: UUID, workflow_id: UUID, agent_id: UUID, prompt: str) -> str:
    """Ask an agent; a second time under the same id nothing happens, and the answer is the first one's."""
    async with outbox.transaction(db) as tx:
        found = await tx.fetchrow(
            """insert into executions (id, workflow_id, agent_id, prompt, response, status)
               select $1, $2, id, $4, name || ' has thought about: ' || $4, 'completed'
                 from agents where id = $3 and deleted_at is null and status = 'active'
               on conflict (id) do update set id = excluded.id returning status, response""",
            execution_id,
            workflow_id,
            agent_id,
            prompt,
        )
    if found is None:
        raise AgentNotFoundError(agent_id)
    if found["status"] == "cancelled":
        raise ExecutionCancelledError(execution_id)
    return str(found["response"])


async def cancel_execution(db: outbox.Db, execution_id: UUID) -> None:
    """Cancel an execution, also one that has not begun."""
    async with outbox.transaction(db) as tx:
        await tx.execute(
            """insert into executions (id, status) values ($1, 'cancelled')
               on conflict (id) do update set status = 'cancelled'""",
            execution_id,
        )
