"""One attempt within its time: what waits is cut off, what does not wait needs no timer, and errors reach the step."""

import asyncio
from typing import Any
from uuid import UUID, uuid5

import pytest

from saga import StepContext, step
from saga.outcome import context_of, perform
from saga.state import Completed, Fact, Uncertain, Work, step_key

_INSTANCE = UUID("018f0000-0000-7000-8000-000000000001")
seen: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_seen_yet() -> None:
    seen.clear()


@step
async def quick(ctx: StepContext[Any], number: int) -> int:
    return number + 1


@step(timeout=0.01)
async def slow(ctx: StepContext[Any], number: int) -> int:
    try:
        await asyncio.Event().wait()
    finally:
        seen.append("cut off")
    return number


@step
async def patient(ctx: StepContext[Any], number: int) -> int:
    for _ in range(3):
        await asyncio.sleep(0)
    try:
        await asyncio.wait_for(asyncio.Event().wait(), 0.001)
    except TimeoutError:
        seen.append("its own timeout")
    return number


def attempt(target: Any, **values: Any) -> Work:
    path = f"{target.name}#1"
    return Work(
        kind="step",
        instance_id=_INSTANCE,
        path=path,
        name=target.name,
        key=step_key(_INSTANCE, path),
        attempt=1,
        timeout_seconds=target.timeout_seconds,
        target=target,
        values=values,
    )


async def performed(work: Work) -> Fact:
    return await perform(work, context_of(work, None))


async def test_a_step_that_waits_for_nothing_needs_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> Any:
        raise AssertionError("a timer was set")

    monkeypatch.setattr(asyncio, "timeout_at", none)
    assert await performed(attempt(quick, number=1)) == Completed(path="quick#1", output="2")


async def test_a_step_that_waits_is_cut_off_in_time() -> None:
    """Red where `_within` goes on without its timer: the step then never ends."""
    fact = await asyncio.wait_for(performed(attempt(slow, number=1)), 20)
    assert fact == Uncertain(path="slow#1", error="timed out after 0.01 s")
    assert seen == ["cut off"]


async def test_a_step_that_waits_may_catch_what_its_own_calls_raise() -> None:
    """Red where `_rest` does not throw into the step: the error then ends the attempt."""
    assert await performed(attempt(patient, number=7)) == Completed(path="patient#1", output="7")
    assert seen == ["its own timeout"]


async def test_a_cancellation_passes_through_the_step() -> None:
    """Red where `_rest` keeps it from the step: its `finally` then runs late, or never."""
    work = attempt(slow, number=1)
    work.timeout_seconds = 60.0
    task = asyncio.create_task(performed(work))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cut off"]


def test_the_key_of_a_step_is_a_name_based_uuid() -> None:
    """Others can derive it, and it never changes."""
    assert step_key(_INSTANCE, "charge#1") == uuid5(_INSTANCE, "charge#1")
    assert str(step_key(_INSTANCE, "ü#1")) == str(uuid5(_INSTANCE, "ü#1"))
