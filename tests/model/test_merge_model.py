"""The merge against a model of the owner, over many random histories; see `tests.support.merge_model`.

Each rule of the merge is also taken out, and the model has to find that within a few runs.
"""

import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, LiteralString

import asyncpg
import pytest
import pytest_asyncio

from outbox import Pool
from outbox.cache import merge
from outbox.upkeep import migrate
from tests.support.merge_model import Run, Violation, create_table
from tests.support.mutations import break_function, broken_statement

KEYS: Final = 1000
HISTORIES: Final = int(os.environ.get("SAGABOX_MODEL_HISTORIES", "100000"))
FIRST_SEED: Final = int(os.environ.get("SAGABOX_MODEL_SEED", "0"))
PARTS: Final = 4
"""Tests that the histories are divided among; each has its own time limit."""
KEYS_WITHOUT_A_RULE: Final = 200
RUNS_WITHOUT_A_RULE: Final = 25


@pytest_asyncio.fixture
async def pool(database: str, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Pool]:
    """What the model commits need not outlive a server."""
    caplog.set_level(logging.ERROR, "outbox")  # it parks many keys
    settings = {"synchronous_commit": "off"}
    async with asyncpg.create_pool(database, min_size=1, max_size=4, server_settings=settings) as pool:
        await migrate.up(pool)
        await create_table(pool)
        yield pool


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(PARTS))
async def test_the_table_follows_the_owner(pool: Pool, part: int) -> None:
    """SAGABOX_MODEL_HISTORIES=1000000 tries more of them; SAGABOX_MODEL_SEED=7 begins with the run of that seed."""
    for seed in range(FIRST_SEED + part, FIRST_SEED + HISTORIES // KEYS, PARTS):
        await Run(pool, seed, KEYS).play()


RESTORED_KEYS: Final = 300
RESTORED_TELLING_SEEDS: Final = (14, 32, 36)
"""Runs in which a patch of the new log meets a row that was lost."""


@pytest.mark.timeout(1200)
async def test_an_owner_that_lost_its_last_commits(pool: Pool) -> None:
    """Pages of the new log, read at any moment after the adoption, bring the table back to the owner's."""
    for seed in (*RESTORED_TELLING_SEEDS, *range(FIRST_SEED, FIRST_SEED + HISTORIES // RESTORED_KEYS // 20)):
        await Run(pool, seed, RESTORED_KEYS, loss=True).play()


async def test_patches_of_a_new_log_on_rows_of_the_old_one_are_found(pool: Pool) -> None:
    """A page that does not see the patch does not replace the row, so what was lost stays in it for ever."""
    rule = "($5 and outbox.log_ordinal(p.log_id) > outbox.log_ordinal(h.log_id)) is not true"
    run = Run(pool, RESTORED_TELLING_SEEDS[0], RESTORED_KEYS, loss=True)
    with (
        broken_statement(merge.SQL, "merge_changes", rule, "$5::boolean is not null"),
        pytest.raises(Violation, match="at the end"),
    ):
        await run.play()


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of a statement of the merge, and its text without it."""

    name: str
    statement: str
    text: LiteralString
    without: LiteralString = ""


_SEEN: Final[LiteralString] = (
    "outbox.page_sees(n.log_id, n.snapshot, x.outbox_log, x.outbox_transaction_id) is not true"
)
_UNSEEN: Final[LiteralString] = """end) is not false
       and (c.outbox_page is null or c.outbox_page not in (select l.id from later l))
    returning c.{key} as key"""
_ANY: Final[LiteralString] = """end) is not false or true
    returning c.{key} as key"""

RULES: Final = (
    Rule("a full row that a page sees is part of it", "merge_rows", "or " + _SEEN, "or true"),
    Rule("a full row that the row's own page sees is part of it", "merge_rows", "c.outbox_page is null", "true"),
    Rule(
        "a patch or deletion that a page sees is part of it",
        "merge_changes",
        "or n.log_id is not null\n           and outbox.page_sees",
        "or false\n           and outbox.page_sees",
    ),
    Rule(
        "a range speaks for keys that its page lacks: full rows",
        "merge_rows",
        "where (r.after_key is null or x",
        "where false and (r.after_key is null or x",
    ),
    Rule(
        "a range speaks for keys that its page lacks: patches and deletions",
        "merge_changes",
        "or r.page_id is not null\n                                  and (r.after_key is null or e",
        "or false\n                                  and (r.after_key is null or e",
    ),
    Rule(
        "the tombstone of a page stands before full rows that it sees",
        "merge_rows",
        "or outbox.page_sees(g.page_log, g.page_snapshot, x.outbox_log, x.outbox_transaction_id)",
    ),
    Rule(
        "a deletion leaves a tombstone",
        "merge_changes",
        "where d.outbox_log is not null and d.{key} not in",
        "where false and d.{key} not in",
    ),
    Rule(
        "arrival decides among events of one log, not ids",
        "merge_rows",
        "where outbox.supersedes(excluded.outbox_log, c.outbox_log)",
        "where outbox.supersedes(excluded.outbox_log, c.outbox_log)"
        " and (c.outbox_log <> excluded.outbox_log or c.outbox_transaction_id is null"
        " or excluded.outbox_transaction_id >= c.outbox_transaction_id)",
    ),
    Rule(
        "pages are ordered",
        "merge_page",
        "p.place > page.place",
        "false",
    ),
    Rule(
        "a tombstone that a page does not see stands before its rows",
        "merge_page",
        "outbox.page_sees(page.log_id, page.snapshot, t.log_id, t.transaction_id) is false\n            or",
    ),
    Rule(
        "a row that a page does not see stays",
        "merge_page",
        _UNSEEN + "\n), unburied",
        _ANY + "\n), unburied",
    ),
    Rule(
        "a row that a page does not see is no ghost of it",
        "merge_page",
        _UNSEEN + "\n), buried",
        _ANY + "\n), buried",
    ),
    Rule(
        "what a page speaks for and lacks is removed",
        "merge_page",
        "where s.key not in (select x.{key} from page_rows x)\n), removed",
        "where false\n), removed",
    ),
    Rule(
        "of a single key that a page lacks a tombstone remembers it",
        "merge_page",
        "where k.key not in (select x.{key}::text from page_rows x)",
        "where false and k.key not in (select x.{key}::text from page_rows x)",
    ),
    Rule(
        "a later range stands before rows of a page",
        "merge_page",
        "on r.page_id in (select l.id from later l)",
        "on false",
    ),
    Rule(
        "a row of a page says that it is from it",
        "merge_page",
        "{changing_page}outbox_page = excluded.outbox_page,",
        "{changing_page}",
    ),
)


async def found_within(pool: Pool, model: type[Run] = Run) -> None:
    """The model finds something wrong soon; all of these took between 200 and 1,400 histories."""
    for seed in range(RUNS_WITHOUT_A_RULE):
        try:
            await model(pool, seed, KEYS_WITHOUT_A_RULE).play()
        except Violation:
            return
    pytest.fail(f"nothing wrong in {RUNS_WITHOUT_A_RULE * KEYS_WITHOUT_A_RULE} histories")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name.replace(" ", "-"))
async def test_the_model_finds_a_merge_without_a_rule(pool: Pool, rule: Rule) -> None:
    with broken_statement(merge.SQL, rule.statement, rule.text, rule.without):
        await found_within(pool)


async def test_h16_the_model_finds_ids_that_are_compared_without_the_list_of_what_is_in_progress(pool: Pool) -> None:
    await break_function(
        pool,
        "page_sees",
        "pg_visible_in_snapshot(p_transaction_id, p_snapshot)",
        "p_transaction_id < pg_snapshot_xmax(p_snapshot)",
    )
    await found_within(pool)


class Forgetful(Run):
    """Nothing is remembered of what was applied."""

    async def _deliver(self, number: int, size: int) -> None:
        self.claimed[number].marks.clear()
        await super()._deliver(number, size)


async def test_h24_the_model_finds_late_bytes_of_a_zombie(pool: Pool) -> None:
    await found_within(pool, Forgetful)
