"""Each fault under load on Apache Kafka, with an idempotent producer: the exact checker finds a valid history.

Proven by each run, of which the seed is printed: nothing lost, no phantom, the first occurrences of each key in order,
duplicates within `windows_in_flight` x `window_max_events` a failure, no change applied twice, the cache equal to the
source row by row and never going backwards; a transaction in doubt committed as a whole or not at all; and the fault
did happen.
"""

import random

import pytest

from tests.support.relay_process import Relays
from tests.support.scene import FAULTS, Servers, scene

pytestmark = pytest.mark.crash

EACH = list(FAULTS)


@pytest.mark.parametrize("fault", EACH)
async def test_one_fault(servers: Servers, relays: Relays, seed: int, fault: str) -> None:
    async with scene(servers, relays, seed) as run:
        async with run.under_load():
            await run.load.more(run.rng.randint(50, 250))
            await run.strike(fault)
            await run.load.more(150)
        await run.verdict(fault)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", EACH)
async def test_a_fault_again_and_again(servers: Servers, relays: Relays, seed: int, fault: str) -> None:
    async with scene(servers, relays, seed, relay_count=2, rate=600.0) as run:
        async with run.under_load():
            for _ in range(5):
                await run.load.more(run.rng.randint(100, 900))
                await run.strike(fault)
            await run.load.more(500)
        await run.verdict(fault)


@pytest.mark.faults
@pytest.mark.timeout(900)
async def test_all_faults_in_random_order(servers: Servers, relays: Relays, seed: int) -> None:
    """Two relays, two consumers; the next fault does not wait for the recovery from the last one."""
    async with scene(servers, relays, seed, relay_count=2, follower_count=2, rate=600.0) as run:
        order = random.Random(seed).sample(EACH * 2, k=2 * len(EACH))
        async with run.under_load():
            for fault in order:
                await run.load.more(run.rng.randint(20, 600))
                await run.strike(fault)
            await run.load.more(500)
        await run.verdict(*EACH)
