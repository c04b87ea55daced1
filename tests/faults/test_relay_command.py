"""kill -9 of `outbox relay`, the command itself with the settings that everybody gets, under 2,000 events a second.

Proven: a standby, or the same command started again at once, has caught up within ten seconds of the kill; the history
is valid, with at most `windows_in_flight` x `window_max_events` duplicates a kill.
"""

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import pytest

from outbox import clock, limits
from outbox.upkeep import status
from tests.support.faults import eventually
from tests.support.program import Program, relay_command
from tests.support.relay_process import Relays
from tests.support.scene import Scene, Servers, scene

pytestmark = pytest.mark.crash

RATE: Final = 2_000.0
CAUGHT_UP_SECONDS: Final = 10.0
CAUGHT_UP_EVENTS: Final = RATE / 4
"""What may be on its way; status counts what is not known to be done."""
MODES: Final[Mapping[str, int]] = {"bulk": 24, "plain": 4, "savepoint": 2, "rolled_back": 1, "closed": 1}


@asynccontextmanager
async def commands(
    servers: Servers, relays: Relays, seed: int, count: int
) -> AsyncIterator[tuple[Scene, list[Program]]]:
    async with scene(servers, relays, seed, relay_count=0, key_count=400, rate=RATE) as run:
        run.load.modes = MODES
        run.window_events = limits.WINDOW_MAX_EVENTS
        assert limits.WINDOWS_IN_FLIGHT == 2
        programs = [relay_command(run.owner_url, run.bootstrap) for _ in range(count)]
        try:
            for program in programs:
                program.start()
            yield run, programs
        finally:
            for program in programs:
                program.dispose()


async def lease(run: Scene) -> tuple[int, float]:
    """Its epoch, and how many events lag behind."""
    [shard] = (await status.read(run.load.pool)).shards
    return shard.epoch, shard.lag_events


async def kill(run: Scene, programs: list[Program], *, standby: bool) -> float:
    """Kill the one that works; the seconds until another one has caught up."""
    epoch, _ = await lease(run)
    working = next(program for program in programs if re.search(rf"lease taken, epoch {epoch}\b", program.log))
    started = clock.monotonic()
    assert await asyncio.to_thread(working.kill) == -signal.SIGKILL
    run.failures += 1
    run.fired["command killed"] += 1
    if not standby:
        working.start()

    async def look() -> bool:
        present, lag = await lease(run)
        return present > epoch and lag <= CAUGHT_UP_EVENTS

    await eventually(look, what="caught up", timeout_seconds=CAUGHT_UP_SECONDS)
    took = clock.monotonic() - started
    if standby:
        working.start()
    return took


async def kill_again_and_again(servers: Servers, relays: Relays, seed: int, *, kills: int, standby: bool) -> None:
    async with commands(servers, relays, seed, 2 if standby else 1) as (run, programs):
        took = []
        async with run.under_load():
            began, before = clock.monotonic(), run.load.committed
            for _ in range(kills):
                await run.load.more(run.rng.randint(500, 4_000))
                took.append(await kill(run, programs, standby=standby))
            rate = (run.load.committed - before) / (clock.monotonic() - began)
        await run.verdict("command killed")
        sys.stdout.write(f"{rate:.0f} events/s; caught up after {', '.join(f'{t:.1f} s' for t in took)}\n")


async def test_a_standby_takes_over(servers: Servers, relays: Relays, seed: int) -> None:
    await kill_again_and_again(servers, relays, seed, kills=1, standby=True)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("standby", [True, False], ids=["standby", "restart"])
async def test_killed_again_and_again(servers: Servers, relays: Relays, seed: int, *, standby: bool) -> None:
    await kill_again_and_again(servers, relays, seed, kills=6, standby=standby)
