"""One server process: started in a session of its own, stopped by pid, killed with all its children.

The session is its own so that Ctrl-C in a terminal reaches our program only, which then stops its servers
last, after its own work has drained. Each process has a `guard` for the case that our program is killed.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

try:
    import psutil
except ImportError as error:
    raise ImportError("outbox.embedded needs psutil; install it: pip install 'sagabox[embedded]'") from error

from outbox.embedded.guard import Guard
from outbox.errors import OutboxError

STOP_TIMEOUT_SECONDS: Final = 15.0
KILL_TIMEOUT_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.01
_LOG_TAIL_BYTES: Final = 4_000
_PORT_ATTEMPTS_MAX: Final = 200


class EmbeddedServerError(OutboxError):
    """An embedded server did not start, stop or answer; the text carries the end of its log."""


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that no outgoing connection can take.

    A server that is killed and restarted on its port must find it free again. Were it in the range that
    outgoing connections are given, another program's connection could take it meanwhile; a client that
    retries could even connect to itself.
    """
    for _ in range(_PORT_ATTEMPTS_MAX):
        port = 15_000 + secrets.randbelow(17_000)  # `random` may be seeded, and alike in two test runs
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise EmbeddedServerError("no free port between 15000 and 32000; stop some servers")


class ServerProcess:
    """A child process with a directory of its own, in which its log lies.

    Attributes:
        directory: removed by `dispose`.
        log: what the server wrote to its output, over all its lives.
    """

    def __init__(self, name: str, directory: Path, *, last_signal: signal.Signals = signal.SIGKILL) -> None:
        """Nothing runs yet. `last_signal` ends the server if our own process is killed."""
        self.name = name
        self.directory = directory
        self.log = directory / f"{name}.log"
        self._last_signal = last_signal
        self._child: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._child is not None and self._child.poll() is None

    @property
    def exit_status(self) -> int | None:
        """How it ended, a signal as its negative number; None while it runs, or before."""
        return None if self._child is None else self._child.poll()

    @property
    def pid(self) -> int:
        """The process's number.

        Raises:
            EmbeddedServerError: it is not running.
        """
        if self._child is None or self._child.poll() is not None:
            raise EmbeddedServerError(f"{self.name} is not running; call start()")
        return self._child.pid

    def spawn(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str],
        popen_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Start it; it may not be ready when this returns."""
        assert not self.running, f"{self.name} runs already"
        if self._guard is None:
            self._guard = Guard(self.directory)
        with self.log.open("ab") as output:
            self._child = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                cwd=self.directory,
                start_new_session=True,
                **(popen_options or {}),
            )
        self._guard.watch(self._child.pid, self._last_signal)

    def await_ready(self, is_ready: Callable[[], bool], *, timeout_seconds: float) -> None:
        """Return when `is_ready` says so.

        Raises:
            EmbeddedServerError: the process ended, or time ran out; it is killed then.
        """
        deadline = time.monotonic() + timeout_seconds
        while not is_ready():
            if not self.running:
                raise EmbeddedServerError(
                    f"{self.name} ended with status {self.exit_status} while starting:\n{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                self.kill()
                raise EmbeddedServerError(f"{self.name} was not ready after {timeout_seconds} s:\n{self.log_tail()}")
            time.sleep(_POLL_SECONDS)

    def stop(self, *signals: signal.Signals, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> None:
        """Send the signals in turn until one has ended the process; SIGKILL is the last resort."""
        for number in signals:
            if self._child is None or self._child.poll() is not None:
                return
            self._child.send_signal(number)
            try:
                self._child.wait(timeout_seconds)
            except subprocess.TimeoutExpired:
                continue
        self.kill()

    def kill(self) -> None:
        """SIGKILL for the process and all its descendants, at one moment as far as they can tell.

        The process is frozen first, so it can neither start another child nor see one die.
        """
        if self._child is None or self._child.poll() is not None:
            return
        family = psutil.Process(self._child.pid)
        os.kill(self._child.pid, signal.SIGSTOP)
        children = family.children(recursive=True)
        for process in [*children, family]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._child.wait(KILL_TIMEOUT_SECONDS)
        deadline = time.monotonic() + KILL_TIMEOUT_SECONDS
        while any(_alive(child) for child in children):
            if time.monotonic() > deadline:
                raise EmbeddedServerError(f"children of {self.name} survive SIGKILL; see dmesg")
            time.sleep(_POLL_SECONDS)

    def dispose(self) -> None:
        """Remove the directory and send the guard home. The process must have ended."""
        assert not self.running, f"{self.name} still runs"
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._guard is not None:
            self._guard.release()
            self._guard = None
        self._child = None

    def log_tail(self) -> str:
        """The end of the server's log, for error texts."""
        try:
            return self.log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError as error:
            return f"(no log: {error})"


def _alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that waits for its parent to notice has let go of everything."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
