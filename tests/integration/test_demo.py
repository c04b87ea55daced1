"""The demo as a process: it passes on a small run, and fails when what it judges has been spoilt."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from examples.agents import sabotage
from examples.agents.saga_verdict import MEANING, Fault

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 230
pytestmark = pytest.mark.timeout(TIMEOUT_SECONDS + 10)


def demo(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.agents.demo", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_small_run_is_valid() -> None:
    status, output, errors = demo("--json", "--events", "500", "--sagas", "60")
    assert output, errors
    found = json.loads(output)
    assert found["valid"], found
    assert status == 0
    assert found["committed"] == found["published"] == found["records"] >= 500
    assert found["duplicates"] == found["overdue"] == 0
    assert not any(found["anomalies"].values())
    assert found["rolled_back"] > 0
    assert found["cached"] > 0
    assert found["samples"] > 0
    assert {"created", "renamed", "deleted", "archived in SQL"} <= found["exercised"].keys()
    assert found["commit_to_cache_ms"]["quiet"]["probes"] >= 50
    sagas = found["sagas"]
    assert sagas["asked"] == sagas["completed"] + sagas["failed"] + sagas["cancelled"] == 60
    assert sagas["effects_kept"] == 4 * sagas["completed"]
    assert sagas["effects_undone"] > 0
    assert not any(sagas["faults"].values())
    assert sagas["did_not_happen"] == []
    assert sagas["exercised"]["replies too late"] >= 3


def test_a_spoilt_run_is_not() -> None:
    """Without a terminal people get plain lines; the verdict names what was spoilt, and nothing else."""
    spoilt = [argument for name in (sabotage.RECORD, *sabotage.STATEMENTS) for argument in ("--sabotage", name)]
    status, output, errors = demo("--events", "500", "--sagas", "60", *spoilt)
    assert status == 1, output + errors
    assert "\x1b" not in output
    verdict = output.partition("NOT VALID")[2]
    found = dict(re.findall(r"^  (\w+): (\d+)$", verdict, re.MULTILINE))
    assert found.pop("skip", "1") == "1", "the hidden record's key may have had no later one"
    assert found == {"lost": "1", "cache_divergence": "1", **dict.fromkeys(Fault, "1")}
    for fault in Fault:
        assert f"✗      1  {MEANING[fault]}" in output


def test_help_has_examples() -> None:
    status, output, _ = demo("--help")
    assert status == 0
    assert "examples:" in output
    assert "exit codes:" in output


@pytest.mark.parametrize("arguments", [("--events", "0"), ("--events", "many"), ("--sagas", "39"), ("--nonsense",)])
def test_wrong_arguments_do_nothing(arguments: tuple[str, ...]) -> None:
    status, output, errors = demo(*arguments)
    assert status == 2
    assert not output
    assert "usage:" in errors
