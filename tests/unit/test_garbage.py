"""The garbage collector rests within a block, and is afterwards as it was."""

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
