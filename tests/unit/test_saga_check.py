"""`saga check` finds what a body must not do, and nothing else."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saga.check import findings
from saga.cli import app
from tests.support import saga_worker, wrong_sagas


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command sets logging up for a process of its own; here it is the tests' process, which goes on."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def expected() -> set[tuple[int, str]]:
    """Lines of the module with the rule that a comment names."""
    lines = Path(wrong_sagas.__file__).read_text(encoding="utf-8").splitlines()
    return {
        (number, match[1])
        for number, line in enumerate(lines, start=1)
        if (match := re.search(r"# (no-compensation|useless-timeout|not-repeatable|foreign-await)", line))
    }


def test_everything_that_can_be_seen_is_found_and_nothing_else() -> None:
    """Each comment is a rule: without that rule in check.py its line is missing here."""
    found = findings(wrong_sagas)
    assert {(one.line, one.rule) for one in found} == expected()
    assert {one.saga for one in found} == {"wrong", "helped"}
    assert all(one.file == wrong_sagas.__file__ for one in found)


def test_each_finding_says_what_to_do_instead() -> None:
    texts = " ".join(one.problem for one in findings(wrong_sagas))
    for remedy in ("irreversible=True", "shorter timeout", "run.now()", "run.uuid()", "run.random()", "run.sleep"):
        assert remedy in texts


def test_sagas_without_a_fault_have_no_findings() -> None:
    assert findings(saga_worker) == []


@pytest.mark.parametrize(
    ("module", "status", "text"),
    [
        ("tests.support.wrong_sagas", 1, "wrong_sagas.py"),
        ("tests.support.saga_worker", 0, "nothing found"),
        ("tests.support.nowhere", 2, "there is no module"),
    ],
)
def test_the_command_exits_by_what_it_finds(module: str, status: int, text: str) -> None:
    done = CliRunner().invoke(app, ["check", module])
    assert (done.exit_code, text in done.output) == (status, True), done.output


def test_the_command_prints_json() -> None:
    done = CliRunner().invoke(app, ["check", "tests.support.wrong_sagas", "--json"])
    report = json.loads(done.stdout)
    assert report["sagas"] == 3
    assert {one["rule"] for one in report["findings"]} == {rule for _, rule in expected()}
