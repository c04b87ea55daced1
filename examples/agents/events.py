"""What the LLM agent service tells others: the contract that both services import."""

from uuid import UUID

from outbox import Event, Key


class AgentEvent(Event, topic="llm.agents"):
    """Every event carries the agent's id: it is the Kafka key, and the events of one key stay in order."""

    agent_id: Key[UUID]


class AgentCreated(AgentEvent, type="agent.created"):
    agent_name: str


class AgentRenamed(AgentEvent, type="agent.renamed"):
    agent_name: str


class AgentArchived(AgentEvent, type="agent.archived"):
    """Emitted by a trigger, see agent_service.sql."""


class AgentDeleted(AgentEvent, type="agent.deleted"):
    pass
