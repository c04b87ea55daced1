"""The step of a peer's workflow and its clock. A peer's environment has the standard library and the peer alone."""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 3
LOOK_SECONDS = 0.002


@dataclass(frozen=True)
class Order:
    """What a process is told to do."""

    url: str
    concurrent: int
    """Workflows at a time, in this process."""
    connections: int
    count: int
    """Workflows of this process."""
    number: int
    """Of this process, from 1 on; the one before has warmed up when this one starts."""
    processes: int
    go: Path
    """A file: the clock starts when it is there."""

    @classmethod
    def read(cls) -> "Order":
        """From the command line."""
        url, *numbers, go = sys.argv[1:]
        concurrent, connections, count, number, processes = map(int, numbers)
        return cls(url, concurrent, connections, count, number, processes, Path(go))


@dataclass
class Clock:
    """When steps begin and end, as `benchmarks.sagas.Clock`, and how long all of it took."""

    ended: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    began: float = 0.0
    cpu: float = 0.0

    def work(self, order: str, number: int) -> str:
        """A step: nothing but a look at the clock."""
        now = time.perf_counter()
        if (ended := self.ended.pop(order, None)) is not None:
            self.gaps.append(now - ended)
        if number < STEPS:
            self.ended[order] = time.perf_counter()
        return f"done {number}"

    def begin(self, go: Path) -> None:
        """All before was warming up; waits until the other processes have done so too."""
        print("ready", flush=True)
        while not go.exists():
            time.sleep(LOOK_SECONDS)
        self.gaps.clear()
        self.began, self.cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Say what it took since then, as the last line of output; times are those of the machine's clock."""
        ended, cpu, gaps = time.perf_counter(), time.process_time() - self.cpu, sorted(self.gaps)
        p50, p99 = (gaps[int(share * (len(gaps) - 1))] for share in (0.5, 0.99))
        found: dict[str, Any] = {"began": self.began, "ended": ended, "cpu": cpu, "p50": p50, "p99": p99}
        print(json.dumps(found), flush=True)
