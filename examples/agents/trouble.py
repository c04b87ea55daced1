"""What goes wrong on purpose: between the workflow service and the LLM agent service, and in what is asked of them.

The services know nothing of it. Others of these troubles are in trouble.sql, and in `workflows`, which kills the worker
and holds replies back. `saga worker --app examples.agents.trouble:worker` runs the saga over a bad network.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Final
from uuid import UUID

import asyncpg

import outbox
from examples.agents import agent_service
from examples.agents.workflow_saga import execute_agent, execute_workflow
from saga import Settings, Worker

THINKING_SECONDS: Final = 0.2
LATE_SECONDS: Final = execute_agent.timeout_seconds + 1


class Trouble(StrEnum):
    """What a workflow runs into; its prompt says so."""

    CALL_LOST = "the first call of the agent is lost"
    ANSWER_LATE = "the agent's first answer comes too late"
    ANSWERS_LATE = "every answer of the agent comes too late"
    NONSENSE = "the agent talks nonsense, which is not valid"
    UNWANTED = "the recipient does not want to be told"
    CANCELLED = "somebody cancels it on its way"
    NONE = "nothing in particular"


class BadNetwork:
    """Stands for HTTP to the LLM agent service: an `Agents`, as steps know it."""

    def __init__(self, agents: outbox.Pool) -> None:
        self._agents = agents
        self._calls: Counter[UUID] = Counter()

    async def execute(self, execution_id: UUID, workflow_id: UUID, agent_id: UUID, prompt: str) -> str:
        self._calls[execution_id] += 1
        is_first = self._calls[execution_id] == 1
        if prompt == Trouble.CALL_LOST and is_first:
            raise ConnectionResetError("the network has lost a call")
        response = await agent_service.execute(self._agents, execution_id, workflow_id, agent_id, prompt)
        late = prompt == Trouble.ANSWERS_LATE or (prompt == Trouble.ANSWER_LATE and is_first)
        await asyncio.sleep(LATE_SECONDS if late else THINKING_SECONDS)
        return response

    async def cancel(self, execution_id: UUID) -> None:
        await agent_service.cancel_execution(self._agents, execution_id)


@asynccontextmanager
async def worker(pool: outbox.Pool, settings: Settings) -> AsyncIterator[Worker]:
    """The workflow service's worker."""
    async with asyncpg.create_pool(os.environ["AGENTS_DATABASE_URL"], min_size=1, max_size=4) as agents:
        yield Worker(pool, settings.kafka, execute_workflow, deps=BadNetwork(agents), settings=settings)
