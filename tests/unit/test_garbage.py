"""The garbage collector rests within a block, and is afterwards as it was."""

import asyncio
import gc
from collections.abc import Iterator

import pytest

from outbox import garbage


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.enable()
    gc.set_threshold(*before)


def test_it_rests_within_the_block_also_a_nested_one() -> None:
    with garbage.held():
        assert not gc.isenabled()
        with garbage.held():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_wakes_after_an_error() -> None:
    """Red without the `finally`."""
    with pytest.raises(RuntimeError), garbage.held():
        raise RuntimeError
    assert gc.isenabled()


def test_one_that_was_switched_off_stays_off() -> None:
    """Red when it is always switched on again."""
    gc.disable()
    with garbage.held():
        pass
    assert not gc.isenabled()


async def _work(waits: asyncio.Event, log: list[bool]) -> str:
    log.append(gc.isenabled())
    await waits.wait()
    log.append(gc.isenabled())
    return "done"


async def test_a_coroutine_is_held_between_its_awaits_only() -> None:
    """Red when the whole coroutine is held: one that waits for ever would switch the collector off for ever."""
    waits, log = asyncio.Event(), list[bool]()
    task = asyncio.ensure_future(garbage.held_in_steps(_work)(waits, log))
    await asyncio.sleep(0)
    assert log == [False]
    assert gc.isenabled()
    waits.set()
    assert await task == "done"
    assert log == [False, False]
    assert gc.isenabled()


async def test_errors_and_cancellations_reach_the_coroutine() -> None:
    """Red when what is thrown in while it waits is not thrown on."""
    seen: list[type[BaseException]] = []

    @garbage.held_in_steps
    async def stubborn() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError as error:
            seen.append(type(error))
        raise LookupError("its own")

    task = asyncio.ensure_future(stubborn())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(LookupError, match="its own"):
        await task
    assert seen == [asyncio.CancelledError]
    assert gc.isenabled()


def test_it_runs_seldom_until_the_last_of_those_who_want_that_has_gone() -> None:
    """Red where the first one that goes sets it back, and where the last one does not."""
    gc.set_threshold(700, 11, 12)
    first, second = garbage.seldom(), garbage.seldom()
    with first:
        assert gc.get_threshold() == (garbage.SELDOM, 11, 12)
        second.__enter__()
    assert gc.get_threshold() == (garbage.SELDOM, 11, 12)
    second.__exit__(None, None, None)
    assert gc.get_threshold() == (700, 11, 12)


@pytest.mark.parametrize("before", [0, 10 * garbage.SELDOM])
def test_one_that_runs_still_more_seldom_is_left_alone(before: int) -> None:
    """Red where the threshold is always set."""
    gc.set_threshold(before, 11, 12)
    with garbage.seldom():
        assert gc.get_threshold() == (before, 11, 12)
    assert gc.get_threshold() == (before, 11, 12)


def test_what_somebody_else_has_set_meanwhile_stays() -> None:
    """Red where the old threshold is always set again."""
    with garbage.seldom():
        gc.set_threshold(123, 11, 12)
    assert gc.get_threshold() == (123, 11, 12)
