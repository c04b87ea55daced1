"""Workers in processes of their own, which can be stopped, killed, and told where to crash.

`python -m tests.support.saga_process ORDER` runs one; `make` is what `saga worker --app` is given.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any, Final, cast

import asyncpg
import psutil

from outbox import Pool
from saga.lease import Heartbeat
from saga.settings import Settings
from saga.worker import Worker
from tests.support.faults import Fault, Injector, eventually
from tests.support.saga_worker import QUICK, Service, approved, both, packed, recorded, settled, shop

_ROOT: Final = Path(__file__).parents[2]
SETTINGS: Final = QUICK
SAGAS: Final = (shop, packed, both, approved, recorded, settled)


def make(pool: Pool, settings: Settings) -> Worker:
    return Worker(pool, settings.kafka, *SAGAS, deps=Service(pool), settings=settings)


@dataclass
class WorkerProcess:
    """One worker."""

    process: "Popen[bytes]"

    async def ended(self) -> int:
        """How it ended, once it has."""

        async def look() -> bool:
            return self.process.poll() is not None

        await eventually(look, what="the worker ended")
        assert self.process.returncode is not None
        return self.process.returncode

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def stopped(self) -> None:
        """Wait until SIGSTOP has stopped it."""

        async def look() -> bool:
            return psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED

        await eventually(look, what="the worker is stopped")


@contextmanager
def worker_process(
    url: str, fault: Fault | None = None, *, without: str | None = None, **settings: Any
) -> Iterator[WorkerProcess]:
    """A worker of all sagas of `saga_worker`, killed at the end at the latest; `without`: a rule that it breaks."""
    order = json.dumps(
        {
            "url": url,
            "fault": asdict(fault) if fault else None,
            "without": without,
            "settings": {**QUICK.model_dump(include=_QUICK), **settings},
        }
    )
    with Popen([sys.executable, "-m", "tests.support.saga_process", order], cwd=_ROOT) as process:
        try:
            yield WorkerProcess(process)
        finally:
            process.kill()


_QUICK: Final = {"worker_lease_seconds", "idle_after_seconds"}


async def _main(order: Mapping[str, Any]) -> None:
    if order["without"] == "lease check":
        cast("Any", Heartbeat).check = lambda _self: None
    fault = Fault(**order["fault"]) if order["fault"] else None
    Injector(fault).install()
    async with (
        asyncpg.create_pool(order["url"], min_size=1, max_size=12) as pool,
        make(pool, Settings(**order["settings"])) as worker,
    ):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        await worker.run()


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))
