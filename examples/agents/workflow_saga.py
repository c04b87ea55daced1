"""The workflow service's saga: what happens in four databases happens in all of them, or is undone.

    execute_agent  ->  validate    ->  record     ->  notify
    llm_agent_db       validation_db   workflow_db    notification_db

`execute_agent` calls another service as one does, over the network; `validate` and `notify` travel through outboxes.
"""

from datetime import timedelta
from typing import Protocol
from uuid import UUID

from pydantic import BaseModel

from examples.agents.agent_service import AgentNotFoundError
from examples.agents.contracts import Notify, Validate, notify, validate
from examples.agents.workflow_service import agents
from outbox import Transaction
from saga import Rejected, Retry, Run, StepContext, Unknown, saga, step


class ExecuteWorkflow(BaseModel):
    workflow_id: UUID
    agent_id: UUID
    prompt: str
    recipient: str


class Execution(BaseModel):
    id: UUID
    response: str


class Agents(Protocol):
    """A client of the LLM agent service; steps find it as `ctx.deps`."""

    async def execute(self, execution_id: UUID, workflow_id: UUID, agent_id: UUID, prompt: str) -> str: ...
    async def cancel(self, execution_id: UUID) -> None: ...


@step(timeout=1, retry=Retry(attempts=3, initial=0.1), fences=True)  # fences: what was cancelled is never executed
async def execute_agent(ctx: StepContext[Agents], work: ExecuteWorkflow) -> Execution:
    execution_id = UUID(ctx.idempotency_key)  # the same on every attempt
    try:
        response = await ctx.deps.execute(execution_id, work.workflow_id, work.agent_id, work.prompt)
    except AgentNotFoundError as error:
        raise Rejected("there is no such agent") from error
    return Execution(id=execution_id, response=response)


@execute_agent.compensation
async def cancel_execution(ctx: StepContext[Agents], done: Execution | Unknown, work: ExecuteWorkflow) -> None:
    await ctx.deps.cancel(UUID(done.idempotency_key) if isinstance(done, Unknown) else done.id)


@step(transactional=True)
async def record(tx: Transaction, work: ExecuteWorkflow, response: str) -> str:
    """Returns the agent's name, which nobody has to be asked for."""
    agent = await agents.get(tx, work.agent_id)
    if agent is None:
        raise Rejected("the agent has gone")
    await tx.execute(
        "insert into workflow_results (workflow_id, agent_name, response) values ($1, $2, $3)",
        work.workflow_id,
        agent.agent_name,
        response,
    )
    return agent.agent_name


@record.compensation
async def withdraw_record(tx: Transaction, done: str | Unknown, work: ExecuteWorkflow, response: str) -> None:
    await tx.execute("update workflow_results set status = 'withdrawn' where workflow_id = $1", work.workflow_id)


@saga("workflow_execution", deadline=timedelta(minutes=5))
async def execute_workflow(run: Run, work: ExecuteWorkflow) -> None:
    execution = await run(execute_agent(work))
    await run(validate(Validate(workflow_id=work.workflow_id, text=execution.response)))
    agent_name = await run(record(work, execution.response))
    text = f"{agent_name} has answered"
    await run(notify(Notify(workflow_id=work.workflow_id, recipient=work.recipient, text=text)))
