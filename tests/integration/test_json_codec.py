"""A service may teach its connections its own JSON: what we send and read as JSON goes as text."""

import json
from uuid import uuid4

import asyncpg
import pytest

import outbox
from outbox import Connection, Event, Key, Relay
from outbox.settings import Settings
from outbox.upkeep import migrate
from saga import Failed, Run, saga
from tests.support.faults import eventually
from tests.support.history import topic_reader
from tests.support.kafka_server import create_topic
from tests.support.relay_process import QUICK
from tests.support.saga_worker import HOUR, Order, effects, shop, working


async def teach_json(connection: Connection) -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")


async def test_emit_and_relay_work_on_a_pool_with_a_json_codec(any_database: str, broker: str) -> None:
    """Seen red: with `$6::jsonb[]` the headers arrive as a JSON string; with `next_offsets` as jsonb the relay ends."""
    topic = f"codec-{uuid4().hex[:8]}"

    class Renamed(Event, topic=topic, type="agent.renamed"):
        agent_id: Key[str]

    await create_topic(broker, topic)
    async with asyncpg.create_pool(any_database, min_size=1, max_size=6, init=teach_json) as pool:
        await migrate.up(pool)
        async with outbox.transaction(pool) as tx:
            tx.emit(Renamed(agent_id="a"), headers={"tenant": "north"})
        stored = await pool.fetchval("select headers from outbox.events")
        assert stored == {"tenant": "north"}
        for _ in range(2):  # the second start reads the offsets that the first one wrote
            async with Relay(pool, broker, settings=Settings(**QUICK)):

                async def done() -> bool:
                    return bool(await pool.fetchval("select done_through = 1 from outbox.shards"))

                await eventually(done, what="the window is done")
        async with topic_reader(broker, topic) as reader:

            async def published() -> bool:
                return await reader.count() == 1

            await eventually(published, what="the event is on the topic")


async def test_sagas_work_on_a_pool_with_a_json_codec(any_database: str) -> None:
    """There and back, and with a child. Red where the plan, or children, are parameters of type json."""
    async with asyncpg.create_pool(any_database, min_size=1, max_size=10, init=teach_json) as pool:
        await migrate.up(pool)
        await migrate.up(pool, package="saga")
        async with working(pool, shop, guardian):
            handle = await guardian.start(pool, Order(fails="ship rejects"))
            with pytest.raises(Failed, match="ship says no"):
                await handle.result(timeout=20)
            assert await (await guardian.start(pool, Order())).result(timeout=20) == "A1 paid sent"
        assert (await effects(pool))[:4] == ["reserve", "charge", "refund", "release"]


@saga("guardian", deadline=HOUR)
async def guardian(run: Run, order: Order) -> str:
    return await run.child(shop, order)
