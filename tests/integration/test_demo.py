"""The demo as a process: it passes on a small run, and fails when what it judges has been spoilt."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 110


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


def verdict(*arguments: str) -> tuple[int, dict[str, Any]]:
    status, output, errors = demo("--json", "--events", "500", *arguments)
    assert output, errors
    return status, json.loads(output)


def test_a_small_run_is_valid() -> None:
    status, found = verdict()
    assert found["valid"], found
    assert status == 0
    assert found["committed"] == found["published"] == found["records"] >= 500
    assert found["duplicates"] == found["overdue"] == 0
    assert not any(found["anomalies"].values())
    assert found["rolled_back"] > 0
    assert found["cached"] > 0
    assert found["samples"] > 0
    assert {"created", "renamed", "deleted", "archived in SQL"} <= found["exercised"].keys()
    assert found["commit_to_cache_ms"]["quiet"]["probes"] > 100


@pytest.mark.parametrize(
    ("sabotage", "anomalies"), [("cache", {"cache_divergence": 1}), ("record", {"lost": 1, "skip": 1})]
)
def test_a_spoilt_run_is_not(sabotage: str, anomalies: dict[str, int]) -> None:
    status, found = verdict("--sabotage", sabotage)
    assert status == 1
    assert not found["valid"]
    assert {name: count for name, count in found["anomalies"].items() if count} == anomalies
    assert found["examples"].keys() == anomalies.keys()


def test_people_get_a_table_without_a_terminal() -> None:
    status, output, errors = demo("--events", "200")
    assert status == 0, output + errors
    assert "VALID: every promise was kept" in output
    assert "out of order within a key" in output
    assert "\x1b" not in output


def test_help_has_examples() -> None:
    status, output, _ = demo("--help")
    assert status == 0
    assert "examples:" in output
    assert "exit codes:" in output


@pytest.mark.parametrize("arguments", [("--events", "0"), ("--events", "many"), ("--nonsense",)])
def test_wrong_arguments_do_nothing(arguments: tuple[str, ...]) -> None:
    status, output, errors = demo(*arguments)
    assert status == 2
    assert not output
    assert "usage:" in errors
