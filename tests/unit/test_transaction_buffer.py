"""The buffer follows savepoints as PostgreSQL does."""

import sys
from typing import Final
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
    assert Rehearsal().run(*steps) == kept


NAMES: Final = st.sampled_from(["a", "b", '"B"', '"x;y"'])
PREFIXES: Final = st.sampled_from(["", "/* c */ ", "-- c\n", "\n  "])
STEPS: Final = st.lists(
    st.one_of(
        st.just("+"),
        st.builds("{}savepoint {}".format, PREFIXES, NAMES),
        st.builds("{}release {}".format, PREFIXES, NAMES),
        st.builds("{}rollback to savepoint {}".format, PREFIXES, NAMES),
        st.just("select '; rollback to a'"),
    ),
    max_size=25,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
async def test_h10_buffer_agrees_with_postgresql_on_any_sequence_of_savepoints(database: str, steps: list[str]) -> None:
    """The same steps against a table: what its transaction would commit is what the buffer would flush.

    A statement that PostgreSQL refuses (no such savepoint) ends the sequence, as it ends the transaction.
    Seen red: ROLLBACK TO that keeps the savepoint's own events; RELEASE that drops them; names without folding.
    """
    rehearsal = Rehearsal()
    connection = await asyncpg.connect(database)
    try:
        await connection.execute("create temp table kept (n integer)")
        await connection.execute("begin")
        for n, step in enumerate(steps):
            if step == "+":
                await connection.execute("insert into kept values ($1)", n)
                rehearsal.buffer.add(emission(str(n)))
                continue
            try:
                await connection.execute(step)
            except asyncpg.PostgresError:
                return
            rehearsal.buffer.observe(step)
        kept = [str(row["n"]) for row in await connection.fetch("select n from kept order by n")]
        assert [event.key for event in rehearsal.buffer.drain()] == kept
    finally:
        await connection.close()
