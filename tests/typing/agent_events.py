"""The events of an agent service, and what a type checker must say about events."""

from typing import Any
from uuid import UUID, uuid4

from outbox import Event, Key


class AgentEvent(Event, topic="llm.agents"):
    agent_id: Key[UUID]


class AgentRenamed(AgentEvent, type="agent.renamed"):
    agent_name: str


class AgentDeleted(AgentEvent, type="agent.deleted", schema_version=2):
    pass


@AgentDeleted.upcast(from_version=1)
def id_was_called_agent(payload: dict[str, Any]) -> dict[str, Any]:
    return {"agent_id": payload["agent"]}


renamed = AgentRenamed(agent_id=uuid4(), agent_name="Ada")

AgentRenamed(agent_name="Ada")  # type: ignore[call-arg] # the key is required
AgentRenamed(agent_id=uuid4())  # type: ignore[call-arg] # and so are the other fields
AgentRenamed(agent_id=7, agent_name="Ada")  # type: ignore[arg-type] # a key has the type that it was declared with
AgentRenamed(uuid4(), "Ada")  # type: ignore[call-arg] # fields go by name
renamed.agent_nam  # type: ignore[attr-defined] # noqa: B018


@AgentDeleted.upcast(from_version=1)  # type: ignore[arg-type] # an upcaster returns the next version's payload
def forgetful(payload: dict[str, Any]) -> None:
    payload.clear()


@AgentDeleted.upcast(from_version=1)  # type: ignore[arg-type] # upcasters are pure
async def awaiting(payload: dict[str, Any]) -> dict[str, Any]:
    return payload


@AgentDeleted.upcast(1)  # type: ignore[call-arg] # by name
def positional(payload: dict[str, Any]) -> dict[str, Any]:
    return payload
