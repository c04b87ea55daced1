"""Sagas of `saga_cases` as a later deployment may have them; the name says what was changed."""

from typing import Any

from pydantic import BaseModel

from saga import Rejected, Run, StepContext, saga, step
from tests.support.saga_cases import HOUR, book
from tests.support.saga_worker import Approval, Order, charge, reserve


def renamed_step() -> Any:
    """A step of the name `reserve` that says it returns something else."""

    @step
    async def reserve(ctx: StepContext[Any], order: Order) -> int:
        return 1

    return reserve


def without_compensation() -> Any:
    """A step of the name `reserve` that nothing undoes any more."""

    @step
    async def reserve(ctx: StepContext[Any], order: Order) -> str:
        return ""

    return reserve


counts_from_reserve = renamed_step()
reserve_for_good = without_compensation()


class StricterOrder(BaseModel):
    sku: str
    customer: str


@saga("asks", deadline=HOUR)
async def same(run: Run, order: Order) -> str:
    await run(reserve(order))
    approval = await run.receive(Approval, timeout=1800)
    return "refused" if approval is None else "approved"


@saga("asks", deadline=HOUR)
async def longer(run: Run, order: Order) -> str:
    await run(reserve(order))
    return await run(charge(order))


@saga("asks", deadline=HOUR)
async def other_step(run: Run, order: Order) -> str:
    await run(charge(order))
    return await run(reserve(order))


@saga("asks", deadline=HOUR)
async def other_input(run: Run, order: Order) -> str:
    return await run(reserve(Order(sku=order.sku + "!")))


@saga("asks", deadline=HOUR)
async def other_kind(run: Run, order: Order) -> str:
    await run.parallel(reserve(order), charge(order))
    return ""


@saga("asks", deadline=HOUR)
async def shorter(run: Run, order: Order) -> str:
    return ""


@saga("asks", deadline=HOUR)
async def other_result(run: Run, order: Order) -> str:
    return str(await run(counts_from_reserve(order)))


@saga("asks", deadline=HOUR)
async def other_request(run: Run, order: StricterOrder) -> str:
    return order.customer


@saga("asks", deadline=HOUR)
async def with_bug(run: Run, order: Order) -> str:
    await run(reserve(order))
    raise KeyError("price")


@saga("asks", version=2, deadline=HOUR)
async def next_version(run: Run, order: Order) -> str:
    return await run(charge(order))


@saga("sleeps", deadline=HOUR)
async def printing(run: Run, order: Order) -> None:
    print("a body may print")  # noqa: T201
    await run.sleep(1800)


@saga("packed", deadline=HOUR)
async def without_charge(run: Run, order: Order) -> str:
    return await run(reserve(order))


@saga("undone", deadline=HOUR)
async def without_step(run: Run, order: Order) -> None:
    await run(reserve(order))
    raise Rejected("sold out")


@saga("undone", deadline=HOUR)
async def without_undo(run: Run, order: Order) -> None:
    await run(reserve_for_good(order))
    await run(book(order))
    raise Rejected("sold out")
