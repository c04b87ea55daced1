"""A service's tests of its caches."""

from agent_events import AgentDeleted, AgentRenamed
from cache_service import CachedAgent, agents

from outbox import Connection, Event, Pool
from outbox.testing import converges


async def test_agents_converge(pool: Pool, renamed: AgentRenamed, deleted: AgentDeleted) -> None:
    await converges(pool, agents, [renamed, deleted])
    events: list[Event] = [renamed, deleted]
    existing = [CachedAgent(agent_id=renamed.agent_id, agent_name="Ada")]
    await converges(pool, agents, events, existing=existing, owner=True, examples=200, seed=1)


async def misuse(pool: Pool, connection: Connection, renamed: AgentRenamed) -> None:
    await converges(agents, [renamed])  # type: ignore[call-arg, arg-type] # the pool comes first
    await converges(connection, agents, [renamed])  # type: ignore[arg-type] # two consumers need two connections
    await converges(pool, agents, renamed)  # type: ignore[arg-type] # several events
    await converges(pool, agents, [renamed], 200)  # type: ignore[call-arg, arg-type] # by name
    converges(pool, agents, [renamed])  # type: ignore[unused-coroutine] # nothing is tested
