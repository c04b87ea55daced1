"""Commands and replies between a shop and its stock service without a broker, so that a test says when each arrives.

A command reaches the stock as soon as it is committed. The reply to a do is held until the test lets go of it, and is
delivered by what a worker's consumer feeds, on one of some partitions. The reply to an undo follows at once, behind
the reply to its do: they have one key, so Kafka keeps them in order.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Self
from uuid import UUID

from outbox import Pool
from outbox.consumer.apply import Engine, Partition
from outbox.postgres import Record
from saga.replies import ReplyTarget
from saga.state import OutboxRow
from tests.support.caching import Kafka
from tests.support.faults import eventually
from tests.support.participants import Desk, Stock, put

_PARTITIONS: Final = 4
_NEW: Final = """
select position, topic, key, event_id, event_type, headers::text as headers, payload from outbox.events
 where headers ? $1 and position <> all ($2::bigint[]) order by position"""


@dataclass
class _Lane:
    """One partition of the topic of replies."""

    partition: Partition
    kafka: Kafka = field(default_factory=Kafka)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass
class _Letters:
    """Messages of one outbox, each once."""

    pool: Pool
    header: str
    taken: list[int] = field(default_factory=list)

    async def fresh(self) -> list[Record]:
        rows = await self.pool.fetch(_NEW, self.header, self.taken)
        self.taken.extend(row["position"] for row in rows)
        return rows


class Courier:
    """Carries them; `held` are the instances whose reply waits to be let go."""

    def __init__(self, engine: Engine, lanes: list[_Lane], desk: Desk, commands: _Letters) -> None:
        """For `running`."""
        self._engine, self._lanes, self._desk = engine, lanes, desk
        self._commands, self._replies = commands, _Letters(desk.pool, "saga-reply")
        self.held: dict[UUID, OutboxRow] = {}
        self._gone: dict[UUID, asyncio.Task[None]] = {}
        self.on_reply: Callable[[UUID], None] = lambda _: None
        """Told of each reply to a do that is held from now on."""

    @classmethod
    @asynccontextmanager
    async def running(cls, shop: Pool, stock_pool: Pool, stock: Stock, topic: str) -> AsyncIterator[Self]:
        """One that carries for the length of the block; `topic` is that of the shop's replies."""
        engine = Engine(shop, "saga", "test", [ReplyTarget(topic)])
        await engine.prepare()
        lanes = [_Lane(await engine.claim(topic, number, 0)) for number in range(_PARTITIONS)]
        made = cls(engine, lanes, await Desk.open(stock_pool, stock), _Letters(shop, "saga-command"))
        carrying = asyncio.create_task(made._carry())
        try:
            yield made
        finally:
            carrying.cancel()
            await asyncio.wait([carrying])
            if not carrying.cancelled():
                carrying.result()

    def let_go(self, instance: UUID) -> "asyncio.Task[None]":
        """Begin to deliver a reply that is held; what comes back ends when the mailbox has it."""
        if instance in self.held:
            self._gone[instance] = asyncio.create_task(self._deliver(instance, self.held.pop(instance)))
        return self._gone[instance]

    async def delivered(self) -> None:
        """All that was let go is in the mailboxes."""
        await asyncio.gather(*self._gone.values())

    async def _carry(self) -> None:
        while True:
            commands = await eventually(self._commands.fresh, what="a command", timeout_seconds=60)
            await self._desk.send(*map(_message, commands))
            for row in await self._replies.fresh():
                headers = json.loads(row["headers"])
                instance = UUID(headers["saga-id"])
                if headers["saga-reply"] == "do":
                    self.held[instance] = _message(row)
                    self.on_reply(instance)
                else:
                    await self.let_go(instance)
                    await self._deliver(instance, _message(row))

    async def _deliver(self, instance: UUID, row: OutboxRow) -> None:
        lane = self._lanes[instance.int % _PARTITIONS]
        async with lane.turn:
            await self._engine.apply(lane.partition, [put(lane.kafka, row)])


def _message(row: Any) -> OutboxRow:
    return OutboxRow(
        topic=row["topic"],
        key=row["key"],
        event_id=row["event_id"],
        event_type=row["event_type"],
        headers=row["headers"],
        payload=row["payload"],
    )
