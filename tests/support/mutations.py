"""Rules taken out on purpose: a test of a rule must fail without it, and these make the version without it.

SQL functions are replaced in the test's own database, named statements in this process for the length of a block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import LiteralString

from outbox import Pool
from outbox.postgres import Statements


async def break_function(db: Pool, name: str, rule: str, without: str = "", *, schema: str = "outbox") -> None:
    """Replace the text of a rule in a function of a schema of ours."""
    definition: str = await db.fetchval("select pg_get_functiondef(($1 || '.' || $2)::regproc)", schema, name)
    assert definition.count(rule) == 1, f"{schema}.{name} holds {rule!r} {definition.count(rule)} times"
    await db.execute(definition.replace(rule, without))


@contextmanager
def broken_statement(
    statements: Statements, name: str, rule: LiteralString, without: LiteralString = ""
) -> Iterator[None]:
    """Replace the text of a rule in a named statement of this process."""
    whole = statements._statements[name]
    assert whole.text.count(rule) == 1, f"{name} holds {rule!r} {whole.text.count(rule)} times"
    statements._statements[name] = replace(whole, text=whole.text.replace(rule, without))
    try:
        yield
    finally:
        statements._statements[name] = whole
