"""kill -9 of the relay at every crash site, under load: nothing lost, nothing out of order, duplicates within P4.

A site is a SQL statement or a Kafka call; it has two sides: before it is sent, and after its effect when the reply is
lost. One history runs through all kills of a group of sites and is compared with the truth at its end.
"""

import random
from itertools import groupby
from typing import Final
from uuid import uuid4

import pytest

import outbox
from outbox import Pool, crash_sites
from outbox.crash_sites import Side
from outbox.relay import restore
from tests.support.faults import Fault, eventually
from tests.support.kafka_server import create_topic
from tests.support.relay_process import RelayProcess, Relays
from tests.support.writers import Writers

pytestmark = pytest.mark.crash

WINDOW_MAX_EVENTS: Final = 12
WINDOWS_IN_FLIGHT: Final = 2
SIDES: Final[tuple[Side, ...]] = ("before", "after")
_ADOPTION: Final = {
    statement.name
    for statement in restore.SQL
    if statement.name.rpartition(".")[2] not in {"standby", "identity", "last_windows"}
}
"""Sites that only `adopt` passes; see test_relay_restore."""
_SELDOM: Final = {"outbox.relay.window.forget"}
"""Once in `limits.WINDOWS_KEPT` windows, a statement of its own that deletes what is done."""
SITES: Final = tuple(
    name
    for name in crash_sites.sites()
    if name.startswith(("outbox.relay.", "kafka.")) and name not in _ADOPTION | _SELDOM
)
GROUPS: Final = {
    group: tuple(names) for group, names in groupby(SITES, key=lambda name: name.removeprefix("outbox.").split(".")[-2])
}
_NEW_TOPIC: Final = {"kafka.partitions", "kafka.limit", "outbox.relay.topics.pin"}
_ENDING: Final = {"outbox.relay.lease.release", "kafka.stop", "outbox.relay.window.done"}
_IDLE: Final = "from pg_locks where locktype = 'advisory' and classid = 1868724273 and mode = 'ExclusiveLock'"


class Scene:
    """One database, one topic, and what makes a relay pass each of its sites."""

    def __init__(self, pool: Pool, url: str, servers: str, topic: str, relays: Relays) -> None:
        self.pool, self.url, self.servers, self.relays = pool, url, servers, relays
        self.writers = Writers(pool, topic)
        self.kills = 0
        self._rng = random.Random(7)

    async def prepare(self) -> None:
        await create_topic(self.servers, self.writers.topic, partitions=3)
        await self.writers.set_up()

    async def kill_at(self, fault: Fault) -> None:
        """Run a relay until it dies there, over a backlog, under load, in quiet, and at its end."""
        await self.writers.burst(2 * WINDOW_MAX_EVENTS)
        if fault.site in _NEW_TOPIC:
            await self._emit_to_another_topic()
        if fault.site == "outbox.relay.window.park":
            await self._poison()
        if fault.site == "outbox.relay.window.replay":
            await self.kill_at(Fault("kafka.send", "before"))  # which leaves something to replay
        if fault.site == "kafka.tail":
            await self.pool.execute("update outbox.shards set next_offsets = '{}'")  # as a late done marker leaves it
        relay = self.start(fault)
        await self.writers.run(writers=3, transactions=2)
        if fault.site in _ENDING:
            await eventually(lambda: self._idles(relay), what=f"the relay idles before {fault}")
            await relay.terminate()
        await self._knock_until_dead(relay, fault)
        assert relay.status == -9, f"{fault} did not happen:\n{relay.log}"
        self.kills += 1
        # What waiting for a second does.
        await self.pool.execute("update outbox.shards set lease_until = clock_timestamp()")

    async def judge(self) -> None:
        """A relay that nobody kills finishes; then the whole history is compared with the truth."""
        relay = self.start()
        bound = self.kills * WINDOWS_IN_FLIGHT * WINDOW_MAX_EVENTS
        verdict = await self.writers.judge(self.servers, duplicates_max=bound)
        assert await relay.terminate() == 0, relay.log
        assert verdict.valid, verdict.explain()

    def start(self, fault: Fault | None = None) -> RelayProcess:
        return self.relays.start(
            self.url,
            self.servers,
            fault=fault,
            refused_prefix="poison",
            window_max_events=WINDOW_MAX_EVENTS,
            windows_in_flight=WINDOWS_IN_FLIGHT,
        )

    async def _idles(self, relay: RelayProcess) -> bool:
        return relay.exited.is_set() or bool(await self.pool.fetchval(f"select exists (select {_IDLE})"))

    async def _knock_until_dead(self, relay: RelayProcess, fault: Fault) -> None:
        """Write whenever the relay idles, which wakes it."""
        for _ in range(40):
            await eventually(lambda: self._idles(relay), what=f"the relay idles or is dead: {fault}\n{relay.log}")
            if relay.exited.is_set():
                return
            await self.writers.write(self._rng)

    async def _poison(self) -> None:
        key = f"poison-{uuid4().hex[:8]}"
        await self.pool.execute("insert into accounts (key) values ($1)", key)
        await self.writers.burst(2, key)

    async def _emit_to_another_topic(self) -> None:
        other = Writers(self.pool, f"{self.writers.topic}-{uuid4().hex[:6]}")
        await create_topic(self.servers, other.topic)
        async with outbox.transaction(self.pool) as tx:
            tx.emit(other.event(key="side", identity="side"))


@pytest.mark.parametrize("group", GROUPS)
async def test_relay_killed_at_every_site(
    log_pool: Pool, database: str, broker: str, topic: str, relays: Relays, group: str
) -> None:
    """P2, P3, P4 over `kill -9` at each site of a group, both sides.

    Seen red: publish before the window is logged; `done` reported before the acknowledgement; the cursor moved by an
    empty read; `replay` that leaves windows out (see test_relay_mutants).
    """
    scene = Scene(log_pool, database, broker, topic, relays)
    await scene.prepare()
    for site in GROUPS[group]:
        for side in SIDES:
            await scene.kill_at(Fault(site, side))
    await scene.judge()


def test_every_site_of_the_relay_is_killed_at() -> None:
    """The sweep knows all sites: a new statement or call joins it by itself, if not named above."""
    assert set(SITES) | _ADOPTION | _SELDOM == {
        name for name in crash_sites.sites() if name.startswith(("outbox.relay.", "kafka."))
    }
    assert {name for names in GROUPS.values() for name in names} == set(SITES)
    assert len(SITES) > 25
