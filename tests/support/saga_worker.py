"""A worker on PostgreSQL with services that remember what was done to them, in a table; for tests of the worker."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from pydantic import BaseModel

from outbox import Pool, Transaction
from saga import Failed, Handle, Rejected, Retry, Run, Saga, Signal, StepContext, Unknown, saga, step
from saga.settings import Settings
from saga.worker import Worker
from tests.support.faults import eventually

QUICK = Settings(worker_lease_seconds=1.0, idle_after_seconds=0.02)
"""With which a test need not wait for a lost worker."""
SOON = Retry(attempts=5, initial=0.01, maximum=0.02)
HOUR = timedelta(hours=1)

SERVICE = """
create table effects (
    no bigint generated always as identity, name text not null, sku text not null, key text not null
)"""


class Order(BaseModel):
    sku: str = "x"
    fails: str = ""
    """Which step, and how: `ship rejects`, `refund fails 2`, `charge lands`, ..."""


class Approval(Signal):
    approved: bool = True


@dataclass
class Service:
    """What happened outside; every worker process writes it to the same table."""

    pool: Pool
    counts: Counter[str] = field(default_factory=Counter)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    """A step of the name waits here before it does anything."""
    reached: dict[str, asyncio.Event] = field(default_factory=dict)

    async def act(self, name: str, order: Order, ctx: StepContext["Service"]) -> None:
        self.counts[name] += 1
        how = dict(part.split(" ", 1) for part in order.fails.split(", ") if part).get(name, "")
        if how == "rejects":
            raise Rejected(f"{name} says no")
        if how.startswith("fails") and self.counts[name] <= int(how.removeprefix("fails ") or 1):
            raise ConnectionResetError(f"{name} is away")
        if name in self.gates:
            self.reached.setdefault(name, asyncio.Event()).set()
            await self.gates[name].wait()
        await self.pool.execute(
            "insert into effects (name, sku, key) values ($1, $2, $3)", name, order.sku, ctx.idempotency_key
        )
        if how == "lands":
            raise TimeoutError


@step(retry=SOON, settle=0)
async def reserve(ctx: StepContext[Service], order: Order) -> str:
    await ctx.deps.act("reserve", order, ctx)
    return "A1"


@reserve.compensation(retry=SOON)
async def release(ctx: StepContext[Service], done: str | Unknown, order: Order) -> None:
    await ctx.deps.act("release", order, ctx)


@step(retry=SOON, settle=0)
async def charge(ctx: StepContext[Service], order: Order) -> str:
    await ctx.deps.act("charge", order, ctx)
    return "paid"


@charge.compensation(retry=SOON)
async def refund(ctx: StepContext[Service], done: str | Unknown, order: Order) -> None:
    await ctx.deps.act("refund", order, ctx)


@step(at_most_once=True, timeout=5)
async def ship(ctx: StepContext[Service], order: Order) -> str:
    await ctx.deps.act("ship", order, ctx)
    return "sent"


@ship.compensation(retry=SOON)
async def recall(ctx: StepContext[Service], done: str | Unknown, order: Order) -> None:
    await ctx.deps.act("recall", order, ctx)


@saga("shop", deadline=HOUR)
async def shop(run: Run, order: Order) -> str:
    shelf = await run(reserve(order))
    paid = await run(charge(order))
    return f"{shelf} {paid} {await run(ship(order))}"


@step(retry=Retry(1), timeout=5, settle=0)
async def send(ctx: StepContext[Service], order: Order) -> str:
    await ctx.deps.act("send", order, ctx)
    return "sent"


@send.compensation
async def unsend(ctx: StepContext[Service], done: str | Unknown, order: Order) -> None:
    await ctx.deps.act("unsend", order, ctx)


@saga("settled", deadline=HOUR)
async def settled(run: Run, order: Order) -> str:
    await run(reserve(order))
    return await run(send(order))


@step(retry=SOON, settle=0)
async def pack(ctx: StepContext[Service], order: Order) -> str:
    await ctx.deps.act("pack", order, ctx)
    return "packed"


@pack.compensation(retry=SOON)
async def unpack(ctx: StepContext[Service], done: str | Unknown, order: Order) -> None:
    await ctx.deps.act("unpack", order, ctx)


@saga("packed", deadline=HOUR)
async def packed(run: Run, order: Order) -> str:
    shelf = await run(reserve(order))
    paid = await run(charge(order))
    return f"{shelf} {paid} {await run(pack(order))}"


@saga("both", deadline=HOUR)
async def both(run: Run, order: Order) -> str:
    shelf, paid = await run.parallel(reserve(order), charge(order))
    return f"{shelf} {paid}"


@saga("approved", deadline=HOUR)
async def approved(run: Run, order: Order) -> str:
    await run(reserve(order))
    await run.sleep(0.05)
    approval = await run.receive(Approval, timeout=0.2 if order.sku == "short" else 3600)
    if approval is None:
        raise Rejected("nobody approves")
    return await run(charge(order))


@step(transactional=True)
async def record(tx: Transaction, order: Order) -> int:
    await tx.execute("insert into records (sku) values ($1)", order.sku)
    if order.fails == "record rejects":
        raise Rejected("no")
    return int(await tx.fetchval("select count(*) from records"))


@record.compensation
async def forget(tx: Transaction, done: int | Unknown, order: Order) -> None:
    assert done == 1
    await tx.execute("delete from records where sku = $1", order.sku)


@saga("recorded", deadline=HOUR)
async def recorded(run: Run, order: Order) -> int:
    await run(reserve(order))
    count = await run(record(order))
    await run(ship(order))
    return count


@saga("exclusive", deadline=HOUR)
async def exclusive(run: Run, order: Order) -> str:
    await run.lock("the printer")
    await run(reserve(order))
    return await run(charge(order))


@asynccontextmanager
async def working(
    pool: Pool, *sagas: Saga[Any, Any], settings: Settings = QUICK, deps: Service | None = None
) -> AsyncIterator[Service]:
    """A worker in this process for the length of the block, and its services."""
    await pool.execute(SERVICE.replace("create table", "create table if not exists"))
    service = deps or Service(pool)
    async with Worker(pool, "", *sagas, deps=service, settings=settings):
        yield service


async def effects(pool: Pool) -> list[str]:
    """Names of what happened outside, in order."""
    return [row["name"] for row in await pool.fetch("select name from effects order by no")]


async def state(pool: Pool, instance_id: UUID) -> str:
    return str(await pool.fetchval("select state from saga.workflow_instances where id = $1", instance_id))


async def reaches(pool: Pool, instance_id: UUID, *states: str) -> None:
    """Wait until an instance is in one of these states."""

    async def look() -> bool:
        return await state(pool, instance_id) in states

    await eventually(look, what=f"instance in {states}")


async def journal_of(pool: Pool, instance_id: UUID) -> list[tuple[str, str]]:
    rows = await pool.fetch(
        "select path, outcome from saga.tasks where instance_id = $1 and seq > 0 order by seq", instance_id
    )
    return [(row["path"], row["outcome"]) for row in rows]


async def plan_of(pool: Pool, instance_id: UUID) -> list[tuple[str, str]]:
    rows = await pool.fetch(
        "select path, status from saga.saga_compensations where instance_id = $1 order by position, round", instance_id
    )
    return [(row["path"], row["status"]) for row in rows]


UNDOES: Final = {"reserve": "release", "charge": "refund", "pack": "unpack"}


async def end_of(handle: Handle[Any]) -> str:
    """How a saga ends: completed, or undone."""
    try:
        await handle.result(timeout=30)
    except Failed:
        return "undone"
    return "completed"


async def violations(pool: Pool, ends: dict[str, str], names: list[str]) -> list[str]:
    """What is not as it must be.

    A completed saga did all of `names` and undid nothing; any other undid, in reverse order, what it did and what the
    journal says that it may have done. Each under one key: a service sees a key twice where a worker was lost.
    """
    found = []
    for sku, end in ends.items():
        rows = await pool.fetch("select name, key from effects where sku = $1 order by no", sku)
        told = [name for name, _ in dict.fromkeys((row["name"], row["key"]) for row in rows)]
        done = [name for name in told if name in UNDOES]
        undone = [name for name in told if name not in UNDOES]
        rows = await pool.fetch(
            "select step_id from saga.tasks where outcome = 'unknown' and input -> 'order' ->> 'sku' = $1", sku
        )
        touched = {*done, *(row["step_id"] for row in rows)}
        expected = [] if end == "completed" else [UNDOES[name] for name in reversed(names) if name in touched]
        if undone != expected or done != (names if end == "completed" else names[: len(done)]):
            found.append(f"{sku} has {end}: {told}")
    states = await pool.fetch(
        "select i.id from saga.workflow_instances i where i.state not in ('completed', 'failed', 'cancelled')"
        " or exists (select from saga.saga_compensations c where c.instance_id = i.id and c.status <> 'completed')"
    )
    return [*found, *(f"{row['id']} is left" for row in states)]
