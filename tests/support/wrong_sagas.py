"""Sagas in which `saga check` finds something, and one in which it does not; the comment says what."""

import asyncio
import datetime as dt
import random
import time
import uuid
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from saga import Run, StepContext, remote, saga, step

HOUR = timedelta(hours=1)


class Order(BaseModel):
    sku: str = "x"


@step
async def undoable(ctx: StepContext[Any], order: Order) -> str:
    return datetime.now().isoformat()  # noqa: DTZ005 - a step may


@undoable.compensation
async def undo(ctx: StepContext[Any], done: object, order: Order) -> None: ...


@step
async def final(ctx: StepContext[Any], order: Order) -> None: ...


@step(irreversible=True)
async def notify(ctx: StepContext[Any], order: Order) -> None: ...


patient = remote("stock.reserve", Order, timeout=7200)


async def helper(run: Run, order: Order) -> None:
    await run(final(order))  # no-compensation: helped


@saga("right", deadline=HOUR)
async def right(run: Run, order: Order) -> str:
    now = run.now()
    await run.parallel(undoable(order), notify(order))
    await run.sleep(timedelta(seconds=1))
    await run.pivot()
    await run(final(order))
    return f"{now} {run.uuid()} {run.random()}"


@saga("helped", deadline=HOUR)
async def helped(run: Run, order: Order) -> None:
    await helper(run, order)


@saga("wrong", deadline=HOUR)
async def wrong(run: Run, order: Order) -> None:
    await run(final(order))  # no-compensation
    if order.sku:
        await run.parallel(undoable(order), final(order))  # no-compensation
    await run(patient(order))  # useless-timeout
    datetime.now()  # not-repeatable # noqa: DTZ005
    dt.datetime.utcnow()  # not-repeatable # noqa: DTZ003
    time.time()  # not-repeatable
    random.random()  # not-repeatable
    uuid.uuid4()  # not-repeatable
    uuid4()  # not-repeatable
    await asyncio.sleep(1)  # foreign-await
    asyncio.create_task(helper(run, order))  # foreign-await # noqa: RUF006
    async with asyncio.timeout(1):  # foreign-await # noqa: ASYNC100
        pass
    stamp()


def stamp() -> float:
    return time.monotonic()  # not-repeatable: wrong
