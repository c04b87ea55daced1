"""The same sagas where they are not all in one process: a worker elsewhere, and two services side by side."""

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.processes import module
from benchmarks.report import Report
from benchmarks.saga_ground import Ground, Plan
from benchmarks.saga_takeover import until_alive
from benchmarks.sagas import THREE, add, measured

_CONCURRENT: Final = 200
_IN_FLIGHT: Final = 2_000
_SERVICES: Final = 2
_TIME_LIMIT_SECONDS: Final = 300.0


async def processes(ground: Ground, plan: Plan, report: Report) -> None:
    """Clients apart from the worker, 200 at a time; two services, together so many at a time."""
    report.section("Several processes, 3 steps")
    with module("_saga_worker", [ground.url, str(_IN_FLIGHT)]):
        await until_alive(ground.pool, 1)
        found = await measured(ground, THREE, plan.sagas, _CONCURRENT)
        add(report, "apart", "apart_", _CONCURRENT, found)
    for concurrent in plan.concurrent:
        await _services(ground, plan, report, concurrent)


async def _services(ground: Ground, plan: Plan, report: Report, concurrent: int) -> None:
    """Clients and a worker in each of two processes, which share the sagas."""
    with ExitStack() as stack:
        go = Path(stack.enter_context(TemporaryDirectory(prefix="sagabox-bench-"))) / "go"
        arguments = [ground.url, str(concurrent // _SERVICES), str(plan.sagas // _SERVICES), str(go)]
        children = [stack.enter_context(module("_saga_service", arguments)) for _ in range(_SERVICES)]
        for child in children:
            await child.says("ready", timeout_seconds=_TIME_LIMIT_SECONDS)
        go.touch()
        times = [await child.result(timeout_seconds=_TIME_LIMIT_SECONDS) for child in children]
    took = max(time["ended"] for time in times) - min(time["began"] for time in times)
    report.add(f"two_services_per_second_c{concurrent}", plan.sagas / took, "sagas/s", plan.sagas)
