"""A program in a process of its own, killed and started again: the real `outbox relay`, or a test's consumer."""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from outbox.embedded.process import ServerProcess

_ROOT: Final = Path(__file__).parents[2]
OUTBOX: Final = Path(sys.executable).with_name("outbox")


class Program:
    """One process at a time; its log goes on over all its lives."""

    def __init__(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        """Nothing runs yet; no settings but those in `environment` reach it."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SAGABOX_", "PG"))}
        self._environment = {**inherited, "PYTHONPATH": str(_ROOT), **environment}
        self._command = command
        self._process = ServerProcess(name, Path(tempfile.mkdtemp(prefix=f"sagabox-{name}-")))

    def start(self) -> None:
        """Start it; it works when it works."""
        self._process.spawn(self._command, environment=self._environment)

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self._process.running

    @property
    def log(self) -> str:
        """What it wrote, over all its lives."""
        return self._process.log.read_text(errors="replace")

    def kill(self) -> int | None:
        """SIGKILL; how it ended."""
        self._process.kill()
        return self._process.exit_status

    def dispose(self) -> None:
        """End it and remove its log."""
        self._process.kill()
        self._process.dispose()


def relay_command(url: str, servers: str) -> Program:
    """`outbox relay` with the settings that everybody gets."""
    environment = {"DATABASE_URL": url, "KAFKA_BOOTSTRAP_SERVERS": servers}
    return Program("relay", [OUTBOX, "relay"], environment)
