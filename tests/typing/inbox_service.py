"""A service with an inbox next to its caches, and the misuses that a type checker must catch."""

from typing import assert_type

import asyncpg
from agent_events import AgentDeleted, AgentRenamed
from cache_service import agents

import outbox
from outbox import Consumer, Inbox, Transaction

notifications = Inbox("notification", topic="llm.agents")
audit = Inbox("audit", topic="llm.agents", replays=True)


@notifications.on
async def notify(tx: Transaction, event: AgentDeleted) -> None:
    assert_type(await tx.execute("insert into notifications values ($1)", event.agent_id), str)
    tx.emit(AgentRenamed(agent_id=event.agent_id, agent_name=""))
    async with outbox.transaction(tx) as inner:
        assert_type(inner, Transaction)


@audit.on
async def both(tx: Transaction, event: AgentRenamed | AgentDeleted) -> None:
    match event:
        case AgentDeleted():
            tx.emit(event)
        case AgentRenamed():
            await tx.execute("insert into audit values ($1)", event.agent_name)


async def lifespan(dsn: str) -> None:
    async with asyncpg.create_pool(dsn) as pool, Consumer(pool, "kafka:9092", agents, notifications, audit) as consumer:
        await consumer.run()


# ------------------------------------------------------------------------------------------------ misuse


@notifications.on  # type: ignore[arg-type] # an inbox waits for its handlers
def not_awaiting(_tx: Transaction, _event: AgentDeleted) -> None:
    pass


@notifications.on  # type: ignore[type-var] # a handler takes an event
async def a_text(_tx: Transaction, _event: str) -> None:
    pass


@notifications.on  # type: ignore[arg-type] # with a transaction
async def no_transaction(_event: AgentDeleted) -> None:
    pass


@notifications.on  # type: ignore[arg-type] # and answers nothing
async def answering(_tx: Transaction, event: AgentDeleted) -> AgentDeleted:
    return event


@notifications.on
async def misspelt(_tx: Transaction, event: AgentDeleted) -> None:
    event.agent_nam  # type: ignore[attr-defined] # noqa: B018


Inbox("notification", "llm.agents")  # type: ignore[call-arg] # by name
Inbox(topic="llm.agents")  # type: ignore[call-arg] # called what?
