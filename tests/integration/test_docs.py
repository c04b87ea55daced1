"""All that README.md and docs/ tell a reader to type is typed here, page by page; see `tests.support.pages`."""

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from outbox.embedded import Databases
from outbox.upkeep import migrate
from tests.support.pages import ROOT, Block, Session, blocks, shows

PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if blocks(page)]
BLOCK_TIMEOUT_SECONDS = 60.0


@pytest.fixture
def urls(postgres: Databases) -> Iterator[dict[str, str]]:
    """Two fresh databases under the names that the pages use."""
    suffix = uuid.uuid4().hex[:12]
    names = ("llm_agent_db", "workflow_db")
    yield {name: postgres.create_database(f"{name}_{suffix}") for name in names}
    for name in names:
        postgres.drop_database(f"{name}_{suffix}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
async def test_page(page: Path, urls: dict[str, str], broker: str, tmp_path: Path) -> None:
    async with asyncpg.create_pool(urls["llm_agent_db"]) as owner, asyncpg.create_pool(urls["workflow_db"]) as workflow:
        pools = {"llm_agent_db": owner, "workflow_db": workflow}
        for pool in pools.values():
            await migrate.up(pool)
        async with Session(page, urls, pools, broker, tmp_path) as session:
            for block in blocks(page):
                try:
                    async with asyncio.timeout(BLOCK_TIMEOUT_SECONDS):
                        await session.run(block)
                except BaseException as error:
                    error.add_note(f"in the {block.language} block at {page.relative_to(ROOT)}:{block.line}")
                    raise


def test_blocks_are_found_with_what_stands_in_front_of_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Text\n\n<!-- test: dry -->\n```console\n$ make test\n```\n\n```python\nx = 1\n```\n")
    assert blocks(page) == [Block(5, "console", "dry", "$ make test\n"), Block(9, "python", None, "x = 1\n")]


def test_a_command_has_its_output_and_its_continuation() -> None:
    block = Block(1, "console", None, "$ one \\\n    --flag  # a remark\nsaid ...\n$ two\n")
    assert list(block.commands()) == [("one     --flag", "said ...\n"), ("two", "")]


def test_output_is_compared_by_lines_in_order() -> None:
    output = "first 1\nsecond 2\nthird 3\n"
    assert shows(output, "first ...\nthird 3\n")
    assert shows(output, "")
    assert not shows(output, "third\nfirst\n")


@pytest.mark.parametrize(
    ("language", "test", "body"),
    [
        ("python", None, "assert False"),
        ("python", "program", "raise SystemExit(3)"),
        ("sql", None, "select 1 / 0"),
        ("console", None, "$ false\n"),
        ("console", None, "$ echo yes\nno\n"),
        ("console", "service", "$ echo yes\nno\n"),
        ("console", "help", "$ outbox relay --no-such-flag\n"),
        ("", None, "outbox relay"),
        ("cobol", None, "who knows"),
    ],
)
async def test_a_block_that_does_not_hold_fails(
    language: str, test: str | None, body: str, urls: dict[str, str], broker: str, tmp_path: Path
) -> None:
    async with (
        asyncpg.create_pool(urls["llm_agent_db"]) as pool,
        Session(tmp_path, urls, {"llm_agent_db": pool, "workflow_db": pool}, broker, tmp_path) as session,
    ):
        with pytest.raises((AssertionError, asyncpg.DivisionByZeroError)):
            await session.run(Block(1, language, test, body))
