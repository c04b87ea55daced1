"""Watches the cache from outside: how long a commit takes to show there, and that no row ever goes back.

Run as a process: `python -m examples.agents.observer --report FILE`, until SIGTERM.

Latency is from the moment COMMIT returned to the writer to the moment a reader of the cache's table sees the row, on
one clock. A probe starts every 25 ms, whether or not the earlier ones have arrived: one that waited for them would look
away just when things are slow. The reader looks every 2 ms, so figures are up to that much too high.
"""

import argparse
import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import asyncpg

import outbox
from examples.agents import agent_service
from examples.agents.traffic import POPULAR

PROBE_SECONDS: Final = 0.025
LOOK_SECONDS: Final = 0.002
SAMPLE_SECONDS: Final = 0.050
OVERDUE_SECONDS: Final = 10.0

NAMES: Final = "select agent_id, agent_name from workflow_agent_cache where agent_id = any($1::uuid[])"


class Observer:
    """Probes in flight, latencies of those that arrived, and samples of the agents that change most."""

    def __init__(self, owner: outbox.Pool, cache: outbox.Pool) -> None:
        self.latencies: list[tuple[float, float]] = []
        """When the probe's commit returned, and how long its row took to show from there."""
        self.samples: list[tuple[str, str | None]] = []
        self.overdue = 0
        self._owner = owner
        self._cache = cache
        self._probes = 0
        self._idle: list[UUID] = []
        self._awaited: dict[UUID, tuple[str, float]] = {}

    async def probe(self) -> None:
        """One probe: a change of an agent that no other probe is using."""
        self._probes += 1
        name = f"probe {self._probes}"
        async with self._owner.acquire() as connection:
            if self._idle:
                agent_id = self._idle.pop()
                await agent_service.rename(connection, agent_id, name)
            else:
                agent_id = uuid4()
                await agent_service.create(connection, agent_id, name)
            self._awaited[agent_id] = (name, time.perf_counter())

    async def look(self) -> None:
        """Find the probes that have arrived."""
        seen = {row["agent_id"]: row["agent_name"] for row in await self._cache.fetch(NAMES, list(self._awaited))}
        now = time.perf_counter()
        for agent_id, (name, committed_at) in list(self._awaited.items()):
            if seen.get(agent_id) == name:
                self.latencies.append((committed_at, now - committed_at))
                self._idle.append(agent_id)
            elif now - committed_at > OVERDUE_SECONDS:
                self.overdue += 1
            else:
                continue
            del self._awaited[agent_id]

    async def sample(self) -> None:
        """What the cache shows of the popular agents now."""
        seen = {row["agent_id"]: row["agent_name"] for row in await self._cache.fetch(NAMES, POPULAR)}
        self.samples += [(str(agent_id), seen.get(agent_id)) for agent_id in POPULAR]

    async def run(self, stop: asyncio.Event) -> None:
        """Until told to stop and every probe has arrived or is overdue."""
        async with asyncio.TaskGroup() as tasks:
            probing = tasks.create_task(self._probe_until(stop, tasks))
            sampling = tasks.create_task(self._sample_until(stop))
            while not (probing.done() and sampling.done()) or self._awaited:
                if self._awaited:
                    await self.look()
                await asyncio.sleep(LOOK_SECONDS)

    async def _probe_until(self, stop: asyncio.Event, tasks: asyncio.TaskGroup) -> None:
        running = set()
        while not await _set_within(stop, PROBE_SECONDS):
            probe = tasks.create_task(self.probe())
            running.add(probe)
            probe.add_done_callback(running.discard)
        await asyncio.gather(*running)

    async def _sample_until(self, stop: asyncio.Event) -> None:
        while not await _set_within(stop, SAMPLE_SECONDS):
            await self.sample()


async def _set_within(stop: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await stop.wait()
    except TimeoutError:
        return False


async def main() -> dict[str, object]:
    """Watch until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with (
        asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=1, max_size=8) as owner,
        asyncpg.create_pool(os.environ["CACHE_DATABASE_URL"], min_size=2, max_size=2) as cache,
    ):
        observer = Observer(owner, cache)
        await observer.run(stop)
    return {"latencies": observer.latencies, "overdue": observer.overdue, "samples": observer.samples}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", type=Path, required=True, help="file for latencies and samples")
    options = parser.parse_args()
    options.report.write_text(json.dumps(asyncio.run(main())))
