"""Which savepoint statements a text holds, and what the buffer makes of names, levels and interruptions."""

from typing import cast
from uuid import UUID

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import EmitError, savepoints
from outbox.savepoints import Change
from outbox.transaction import Buffer, Emission

LONG = "n" * 63


def emission(name: str) -> Emission:
    return Emission("orders", name, UUID(int=0), "order.placed", 1, None, b"{}")


def left(*program: str | tuple[str, BaseException]) -> list[str]:
    """What counts after a program of queries, failed queries and `+name`, which emits."""
    buffer = Buffer()
    for step in program:
        if isinstance(step, tuple):
            buffer.observe(*step)
        elif step.startswith("+"):
            buffer.add(emission(step[1:]))
        else:
            buffer.observe(step)
    return [event.key for event in buffer.drain()]


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("SAVEPOINT a", [("open", "a")]),
        ("savepoint A;", [("open", "a")]),
        ('savepoint "A b""c;d"', [("open", 'A b"c;d')]),
        ("savepoint Ä", [("open", "Ä")]),
        ("savepoint a$1", [("open", "a$1")]),
        (f"savepoint {LONG}tail", [("open", LONG)]),
        (f'savepoint "{"é" * 40}"', [("open", "é" * 31)]),
        ("release a", [("release", "a")]),
        ("Release Savepoint a", [("release", "a")]),
        ("rollback to a", [("rollback", "a")]),
        ("ROLLBACK WORK TO SAVEPOINT a", [("rollback", "a")]),
        ("rollback transaction to\nsavepoint a", [("rollback", "a")]),
        ('rollback/* why */to--not b\n savepoint"a"', [("rollback", "a")]),
        ("savepoint a; insert into t values (1); rollback to a;;", [("open", "a"), ("rollback", "a")]),
        ("-- note\nsavepoint a", [("open", "a")]),
        ("/* a /* nested */ ; savepoint b; */ savepoint a", [("open", "a")]),
        ("savepoint savepoint", [("open", "savepoint")]),
        ("rollback to savepoint savepoint", [("rollback", "savepoint")]),
        ("select 1; rollback", []),
        ("rollback and chain", []),
        ("commit; release_all()", []),
        ("select '; rollback to a'", []),
        ("select 'it''s; rollback to a; '", []),
        (r"select E'\'; rollback to a'", []),
        ("select $$; rollback to a;$$, $q$; $$ rollback to a; $q$", []),
        ('select 1 as "; rollback to a"', []),
        ("select 1 -- ; rollback to a", []),
        ("select 1 /* ; rollback to a", []),
        ("select $1; savepoint a", [("open", "a")]),
        ("insert into t values ($1, '; release a'); release a", [("release", "a")]),
        ("savepoint", []),
        ("rollback to", []),
        ("", []),
    ],
)
def test_savepoint_statements_are_found_where_postgresql_finds_them(text: str, changes: list[tuple[str, str]]) -> None:
    assert [(change.kind, change.name) for change in savepoints.read(text).changes] == changes


@given(st.text(alphabet="savepoint ro;lbck\"'$-/*\n\\eE1_", max_size=80))
def test_any_text_can_be_read(text: str) -> None:
    read = savepoints.read(text)
    assert len(read.changes) <= read.statements


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20))
def test_a_quoted_name_is_read_back(name: str) -> None:
    quoted = name.replace('"', '""')
    assert savepoints.read(f'savepoint "{quoted}"').changes == (
        Change("open", name.encode()[:63].decode(errors="ignore")),
    )


@pytest.mark.parametrize(
    ("program", "kept"),
    [
        (["+1", "savepoint a", "+2", "rollback to a", "+3"], ["1", "3"]),
        (["+1", "savepoint a", "+2", "release a", "+3"], ["1", "2", "3"]),
        (["savepoint a", "+1", "savepoint a", "+2", "rollback to a", "+3", "release a", "rollback to a"], []),
        (["savepoint a", "+1", "savepoint b", "+2", "release a"], ["1", "2"]),
        (["savepoint a", "savepoint b", "+1", "rollback to a", "rollback to b"], []),
        (["savepoint a", "+1", "rollback to a", "+2", "rollback to a", "+3"], ["3"]),
        (["+1", "rollback to of_the_caller", "+2"], ["1", "2"]),
        (['savepoint "A"', "+1", "savepoint a", "+2", 'rollback to "A"'], []),
        (["savepoint Ä", "+1", "savepoint ä", "+2", "rollback to Ä"], []),
        ([f"savepoint {LONG}1", "+1", f"rollback to {LONG}2"], []),
        (["savepoint a; savepoint b", "+1", "rollback to b; release a"], []),
    ],
)
def test_levels(program: list[str], kept: list[str]) -> None:
    assert left(*program) == kept


def test_deep_nesting() -> None:
    program = [step for n in range(2_000) for step in (f"savepoint s{n}", f"+{n}")]
    assert left(*program, "rollback to s1000") == [str(n) for n in range(1_000)]
    assert left(*program, *(f"release s{n}" for n in reversed(range(2_000)))) == [str(n) for n in range(2_000)]


REFUSED = asyncpg.DivisionByZeroError("division by zero")


class TestFailures:
    def test_a_refused_statement_changed_nothing(self) -> None:
        assert left("savepoint a", "+1", ("savepoint b", REFUSED), ("release nope", REFUSED), "+2") == ["1", "2"]

    def test_of_a_text_that_failed_the_first_statements_may_have_run(self) -> None:
        failed = ("savepoint a; select 1/0", REFUSED)
        with pytest.raises(EmitError) as refused:
            left("+1", failed, "+2")
        assert refused.value.field == "savepoints"
        assert left("savepoint a", "+1", ("rollback to a; select 1/0", REFUSED), "rollback to a", "+2") == ["2"]

    def test_a_failed_text_before_which_one_goes_back_does_not_matter(self) -> None:
        failed = ("savepoint inner_1; select 1/0; release inner_1", REFUSED)
        assert left("+1", "savepoint before", "+2", failed, "rollback to before", "+3") == ["1", "3"]
        assert left("+1", "savepoint before", "+2", failed, "rollback to before", "release before") == ["1"]
        with pytest.raises(EmitError):
            left("+1", "savepoint before", "+2", failed, "release before")

    @pytest.mark.parametrize("text", ["savepoint a", "release a", "rollback to a"])
    def test_a_cancelled_statement_is_in_doubt_until_one_goes_back_behind_it(self, text: str) -> None:
        cancelled = (text, cast("BaseException", TimeoutError()))
        with pytest.raises(EmitError):
            left("savepoint a", "+1", cancelled, "+2")
        assert left("+0", "savepoint before", "savepoint a", "+1", cancelled, "rollback to before", "+2") == ["0", "2"]

    def test_an_ambiguous_name_is_refused(self) -> None:
        """PostgreSQL may have opened a second `a` or not: whether 1 went with it nobody can tell."""
        with pytest.raises(EmitError):
            left("+0", "savepoint a", "+1", ("savepoint a; select 1/0", REFUSED), "rollback to a")

    def test_a_doubt_without_events_stops_nothing(self) -> None:
        assert left(("savepoint a", TimeoutError())) == []


def test_a_drained_buffer_is_empty() -> None:
    buffer = Buffer()
    buffer.observe("savepoint a")
    buffer.add(emission("1"))
    assert buffer.drain()
    assert buffer.drain() == []
