"""Peers in virtual environments of their own: what they need may be at odds with what we need.

They are made once under `.cache/peers`, by pip, with the exact versions that `benchmarks/peers` names.
"""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.real_kafka import UnavailableError

_REQUIREMENTS: Final = Path(__file__).parent / "peers"
_ENVIRONMENTS: Final = Path(__file__).parents[1] / ".cache" / "peers"
_TIMEOUT_SECONDS: Final = 600.0
_SAID_CHARACTERS: Final = 500


def is_ready(name: str, *, directory: Path = _ENVIRONMENTS) -> bool:
    """Whether `interpreter` would have nothing to do."""
    # Written last: the packages are complete, and of these versions.
    done = directory / name / "requirements.txt"
    return done.exists() and done.read_bytes() == (_REQUIREMENTS / f"{name}.txt").read_bytes()


def interpreter(name: str, *, directory: Path = _ENVIRONMENTS, options: tuple[str, ...] = ()) -> Path:
    """The Python that has the peer of this name, after it was installed if need be.

    Args:
        name: of a file of requirements.
        directory: of all environments.
        options: more of pip's.

    Raises:
        UnavailableError: pip could not install it.
    """
    home = directory / name
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_ready(name, directory=directory):
            shutil.rmtree(home, ignore_errors=True)
            requirements = _REQUIREMENTS / f"{name}.txt"
            pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", *options]
            _do(name, [sys.executable, "-m", "venv", str(home)])
            _do(name, [str(home / "bin" / "python"), *pip, "-r", str(requirements)])
            shutil.copyfile(requirements, home / "requirements.txt")
    return home / "bin" / "python"


def _do(name: str, command: list[str]) -> None:
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
    )
    if done.returncode != 0:
        said = (done.stdout + done.stderr).strip()[-_SAID_CHARACTERS:]
        raise UnavailableError(f"{name} could not be installed from benchmarks/peers/{name}.txt: {said}")
