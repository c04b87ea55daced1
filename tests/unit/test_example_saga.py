"""The example's saga in the lab: what the demo does to it with processes and servers, in memory and exhaustively."""

from dataclasses import dataclass, field
from uuid import UUID

import pytest

from examples.agents import workflow_saga
from examples.agents.agent_service import AgentNotFoundError, ExecutionCancelledError
from examples.agents.contracts import Notified, Validated, notify, validate
from examples.agents.workflow_saga import ExecuteWorkflow, execute_agent, execute_workflow, record
from saga.check import findings
from saga.testing import Counterexample, Lab

WORK = ExecuteWorkflow(workflow_id=UUID(int=1), agent_id=UUID(int=2), prompt="think", recipient="somebody")


@dataclass
class AgentService:
    """As `agent_service` does it: one execution an id, and none that was cancelled."""

    executed: set[UUID] = field(default_factory=set)
    cancelled: set[UUID] = field(default_factory=set, compare=False)
    is_deaf: bool = field(default=False, compare=False)

    async def execute(self, execution_id: UUID, workflow_id: UUID, agent_id: UUID, prompt: str) -> str:
        if agent_id != WORK.agent_id:
            raise AgentNotFoundError(agent_id)
        if execution_id in self.cancelled:
            raise ExecutionCancelledError(execution_id)
        self.executed.add(execution_id)
        return f"{prompt}, for {workflow_id}"

    async def cancel(self, execution_id: UUID) -> None:
        if not self.is_deaf:
            self.executed.discard(execution_id)
        self.cancelled.add(execution_id)


def lab_of(deps: AgentService | None = None) -> Lab[ExecuteWorkflow, None]:
    lab = Lab(execute_workflow, deps=deps)
    lab.on(validate).returns(Validated(result_id=UUID(int=3)))
    lab.on(record).returns("Ada")
    lab.on(notify).returns(Notified(notification_id=UUID(int=4)))
    return lab


def test_nothing_can_be_seen_to_be_wrong_with_it() -> None:
    assert findings(workflow_saga) == []


async def test_whatever_goes_wrong_everything_is_kept_or_undone() -> None:
    await lab_of().explore(WORK, world=AgentService)


async def test_a_service_that_does_not_cancel_is_found() -> None:
    with pytest.raises(Counterexample) as found:
        await lab_of().explore(WORK, world=lambda: AgentService(is_deaf=True))
    assert len(found.value.faults) == 1


async def test_an_agent_that_has_gone_is_a_rejection() -> None:
    outcome = await lab_of(AgentService()).run(WORK.model_copy(update={"agent_id": UUID(int=9)}))
    assert (outcome.state, outcome.reason, outcome.compensated) == ("failed", "there is no such agent", [])


async def test_who_does_not_want_to_be_told_undoes_everything() -> None:
    lab = Lab(execute_workflow, deps=AgentService())
    lab.on(validate).returns(Validated(result_id=UUID(int=3)))
    lab.on(record).returns("Ada")
    lab.on(notify).rejects("does not want to be told")
    outcome = await lab.run(WORK)
    assert outcome.state == "failed"
    assert outcome.compensated == ["record", "validate", execute_agent.name]
