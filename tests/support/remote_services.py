"""A shop with a saga and a stock service with a participant, in databases of their own, over a broker.

Run as a module it is the stock service alone, in a process that can be killed where a test says.
"""

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from subprocess import Popen
from typing import Any, Final

import asyncpg

from outbox import Pool, Relay
from saga import Rejected, Run, Saga, saga
from saga.settings import Settings
from saga.worker import Worker
from tests.support.faults import Fault, Injector, eventually
from tests.support.kafka_server import create_topic
from tests.support.participants import ReserveStock, Stock

SETTINGS: Final = Settings(
    worker_lease_seconds=1.0, idle_after_seconds=0.02, session_timeout_seconds=1.0, drain_timeout_seconds=5.0
)
"""With which a test need not wait for a lost worker or a killed member."""
HOUR: Final = timedelta(hours=1)
_ROOT: Final = Path(__file__).parents[2]


def shop_of(stock: Stock) -> Saga[ReserveStock, list[str]]:
    """A saga that reserves twice, the second time as the request says."""

    @saga(f"shop-{stock.name}", deadline=HOUR)
    async def shop(run: Run, order: ReserveStock) -> list[str]:
        first = await run(stock.reserve(ReserveStock()))
        try:
            second = await run(stock.reserve(order))
        except Rejected as error:
            raise Rejected(f"no second one: {error.reason}") from error
        return [first.shelf, second.shelf]

    return shop


@dataclass
class Services:
    """Both, with their relays; what else runs is the test's to say."""

    shop_pool: Pool
    stock_pool: Pool
    broker: str
    stock: Stock
    shop: Saga[ReserveStock, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.shop = shop_of(self.stock)

    @asynccontextmanager
    async def running(self, *, stock: bool = True) -> AsyncIterator[None]:
        """Relays, a worker, and with `stock` the participant in this process."""
        async with AsyncExitStack() as stack:
            for pool in (self.shop_pool, self.stock_pool):
                await stack.enter_async_context(Relay(pool, self.broker, settings=SETTINGS))
            await stack.enter_async_context(Worker(self.shop_pool, self.broker, self.shop, settings=SETTINGS))
            if stock:
                await stack.enter_async_context(self.serving())
            yield

    def serving(self) -> Worker:
        """The participant in this process."""
        return Worker(self.stock_pool, self.broker, self.stock.participant, settings=SETTINGS)

    async def create_topics(self, partitions: int = 1) -> None:
        for topic in (self.stock.target.topic, self.shop.reply_topic):
            await create_topic(self.broker, topic, partitions=partitions)

    async def net(self) -> int:
        """How much was taken from the stock."""
        return 100 - int(await self.stock_pool.fetchval("select available from stock where sku = 'x'"))

    async def ends(self, key: str) -> str:
        """The state in which a saga has ended."""

        async def look() -> Any:
            found = await self.shop_pool.fetchval("select state from saga.workflow_instances where key = $1", key)
            return found if found in ("completed", "failed", "paused") else None

        return str(await eventually(look, what=f"saga {key} ends", timeout_seconds=40))

    async def mail(self, key: str) -> list[tuple[str, dict[str, Any]]]:
        """The mailbox of a saga, in order."""
        rows = await self.shop_pool.fetch(
            """select s.kind, s.payload::text as payload from saga.signals s
                 join saga.workflow_instances i on i.id = s.instance_id where i.key = $1 order by s.no""",
            key,
        )
        return [(row["kind"], json.loads(row["payload"])) for row in rows]


def some_stock(*, timeout: float = 30.0) -> Stock:
    """A participant of a name that nobody else has."""
    return Stock(name=f"stock-{uuid.uuid4().hex[:8]}", timeout=timeout)


@contextmanager
def stock_process(url: str, servers: str, name: str, fault: Fault | None = None) -> Iterator["Popen[bytes]"]:
    """The stock service in a process of its own, killed at the end at the latest."""
    order = json.dumps({"url": url, "servers": servers, "name": name, "fault": asdict(fault) if fault else None})
    with Popen([sys.executable, "-m", "tests.support.remote_services", order], cwd=_ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


async def _main(order: dict[str, Any]) -> None:
    if order["fault"]:
        Injector(Fault(**order["fault"])).install()
    stock = Stock(name=order["name"])
    async with (
        asyncpg.create_pool(order["url"], min_size=1, max_size=10) as pool,
        Worker(pool, order["servers"], stock.participant, settings=SETTINGS) as worker,
    ):
        await worker.run()


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))
