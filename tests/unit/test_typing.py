"""What services write passes `mypy --strict`, and a checker catches their mistakes.

The cases in `tests/typing` are checked as a service's own code would be: from another directory, without this
repository's configuration, against the installed package. Each `type: ignore[code]` marks a misuse; strict mode reports
the ones that nothing triggers, so a misuse that goes unnoticed fails here.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
CASES: Final = sorted((ROOT / "tests" / "typing").glob("*.py"))
_MARKED: Final = re.compile(r"# type: ignore\[[\w, -]+\]")


def check(directory: Path) -> tuple[int, str]:
    """Mypy's exit status and report for all files of a directory."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={ROOT / '.mypy_cache' / 'services'}",
         "."],
        cwd=directory, check=False, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def copy(directory: Path, *, marks: bool) -> int:
    """The cases, with or without the marks of misuse; how many marks there are."""
    count = 0
    for case in CASES:
        text = case.read_text(encoding="utf-8")
        count += len(_MARKED.findall(text))
        (directory / case.name).write_text(text if marks else _MARKED.sub("#", text), encoding="utf-8")
    return count


def test_services_pass_and_every_marked_misuse_is_one(tmp_path: Path) -> None:
    assert copy(tmp_path, marks=True) > 20
    status, report = check(tmp_path)
    assert status == 0, report


def test_without_the_marks_every_misuse_is_reported(tmp_path: Path) -> None:
    marks = copy(tmp_path, marks=False)
    status, report = check(tmp_path)
    lines = {line.rsplit(": error:", 1)[0] for line in report.splitlines() if ": error:" in line}
    assert (status, len(lines)) == (1, marks), report


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_cases_do_not_turn_the_checker_off(case: Path) -> None:
    text = case.read_text(encoding="utf-8")
    assert "mypy:" not in text
    assert not re.search(r"type: ignore(?!\[)", text)
