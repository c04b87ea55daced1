"""What code of the user's, and of other services, may do that nobody expects: the instance goes on, or ends."""

import asyncio
from typing import Any

import pytest

from outbox import Pool
from saga import Failed, Rejected, Run, StepContext, Unknown, saga, step
from tests.support.saga_worker import HOUR, SOON, Order, Service, exclusive, plan_of, reserve, state, working


class Stray(BaseException):
    """What a step must not raise."""


@step(retry=SOON, settle=0, timeout=5)
async def stray(ctx: StepContext[Service], order: Order) -> str:
    if ctx.attempt > 2 and order.sku != "for good":
        return "at last"
    if order.fails == "stray raises":
        raise Stray("out of line")
    foreign: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    foreign.cancel()
    await foreign
    return "never"


@stray.compensation(retry=SOON)
async def unstray(ctx: StepContext[Service], done: str | Unknown, order: Order) -> None:
    assert isinstance(done, Unknown)
    if ctx.attempt < 3:
        foreign: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        foreign.cancel()
        await foreign


@saga("strays", deadline=HOUR)
async def strays(run: Run, order: Order) -> str:
    return await run(stray(order))


@saga("strays_beside", deadline=HOUR)
async def strays_beside(run: Run, order: Order) -> str:
    found, _ = await run.parallel(stray(order), reserve(order))
    return found


@pytest.mark.parametrize("kind", [strays, strays_beside])
@pytest.mark.parametrize("how", ["stray cancels", "stray raises"])
async def test_what_a_step_raises_is_an_end_of_its_attempt(saga_pool: Pool, kind: Any, how: str) -> None:
    """A step that awaits what somebody has cancelled, as clients with pools do; or raises what is no `Exception`.

    Red where `outcome.perform` lets that pass: the instance is leased to a living worker, and nothing runs it.
    """
    async with working(saga_pool, kind):
        handle = await kind.start(saga_pool, Order(fails=how))
        assert await handle.result(timeout=20) == "at last"


async def test_what_a_compensation_raises_is_an_end_of_its_attempt(saga_pool: Pool) -> None:
    """As above, on the way back."""
    async with working(saga_pool, strays):
        handle = await strays.start(saga_pool, Order(sku="for good"))
        with pytest.raises(Failed, match="it awaited something that was cancelled"):
            await handle.result(timeout=20)
    assert await plan_of(saga_pool, handle.id) == [("stray#1", "completed")]


@step(retry=SOON, settle=0)
async def refuse(ctx: StepContext[Service], order: Order) -> str:
    raise Rejected("binary \x00 and \ud800 halves")


@saga("refused", deadline=HOUR)
async def refused(run: Run, order: Order) -> str:
    await run(reserve(order))
    if order.sku == "body":
        raise Rejected("binary \x00 and \ud800 halves")
    return await run(refuse(order))


@pytest.mark.parametrize("who", ["step", "body"])
async def test_a_reason_that_postgresql_cannot_hold_is_made_one_that_it_can(saga_pool: Pool, who: str) -> None:
    """Red where `Rejected.reason` is what was said: the journal refuses it, and each resume pauses again."""
    async with working(saga_pool, refused):
        handle = await refused.start(saga_pool, Order(sku=who))
        with pytest.raises(Failed) as failure:
            await handle.result(timeout=20)
    assert failure.value.reason == "binary \\x00 and \\ud800 halves"
    assert await plan_of(saga_pool, handle.id) == [("reserve#1", "completed")]


async def test_an_end_that_cannot_be_told_is_an_end(saga_pool: Pool) -> None:
    """Red where `runner.give_back` looks at the epoch only: a completed saga runs once more."""
    await saga_pool.execute(
        "create function saga.no() returns trigger language plpgsql as $$ begin raise exception 'no'; end $$;"
        "create trigger no before delete on saga.locks for each row execute function saga.no()"
    )
    async with working(saga_pool, exclusive):
        handle = await exclusive.start(saga_pool, Order())
        assert await handle.result(timeout=20) == "paid"
    assert await state(saga_pool, handle.id) == "completed"
    row = await saga_pool.fetchrow("select ready_at, lease_owner, lease_epoch from saga.workflow_instances")
    assert (row["ready_at"], row["lease_owner"]) == (None, None)
