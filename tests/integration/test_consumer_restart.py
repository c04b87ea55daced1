"""A consumer that starts where another one stopped, on the embedded broker, which understates a partition's end."""

from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
from pydantic import BaseModel

import outbox
from outbox import Cache, Consumer, Event, Key, Pool, limits
from outbox.consumer import State
from outbox.settings import Settings
from tests.support.faults import eventually

QUICK = Settings(session_timeout_seconds=1.0, fetch_wait_seconds=0.01)
EVENTS = 300


class CachedAgent(BaseModel):
    agent_id: UUID
    agent_name: str


@pytest.fixture
def event(topic: str) -> type[Event]:
    class AgentCreated(Event, topic=topic, type="agent.created"):
        agent_id: Key[UUID]
        agent_name: str

    return AgentCreated


@pytest_asyncio.fixture
async def cache(log_pool: Pool, topic: str, event: type[Event]) -> Cache[CachedAgent]:
    await log_pool.execute("create table agent_cache (agent_id uuid primary key, agent_name text not null)")
    await log_pool.execute("select outbox.prepare_cache('agent_cache')")
    declared = Cache(CachedAgent, table="agent_cache", key="agent_id", topic=topic)

    def created(created: Event) -> CachedAgent:
        return CachedAgent.model_validate(created.model_dump())

    created.__annotations__["created"] = event
    declared.on(created)
    return declared


@pytest_asyncio.fixture
async def relayed(log_pool: Pool, broker: str) -> AsyncIterator[None]:
    async with outbox.Relay(log_pool, broker):
        yield


async def emit_many(pool: Pool, event: type[Event]) -> None:
    """In one transaction, so that each partition gets them as one batch."""
    async with outbox.transaction(pool) as tx:
        tx.emit(*(event(agent_id=uuid4(), agent_name="Ada") for _ in range(EVENTS)))


async def until_cached(pool: Pool, count: int) -> None:
    async def look() -> bool:
        return bool(await pool.fetchval("select count(*) from agent_cache") == count)

    await eventually(look, what=f"{count} rows are cached")


async def until_all(consumer: Consumer, state: State) -> None:
    async def look() -> bool:
        return bool(consumer.states) and set(consumer.states.values()) == {state}

    await eventually(look, what=f"every partition is {state}")


@pytest.mark.usefixtures("relayed")
async def test_a_successor_goes_on_after_a_batch_of_many_records(
    log_pool: Pool, broker: str, cache: Cache[CachedAgent], event: type[Event]
) -> None:
    await emit_many(log_pool, event)
    async with Consumer(log_pool, broker, cache, settings=QUICK):
        await until_cached(log_pool, EVENTS)
    async with Consumer(log_pool, broker, cache, settings=QUICK) as successor:
        await until_all(successor, State.RUNNING)
        await emit_many(log_pool, event)
        await until_cached(log_pool, 2 * EVENTS)


@pytest.mark.usefixtures("relayed")
async def test_a_position_beyond_the_end_of_the_topic_stands_still(
    log_pool: Pool, broker: str, cache: Cache[CachedAgent], event: type[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LAST_RECORD_TIMEOUT_SECONDS", 0.5)
    await emit_many(log_pool, event)
    async with Consumer(log_pool, broker, cache, settings=QUICK):
        await until_cached(log_pool, EVENTS)
    await log_pool.execute("update outbox.positions set next_offset = next_offset + 1000")
    async with Consumer(log_pool, broker, cache, settings=QUICK) as successor:
        await until_all(successor, State.RECREATED)
