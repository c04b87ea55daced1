"""Processes of ours, one a role, so that each figure of CPU and memory belongs to one of them alone."""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

import psutil

_STOP_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.02
_LOG_TAIL_BYTES: Final = 3_000


class ProcessFailedError(RuntimeError):
    """A process of the benchmark ended too early or said nothing in time; its output is in the text."""


class Child:
    """One process, ended by its pid when the block ends; its CPU time and memory while it lives."""

    def __init__(self, name: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> None:
        """Start it; standard output and standard error go to files of our own."""
        self.name = name
        self._directory = tempfile.TemporaryDirectory(prefix=f"sagabox-bench-{name}-")
        self.output = Path(self._directory.name) / "output"
        self.log = Path(self._directory.name) / "log"
        with self.output.open("wb") as output, self.log.open("wb") as log:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env={**os.environ, **(environment or {})},
            )
        self._stats = psutil.Process(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._directory.cleanup()

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self._process.poll() is None

    def cpu_seconds(self) -> float:
        """User and system time of this process, without any other."""
        times = self._stats.cpu_times()
        return float(times.user + times.system)

    def rss_mib(self) -> float:
        """Resident memory."""
        return float(self._stats.memory_info().rss) / 2**20

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait(_STOP_SECONDS)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        if not self.running:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def check(self) -> None:
        """Fail loudly if it has ended by itself.

        Raises:
            ProcessFailedError: it has; with the end of its log.
        """
        if not self.running:
            raise ProcessFailedError(f"{self.name} ended with status {self._process.returncode}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")

    async def says(self, text: str, *, timeout_seconds: float, where: Path | None = None) -> None:
        """Wait until its output, or another file of its, contains a text.

        Raises:
            ProcessFailedError: it ended first, or said nothing in time.
        """
        deadline = time.monotonic() + timeout_seconds
        while text not in (where or self.output).read_text(errors="replace"):
            self.check()
            if time.monotonic() > deadline:
                raise ProcessFailedError(f"{self.name} did not say {text!r} in {timeout_seconds} s:\n{self.tail()}")
            await asyncio.sleep(_POLL_SECONDS)

    async def result(self, *, timeout_seconds: float) -> Any:
        """Wait for its end; the JSON in the last line of its output comes back.

        Raises:
            ProcessFailedError: it failed or took too long.
        """
        try:
            status = await asyncio.to_thread(self._process.wait, timeout_seconds)
        except subprocess.TimeoutExpired as error:
            raise ProcessFailedError(f"{self.name} took more than {timeout_seconds} s:\n{self.tail()}") from error
        if status != 0:
            raise ProcessFailedError(f"{self.name} ended with status {status}:\n{self.tail()}")
        return json.loads(self.output.read_text().splitlines()[-1])

    async def until_quiet(self, *, timeout_seconds: float = 30.0) -> None:
        """Wait until it has used next to no CPU for a while, that is, until starting is over.

        Raises:
            ProcessFailedError: it ended, or never came to rest.
        """
        deadline = time.monotonic() + timeout_seconds
        used, quiet = self.cpu_seconds(), 0
        while quiet < 3:
            await asyncio.sleep(0.1)
            self.check()
            now = self.cpu_seconds()
            quiet = quiet + 1 if now > 0.1 and now - used < 0.02 else 0
            used = now
            if time.monotonic() > deadline:
                raise ProcessFailedError(f"{self.name} did not come to rest in {timeout_seconds} s:\n{self.tail()}")


def module(name: str, arguments: list[str], environment: Mapping[str, str] | None = None) -> Child:
    """`python -m benchmarks.NAME ...` as a child."""
    return Child(name.strip("_"), [sys.executable, "-m", f"benchmarks.{name}", *arguments], environment)


def relay(database_url: str, kafka: str) -> Child:
    """The relay as its users run it: `outbox relay`, configured by the environment."""
    environment = {"DATABASE_URL": database_url, "KAFKA_BOOTSTRAP_SERVERS": kafka}
    script = Path(sys.executable).with_name("outbox")
    found = find_spec("outbox.cli")
    if script.exists() and found is not None and found.origin is not None:
        return Child("relay", [str(script), "relay"], environment)
    return module("_relay_process", [], environment)
