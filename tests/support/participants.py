"""A stock service with a participant, its commands as records by hand, and its answers; for tests of remote steps."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from pydantic import BaseModel

from outbox import Event, Key, Pool, Transaction
from outbox.consumer.apply import Engine, Outcome, Partition
from saga import Participant, Rejected, Remote, remote
from saga.messages import do, undo
from saga.serving import ParticipantTarget
from saga.state import Intent, OutboxRow, PlanRow, TaskRow
from tests.support.caching import Kafka

SCHEMA = """
create table stock (sku text primary key, available int not null check (available >= 0));
create table moves (id bigint generated always as identity, sku text not null, change int not null,
                    instance text not null default '');
insert into stock values ('x', 100)"""


class ReserveStock(BaseModel):
    sku: str = "x"
    fails: str = ""


class Reserved(BaseModel):
    shelf: str


class Moved(Event, topic="stock-moves", type="stock.moved"):
    sku: Key[str]
    change: int


class BrokenError(Exception):
    """A bug of a handler, on demand."""


@dataclass
class Stock:
    """The service: a participant whose handlers fail as the command says, or as the test does."""

    name: str = "stock"
    has_undo: bool = True
    on_do: Callable[[Transaction, ReserveStock], Awaitable[None]] | None = None
    undo_fails: int = 0
    calls: list[str] = field(default_factory=list)
    timeout: float = 30.0

    def __post_init__(self) -> None:
        self.reserve: Remote[ReserveStock, Reserved] = remote(
            f"{self.name}.reserve", ReserveStock, Reserved, timeout=self.timeout
        )
        self.participant = Participant(self.name)
        handler = self.participant.on(self.reserve)(self._do)
        if self.has_undo:
            handler.compensation(self._undo)
        self.target = ParticipantTarget(self.participant)

    async def _do(self, tx: Transaction, command: ReserveStock) -> Reserved:
        self.calls.append("do")
        await tx.execute("update stock set available = available - 1 where sku = $1", command.sku)
        await tx.execute("insert into moves (sku, change) values ($1, -1)", command.sku)
        tx.emit(Moved(sku=command.sku, change=-1))
        if self.on_do is not None:
            await self.on_do(tx, command)
        if command.fails == "rejects":
            raise Rejected("out of stock")
        if command.fails == "breaks":
            raise BrokenError("a bug in the handler")
        if command.fails == "returns nonsense":
            return None  # type: ignore[return-value]
        if command.fails == "returns much":
            return Reserved(shelf="s" * 999_900)
        return Reserved(shelf="A1")

    async def _undo(self, tx: Transaction, done: Reserved, command: ReserveStock) -> None:
        self.calls.append(f"undo {done.shelf}")
        await tx.execute("update stock set available = available + 1 where sku = $1", command.sku)
        await tx.execute("insert into moves (sku, change) values ($1, 1)", command.sku)
        if self.undo_fails:
            self.undo_fails -= 1
            raise BrokenError("the compensation fails")


@dataclass
class Desk:
    """A participant's engine on one partition, commands into it, and answers out of it."""

    pool: Pool
    stock: Stock
    engine: Engine
    partition: Partition
    kafka: Kafka = field(default_factory=Kafka)
    window: int = 0

    @classmethod
    async def open(cls, pool: Pool, stock: Stock, number: int = 0) -> "Desk":
        engine = Engine(pool, "saga", "test", [stock.target])
        await engine.prepare()
        return cls(pool, stock, engine, await engine.claim(stock.target.topic, number, 0))

    async def send(self, *rows: OutboxRow) -> Outcome:
        """Commands as a relay publishes them, and the batch that applies them."""
        records = []
        self.window += 1
        for ordinal, row in enumerate(rows, start=1):
            position = f"{self.kafka.log_id}/0/{self.window}/{ordinal}/{self.window * 1000 + ordinal}/1"
            records.append(put(self.kafka, row, position))
        return await self.engine.apply(self.partition, records)

    async def retry(self) -> Outcome:
        """Try what is parked now."""
        await self.pool.execute("update outbox.parked_keys set retry_at = now() where retry_at is not null")
        return await self.engine.retry(self.partition)

    async def answers(self) -> list[dict[str, Any]]:
        """Payloads of the replies so far, in the order of the log."""
        return [answer for _, answer in await replies(self.pool)]

    async def net(self) -> int:
        """How much was taken from the stock."""
        return 100 - int(await self.pool.fetchval("select available from stock where sku = 'x'"))


def put(kafka: Kafka, row: OutboxRow, position: str | None = None) -> Any:
    """A message of an outbox as a record."""
    headers: list[tuple[str, bytes | None]] = [
        ("ce_id", str(row.event_id).encode()),
        ("ce_type", row.event_type.encode()),
        *((name, text.encode()) for name, text in json.loads(row.headers or "{}").items()),
    ]
    if position is not None:
        headers.append(("ob-pos", position.encode()))
    return kafka.put_raw(row.key.encode(), row.payload, headers)


async def replies(pool: Pool) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """Headers and payloads of the replies in a service's outbox."""
    rows = await pool.fetch(
        "select headers::text as headers, payload from outbox.events where headers ? 'saga-reply' order by position"
    )
    return [(json.loads(row["headers"]), json.loads(row["payload"])) for row in rows]


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Step:
    """One remote step of one saga, as the saga's service sends it."""

    remote: Remote[Any, Any]
    command: Any = field(default_factory=ReserveStock)
    instance_id: UUID = field(default_factory=uuid4)
    path: str = "stock.reserve#1"
    sent: datetime = field(default_factory=now)
    deadline: datetime = field(default_factory=lambda: now() + timedelta(days=1))
    waits: timedelta = timedelta(seconds=30)
    reply_to: str = "saga.shop.replies"

    def do(self) -> OutboxRow:
        intent = Intent(
            path=self.path,
            name=self.remote.name,
            kind="remote",
            digest=b"d" * 16,
            input=self.remote.command.encode(self.command),
            started_at=self.sent,
            until=self.sent + self.waits,
        )
        return do(self.instance_id, self.remote, intent, self.reply_to, self.deadline)

    def undo(self, round_no: int = 0, attempt: int = 0) -> OutboxRow:
        row = PlanRow(
            position=1, task_seq=1, path=self.path, name=self.remote.name, kind="remote", round=round_no,
            attempts=attempt,
        )  # fmt: skip
        task = TaskRow(
            seq=1, path=self.path, name=self.remote.name, kind="remote", outcome="unknown", started_at=self.sent,
            completed_at=self.sent, input=self.remote.command.encode(self.command),
        )  # fmt: skip
        return undo(self.instance_id, self.remote, row, task, self.reply_to)


async def create_stock(db: Pool) -> None:
    """The service's tables."""
    await db.execute(SCHEMA)
