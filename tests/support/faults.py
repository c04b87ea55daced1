"""Faults on demand, and waiting for states.

A `Fault` names a crash site, a side, a visit and what happens there. Tests never sleep: they wait for a state with
`eventually`, which has a bound.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import psutil

from outbox import crash_sites, kafka
from outbox.crash_sites import Side

T = TypeVar("T")
Action = Literal["kill", "stop", "hang", "disconnect"]

WAIT_TIMEOUT_SECONDS: Final = 20.0
_LOOK_AGAIN_SECONDS: Final = 0.01


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at the n-th visit of one side of a crash site."""

    site: str
    side: Side
    action: Action = "kill"
    visit: int = 1

    def __str__(self) -> str:
        return f"{self.action} {self.side} {self.site}" + (f" #{self.visit}" if self.visit > 1 else "")


@dataclass(slots=True)
class Injector:
    """The hook of a process that is to fail; notes every first visit, so that the suite knows what it reached."""

    fault: Fault | None = None
    visits_file: Path | None = None
    seen: dict[tuple[str, str], int] = field(default_factory=dict)

    async def __call__(self, site: str, side: Side) -> None:
        """See `crash_sites.hook`."""
        count = self.seen[site, side] = self.seen.get((site, side), 0) + 1
        if count == 1 and self.visits_file is not None:
            _append(self.visits_file, f"{site} {side}\n")
        fault = self.fault
        if fault is None or (fault.site, fault.side, fault.visit) != (site, side, count):
            return
        if self.visits_file is not None:
            _append(self.visits_file, f"fired {fault}\n")
        match fault.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                await asyncio.Event().wait()
            case "disconnect":
                raise ConnectionResetError(f"injected: {fault}")

    def install(self) -> None:
        """Become the hook of this process."""
        crash_sites.hook = self


def _append(path: Path, line: str) -> None:
    # One write of an O_APPEND file: it survives SIGKILL, and processes do not tear each other's lines.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


class _SuspectBatch:
    """A batch that knows whether it holds a key which the broker is to refuse."""

    def __init__(self, real: kafka.Batch, prefix: bytes) -> None:
        self.real = real
        self.prefix = prefix
        self.guilty = False

    def append(self, *, key: bytes, **fields: Any) -> object | None:
        added = self.real.append(key=key, **fields)
        self.guilty |= added is not None and key.startswith(self.prefix)
        return added

    def record_count(self) -> int:
        return self.real.record_count()


def refuse_keys(prefix: str) -> Callable[[], None]:
    """Refuse, in this process, batches that hold a key with this prefix, as a broker with a record limit does.

    Returns how to stop.
    """
    make_batch: Any = kafka.Producer.batch
    send: Any = kafka.Producer.send

    def batch(self: kafka.Producer, *, is_compressed: bool = True) -> _SuspectBatch:
        return _SuspectBatch(make_batch(self, is_compressed=is_compressed), prefix.encode())

    async def checked_send(self: kafka.Producer, batch: Any, topic: str, partition: int) -> int:
        if batch.guilty:
            raise kafka.UNPUBLISHABLE[0]
        offset: int = await send(self, batch.real, topic, partition)
        return offset

    producer: Any = kafka.Producer
    producer.batch, producer.send = batch, checked_send

    def restore() -> None:
        producer.batch, producer.send = make_batch, send

    return restore


async def eventually(
    look: Callable[[], Awaitable[T]], *, what: str, timeout_seconds: float = WAIT_TIMEOUT_SECONDS
) -> T:
    """What `look` sees, as soon as it sees something true.

    Raises:
        AssertionError: it did not, in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while not (seen := await look()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_seconds} s, last seen {seen!r}"
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)
    return seen


async def stopped(pid: int, *, timeout_seconds: float = WAIT_TIMEOUT_SECONDS) -> None:
    """Wait until SIGSTOP has stopped a process."""

    async def look() -> bool:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED

    await eventually(look, what=f"process {pid} stopped", timeout_seconds=timeout_seconds)
