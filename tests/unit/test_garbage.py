"""The garbage collector rests within a block, and is afterwards as it was."""

import asyncio
import gc
from collections.abc import Iterator

import pytest

from outbox import garbage


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    yield
    gc.enable()


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
