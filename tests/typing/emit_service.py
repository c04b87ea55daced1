"""An asyncpg service that emits, written as its authors would, and the misuses that a type checker must catch."""

from typing import Any, assert_type
from uuid import UUID

import asyncpg
from agent_events import AgentDeleted, AgentRenamed

import outbox
from outbox import Connection, Db, Pool, Receipt, Transaction


async def rename(pool: "asyncpg.Pool[asyncpg.Record]", agent_id: UUID, name: str) -> Receipt:
    async with outbox.transaction(pool) as tx:
        assert_type(tx, Transaction)
        assert_type(await tx.execute("update agents set name = $2 where id = $1", agent_id, name), str)
        tx.emit(AgentRenamed(agent_id=agent_id, agent_name=name), headers={"traceparent": "00-0-0-00"})
    return assert_type(tx.receipt, Receipt)


async def inside_callers_transaction(pool: Pool, agent_id: UUID) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("update agents set name = 'x' where id = $1", agent_id)
        async with outbox.transaction(connection) as tx:
            tx.emit(AgentRenamed(agent_id=agent_id, agent_name="x"), AgentDeleted(agent_id=agent_id))
            async with outbox.transaction(tx) as inner:
                inner.emit(AgentDeleted(agent_id=agent_id))


async def on_a_connection(dsn: str, agent_id: UUID) -> None:
    connection = await asyncpg.connect(dsn)
    async with outbox.transaction(connection) as tx:
        row = await tx.fetchrow("select 1 from agents where id = $1", agent_id)
        assert_type(row, asyncpg.Record | None)
        assert_type(await tx.fetch("select 1"), list[asyncpg.Record])
        assert_type(await tx.fetchval("select 1"), Any)
        assert_type(tx.connection, Connection)
        tx.emit(AgentDeleted(agent_id=agent_id))


async def wherever(db: Db, agent_id: UUID) -> None:
    async with outbox.transaction(db) as tx:
        tx.emit(AgentDeleted(agent_id=agent_id))


async def main(dsn: str) -> None:
    async with asyncpg.create_pool(dsn) as pool:
        token: str = await rename(pool, UUID(int=1), "x")  # a receipt travels as text
        assert token
        async with outbox.Relay(pool, "kafka:9092") as relay:
            assert_type(relay, outbox.Relay)
            await relay.run()


# ------------------------------------------------------------------------------------------------ misuse


async def misuse(pool: Pool, event: AgentRenamed) -> None:
    async with outbox.transaction(pool) as tx:
        tx.emit({"agent_id": 1})  # type: ignore[arg-type] # events have classes
        tx.emit(AgentRenamed)  # type: ignore[arg-type] # an event is an instance
        tx.emit(event, headers={"retries": 1})  # type: ignore[dict-item] # headers are text
        tx.emit([event])  # type: ignore[arg-type] # emit(*events)
        await tx.emit(event)  # type: ignore[func-returns-value, misc] # nothing to await: it is sent at the end
        await tx.commit()  # type: ignore[attr-defined] # the block commits
    outbox.transaction("postgresql://localhost/shop")  # type: ignore[arg-type] # a pool or a connection
    with outbox.transaction(pool) as tx:  # type: ignore[attr-defined] # async with
        pass
    outbox.Relay(pool)  # type: ignore[call-arg] # where is Kafka?
    outbox.Relay("postgresql://localhost/shop", "kafka:9092")  # type: ignore[arg-type]
