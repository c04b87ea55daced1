"""docs/guarantees.md names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "guarantees.md").read_text())))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[test for _, test in NAMED])
def test_named_test_exists(file: str, test: str) -> None:
    assert re.search(rf"^\s*(?:async )?def {test}\(", (ROOT / file).read_text(), flags=re.MULTILINE)


def test_every_promise_is_listed() -> None:
    listed = re.findall(r"^\| (P\d+) \|", (ROOT / "docs" / "guarantees.md").read_text(), flags=re.MULTILINE)
    assert listed == [f"P{n}" for n in range(1, 11)]
