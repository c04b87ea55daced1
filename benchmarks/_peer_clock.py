"""The step of a peer's workflow and its clock. A peer's environment has the standard library and the peer alone."""

import json
import time

STEPS = 3


class Clock:
    """When steps begin and end, as `benchmarks.sagas.Clock`, and how long all of it took."""

    def __init__(self) -> None:
        """Not running yet."""
        self._ended: dict[str, float] = {}
        self._gaps: list[float] = []
        self._began = 0.0
        self._cpu = 0.0

    def work(self, order: str, number: int) -> str:
        """A step: nothing but a look at the clock."""
        now = time.perf_counter()
        if (ended := self._ended.pop(order, None)) is not None:
            self._gaps.append(now - ended)
        if number < STEPS:
            self._ended[order] = time.perf_counter()
        return f"done {number}"

    def begin(self) -> None:
        """All before was warming up."""
        self._gaps.clear()
        print("begin", flush=True)
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Say what it took since then, as the last line of output."""
        took, cpu, gaps = time.perf_counter() - self._began, time.process_time() - self._cpu, sorted(self._gaps)
        p50, p99 = (gaps[int(share * (len(gaps) - 1))] for share in (0.5, 0.99))
        print(json.dumps({"seconds": took, "cpu_seconds": cpu, "step_p50": p50, "step_p99": p99}), flush=True)
