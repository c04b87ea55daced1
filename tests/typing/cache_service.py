"""A service with a cache of another service's rows, and the misuses that a type checker must catch."""

from datetime import timedelta
from typing import assert_type
from uuid import UUID

import asyncpg
from agent_events import AgentDeleted, AgentRenamed
from pydantic import BaseModel

from outbox import DELETE, Cache, Consumer, Delete, Patch, Pool, Receipt, Transaction


class CachedAgent(BaseModel):
    agent_id: UUID
    agent_name: str


agents = Cache(CachedAgent, table="workflow_agent_cache", key="agent_id", topic="llm.agents")
others = Cache(CachedAgent, table="other_agent_cache", key="agent_id", topic="llm.agents")
assert_type(agents, Cache[CachedAgent])


@agents.on
def renamed(event: AgentRenamed) -> CachedAgent:
    return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name)


@agents.on
def deleted(_event: AgentDeleted) -> Delete:
    return DELETE


@others.on
def both(event: AgentRenamed | AgentDeleted) -> CachedAgent | Delete:
    match event:
        case AgentDeleted():
            return DELETE
        case AgentRenamed():
            return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name)


@others.on
def patched(event: AgentRenamed) -> Patch:
    return Patch(event.agent_id, agent_name=event.agent_name)


async def lifespan(dsn: str) -> None:
    async with asyncpg.create_pool(dsn) as pool, Consumer(pool, "kafka:9092", agents, others) as consumer:
        assert_type(consumer, Consumer)
        await consumer.run()


async def read(pool: Pool, tx: Transaction, agent_id: UUID, receipt: Receipt, token: str) -> str:
    row = await agents.get(pool, agent_id)
    assert_type(row, CachedAgent | None)
    assert_type(await agents.get(tx, str(agent_id)), CachedAgent | None)
    assert_type(await agents.get(pool, agent_id, fresh_within=5), CachedAgent | None)
    assert_type(await agents.get_many(tx, [agent_id], fresh_within=timedelta(seconds=5)), list[CachedAgent])
    assert_type(await agents.get_many(pool, [agent_id]), list[CachedAgent])
    assert_type(await agents.wait_for(pool, agent_id, receipt, timeout=2), CachedAgent | None)
    assert_type(await agents.wait_for(pool, agent_id, token, timeout=timedelta(seconds=2)), CachedAgent | None)
    assert_type(agents.fold([AgentDeleted(agent_id=agent_id)]), list[CachedAgent])
    row.agent_name  # type: ignore[union-attr] # noqa: B018 # the row may not be there
    if row is None:
        return ""
    row.agent_nam  # type: ignore[attr-defined] # noqa: B018
    return assert_type(row.agent_name, str)


# ------------------------------------------------------------------------------------------------ misuse


@agents.on  # type: ignore[arg-type] # a row is an instance of the row class
def a_dict(_event: AgentRenamed) -> dict[str, object]:
    return {}


@agents.on  # type: ignore[type-var] # a handler takes an event
def a_text(_event: str) -> CachedAgent:
    raise NotImplementedError


@agents.on  # type: ignore[arg-type] # handlers are pure, so they have nothing to await
async def awaiting(event: AgentRenamed) -> CachedAgent:
    return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name)


@agents.on  # type: ignore[arg-type] # a handler that forgets to answer
def silent(_event: AgentRenamed) -> None:
    pass


Cache(dict, table="agents", key="agent_id", topic="llm.agents")  # type: ignore[type-var] # rows are pydantic models
Cache(CachedAgent, "agents", "agent_id", "llm.agents")  # type: ignore[call-arg] # by name
Patch(agent_name="Ada")  # type: ignore[call-arg] # of which row?


async def misuse(pool: Pool, agent_id: UUID, receipt: Receipt) -> None:
    await agents.get(agent_id)  # type: ignore[call-arg, arg-type] # every call takes the database first
    await agents.get("postgresql://localhost/shop", agent_id)  # type: ignore[arg-type]
    await agents.wait_for(pool, agent_id, receipt)  # type: ignore[call-arg] # for how long?
    agents.fold([CachedAgent(agent_id=agent_id, agent_name="Ada")])  # type: ignore[list-item] # events are folded
    Consumer(pool, "kafka:9092", CachedAgent)  # type: ignore[arg-type] # a cache, not its row class
