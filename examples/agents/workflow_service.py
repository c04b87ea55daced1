"""The workflow service: keeps its own copy of the agents' names, so that it need not ask for them."""

import asyncio
import logging
import os
import signal
from uuid import UUID

import asyncpg
from pydantic import BaseModel

from examples.agents.events import AgentArchived, AgentCreated, AgentDeleted, AgentRenamed
from outbox import DELETE, Cache, Consumer, Delete


class CachedAgent(BaseModel):
    agent_id: UUID
    agent_name: str


agents = Cache(CachedAgent, table="workflow_agent_cache", key="agent_id", topic="llm.agents")


@agents.on
def named(event: AgentCreated | AgentRenamed) -> CachedAgent:
    return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name)


@agents.on
def gone(event: AgentArchived | AgentDeleted) -> Delete:
    return DELETE


async def main() -> None:
    """Follow the topic until SIGTERM."""
    async with (
        asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1, max_size=4) as pool,
        Consumer(pool, os.environ["KAFKA_BOOTSTRAP_SERVERS"], agents) as consumer,
    ):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, consumer.stop)
        await consumer.run()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(main())
