"""kill -9 of a participant, between handler and COMMIT and elsewhere: each command has its effect and answer once."""

import signal
import uuid
from collections.abc import AsyncIterator

import asyncpg
import pytest
import pytest_asyncio

from outbox import Pool
from outbox.embedded import Databases
from outbox.upkeep import migrate
from tests.support.faults import Fault, eventually
from tests.support.participants import ReserveStock, create_stock
from tests.support.remote_services import Services, some_stock, stock_process

pytestmark = pytest.mark.crash

SITES = [
    Fault("outbox.consumer.apply.advance", "after"),
    Fault("saga.answering.take", "before"),
    Fault("saga.answering.take", "after"),
    Fault("outbox.transaction.flush", "after"),
    Fault("saga.answering.answer", "before"),
    Fault("saga.answering.answer", "after"),
    Fault("saga.answering.answer", "after", visit=3),
    Fault("outbox.consumer.handling.end_event", "after"),
    Fault("saga.answering.answer", "before", visit=4),
]
"""The batch is lost at each; the last ones lie on the careful way, after a rejection, and in the undo."""


@pytest_asyncio.fixture
async def stock_database(postgres: Databases) -> AsyncIterator[str]:
    name = f"stock_{uuid.uuid4().hex[:12]}"
    yield postgres.create_database(name)
    postgres.drop_database(name)


@pytest.mark.parametrize("fault", SITES, ids=str)
async def test_killed_between_handler_and_commit(
    saga_pool: Pool, stock_database: str, broker: str, fault: Fault
) -> None:
    """Four sagas complete and two are rejected at their second step, which undoes the first."""
    async with asyncpg.create_pool(stock_database, min_size=1, max_size=10) as stock_pool:
        await migrate.up(stock_pool)
        await migrate.up(stock_pool, package="saga")
        await create_stock(stock_pool)
        services = Services(saga_pool, stock_pool, broker, some_stock())
        await services.create_topics()
        async with services.running(stock=False):
            keys = {f"{number}": "rejects" if number % 3 == 2 else "" for number in range(6)}
            for key, fails in keys.items():
                await services.shop.start(saga_pool, ReserveStock(fails=fails), key=key)
            with stock_process(stock_database, broker, services.stock.name, fault) as victim:

                async def died() -> bool:
                    return victim.poll() is not None

                await eventually(died, what="the participant was killed")
                assert victim.returncode == -signal.SIGKILL
            with stock_process(stock_database, broker, services.stock.name):
                for key, fails in keys.items():
                    assert await services.ends(key) == ("failed" if fails else "completed")
        assert await services.net() == 8
        assert await stock_pool.fetchval("select sum(change) from moves") == -8
        assert await stock_pool.fetchval("select count(*) from moves where change = 1") == 2
        assert await stock_pool.fetchval("select count(*) from outbox.events where topic = 'stock-moves'") == 10
        for key, fails in keys.items():
            kinds = [kind for kind, _ in await services.mail(key)]
            assert kinds == (["reply", "reply", "undone"] if fails else ["reply", "reply"])
