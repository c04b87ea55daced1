"""Sagas that wait and pause in every way there is; for tests of what persons see and do."""

from datetime import timedelta
from typing import Any

from pydantic import BaseModel

from saga import Rejected, Retry, Run, StepContext, Unknown, remote, saga, step
from tests.support.saga_worker import SOON, Approval, Order, Service, charge, reserve

HOUR = timedelta(hours=1)
LATER = Retry(attempts=3, initial=600, maximum=600)


class Switch:
    """What is broken in the code, until a test mends it."""

    body_has_bug = True


@step(retry=LATER)
async def slow(ctx: StepContext[Service], order: Order) -> str:
    raise ConnectionResetError("away\x1b[31m")


@step(retry=SOON, settle=0)
async def book(ctx: StepContext[Service], order: Order) -> str:
    await ctx.deps.act("book", order, ctx)
    return "booked"


@book.compensation(retry=Retry(attempts=2, initial=0.01, maximum=0.01))
async def unbook(ctx: StepContext[Service], done: str | Unknown, order: Order) -> None:
    await ctx.deps.act("unbook", order, ctx)


@step(at_most_once=True, timeout=5)
async def certain(ctx: StepContext[Service], order: Order) -> str:
    await ctx.deps.act("certain", order, ctx)
    return "sure"


class Reserve(BaseModel):
    sku: str


stock = remote("stock.reserve", Reserve, timeout=3600)


@saga("asks", deadline=HOUR)
async def asks(run: Run, order: Order) -> str:
    await run(reserve(order))
    approval = await run.receive(Approval, timeout=1800)
    return "approved" if approval is not None and approval.approved else "refused"


@saga("sleeps", deadline=HOUR)
async def sleeps(run: Run, order: Order) -> None:
    await run.sleep(1800)


@saga("locks", deadline=HOUR)
async def locks(run: Run, order: Order) -> None:
    await run.lock("shelf")
    await run.receive(Approval, timeout=1800)


@saga("commands", deadline=HOUR)
async def commands(run: Run, order: Order) -> None:
    await run(stock(Reserve(sku=order.sku)))


@saga("parent", deadline=HOUR)
async def parent(run: Run, order: Order) -> None:
    await run.child(asks, order)


@saga("retries", deadline=HOUR)
async def retries(run: Run, order: Order) -> str:
    return await run(slow(order))


@saga("buggy", deadline=HOUR)
async def buggy(run: Run, order: Order) -> str:
    done = await run(reserve(order))
    if Switch.body_has_bug:
        raise KeyError("price")
    return done


@saga("undone", deadline=HOUR)
async def undone(run: Run, order: Order) -> None:
    """`order.fails` says which compensation fails."""
    await run(reserve(order))
    await run(book(order))
    raise Rejected("sold out")


@saga("pivoted", deadline=HOUR)
async def pivoted(run: Run, order: Order) -> str:
    await run(reserve(order))
    await run.pivot()
    return await run(certain(order))


@saga("pair", deadline=HOUR)
async def pair(run: Run, order: Order) -> str:
    return await run(reserve(order)) + await run(charge(order))


CASES: tuple[Any, ...] = (
    asks,
    sleeps,
    locks,
    commands,
    parent,
    retries,
    buggy,
    undone,
    pivoted,
    pair,
)
