"""The buffer follows savepoints as PostgreSQL does; test_hazards_writer compares the two on random programs."""

import sys
from typing import Final
from uuid import UUID

import pytest

module: Final = sys.modules["outbox.transaction"]


def emission(name: str) -> object:
    return module.Emission("t", name, UUID(int=0), "e", 1, None, b"")


class Rehearsal:
    """A buffer, driven by queries and emits."""

    def __init__(self) -> None:
        self.buffer = module.Buffer()

    def run(self, *steps: str) -> list[str]:
        """Steps that start with + emit, the others are queries."""
        for step in steps:
            if step.startswith("+"):
                self.buffer.add(emission(step[1:]))
            else:
                self.buffer.observe(step)
        return [event.key for event in self.buffer.drain()]


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        (["+1", "savepoint a", "+2", "rollback to a", "+3"], ["1", "3"]),
        (["+1", "SAVEPOINT a", "+2", "ROLLBACK TO SAVEPOINT a;", "+3", "rollback work to a"], ["1"]),
        (["savepoint a", "+1", "release a", "+2", "rollback to a"], ["1", "2"]),
        (["savepoint a", "+1", "savepoint b", "+2", "release savepoint b", "+3", "rollback to a"], []),
        (["savepoint a", "+1", "savepoint a", "+2", "rollback to a", "release a", "+3", "rollback to a"], []),
        (["savepoint a", "+1", "savepoint b", "+2", "rollback to a", "+3"], ["3"]),
        (["savepoint a", "+1", "savepoint b", "+2", "release a"], ["1", "2"]),
        (['savepoint "A b"', "+1", 'rollback to "A b"', "+2"], ["2"]),
        (['savepoint "a"', "+1", "rollback to A"], []),
        (['savepoint "A"', "+1", "savepoint a", "+2", "rollback to a"], ["1"]),
        (["savepoint a; select 1", "+1", "select 2; rollback to a"], []),
        # Text that only looks like a statement.
        (["savepoint a", "+1", "insert into notes values ('; rollback to a')"], ["1"]),
        (["savepoint a", "+1", "select 1 -- ; rollback to a"], ["1"]),
        (["savepoint a", "+1", "select $q$; rollback to a;$q$"], ["1"]),
        (["savepoint a", "+1", 'select 1 as "; rollback to a"'], ["1"]),
        (["savepoint a", "+1", r"select e'\'; rollback to a'"], ["1"]),
        # Statements that a comment hides from a naive eye.
        (["/* by: me */ savepoint a", "+1", "-- undo\nrollback to a"], []),
        (["savepoint/**/a", "+1", "rollback /* a /* b */ c */ to a"], []),
    ],
)
def test_buffer_keeps_what_postgresql_keeps(steps: list[str], kept: list[str]) -> None:
    """Seen red: ROLLBACK TO that keeps the savepoint's own events; RELEASE that drops them."""
    assert Rehearsal().run(*steps) == kept
