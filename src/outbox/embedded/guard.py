"""A watchman for one server: ends it, and removes its files, when our own process is gone.

A context manager cleans up after exceptions and signals, but nothing inside a process survives SIGKILL. So a
second, tiny process holds the read end of a pipe whose only write end is ours. End of file means that we are
gone, however that came about. (PR_SET_PDEATHSIG would be less machinery, but exists on Linux only and fires
when the *thread* that started the server ends, which kills servers started through `asyncio.to_thread`.)

This file is run as a script by a bare interpreter: standard library only, no imports from this package.
"""

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

GRACE_SECONDS = 5.0


class Guard:
    """Our side: tells the watchman what to end and what to remove."""

    def __init__(self, directory: Path) -> None:
        """Start the watchman; `directory` is removed if we vanish."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for us, not for the watchman
            cwd="/",
        )
        self._tell(f"remove {directory}")

    def watch(self, pid: int, signal_number: signal.Signals) -> None:
        """End this process with this signal, rather than the one named before."""
        self._tell(f"watch {pid} {int(signal_number)}")

    def release(self) -> None:
        """The server has been cleaned up in the ordinary way; nothing is left to do."""
        self._tell("done")
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody killed the watchman: nothing depends on it
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()


class _Target:
    """The process to end; held by descriptor where the system has those, as numbers are given out again."""

    def __init__(self, pid: int, signal_number: int) -> None:
        self.pid = pid
        self.signal_number = signal_number
        self.descriptor: int | None = None
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                self.descriptor = os.pidfd_open(pid)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            if sys.platform != "linux":
                os.kill(self.pid, self.signal_number)
                return
            if self.descriptor is None:
                return  # it was gone before we could take hold of it
            signal.pidfd_send_signal(self.descriptor, self.signal_number)
            ended, _, _ = select.select([self.descriptor], [], [], GRACE_SECONDS)
            if not ended:
                signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)


def _stand_watch() -> None:
    target: _Target | None = None
    directory: str | None = None
    for line in sys.stdin:
        order, _, rest = line.rstrip("\n").partition(" ")
        if order == "done":
            return
        if order == "remove":
            directory = rest
        elif order == "watch":
            pid, signal_number = rest.split()
            target = _Target(int(pid), int(signal_number))
    if target is not None:
        target.end()
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    _stand_watch()
