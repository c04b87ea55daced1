"""kill -9 of the relay at every crash site, under load: nothing lost, nothing out of order, duplicates within P4.

A site is a SQL statement or a Kafka call; it has two sides: before it is sent, and after its effect when the reply is
lost. One history runs through all kills of a group of sites and is compared with the truth at its end.
"""

import asyncio
import random
from collections.abc import Mapping
from itertools import groupby
from typing import Final
from uuid import uuid4

import pytest

import outbox
from outbox import Pool, crash_sites, parking
from outbox.crash_sites import Side
from outbox.relay import release, restore
from tests.support.checker import Anomaly
from tests.support.faults import Fault, eventually
from tests.support.history import topic_reader
from tests.support.kafka_server import create_topic
from tests.support.relay_process import EXIT_REFUSED, RelayProcess, Relays
from tests.support.writers import Writers, identify

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
_PARKING: Final = {
    "outbox.relay.window.park",
    "outbox.relay.window.released",
    *(statement.name for statement in release.SQL),
}
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
        if fault.site in _PARKING:
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
        """A relay that nobody kills finishes, parked keys included; then the history is compared with the truth."""
        relay = self.start(refused_prefix=None)
        await parking.retry_all(self.pool)
        await eventually(self._nothing_is_parked, what="all parked keys are free")
        bound = self.kills * WINDOWS_IN_FLIGHT * WINDOW_MAX_EVENTS
        verdict = await self.writers.judge(self.servers, duplicates_max=bound)
        assert await relay.terminate() == 0, relay.log
        assert verdict.valid, verdict.explain()

    def start(self, fault: Fault | None = None, refused_prefix: str | None = "poison") -> RelayProcess:
        return self.relays.start(
            self.url,
            self.servers,
            fault=fault,
            refused_prefix=refused_prefix,
            window_max_events=WINDOW_MAX_EVENTS,
            windows_in_flight=WINDOWS_IN_FLIGHT,
        )

    async def _idles(self, relay: RelayProcess) -> bool:
        return relay.exited.is_set() or bool(await self.pool.fetchval(f"select exists (select {_IDLE})"))

    async def _knock_until_dead(self, relay: RelayProcess, fault: Fault) -> None:
        """Write whenever the relay idles, which wakes it, and have parked keys tried again."""
        for _ in range(40):
            await eventually(lambda: self._idles(relay), what=f"the relay idles or is dead: {fault}\n{relay.log}")
            if relay.exited.is_set():
                return
            await self.writers.write(self._rng)
            await parking.retry_all(self.pool)

    async def _nothing_is_parked(self) -> bool:
        return not await self.pool.fetchval("select exists (select from outbox.parked_keys)")

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

    Seen red: the broken variants in the next test.
    """
    scene = Scene(log_pool, database, broker, topic, relays)
    await scene.prepare()
    for site in GROUPS[group]:
        for side in SIDES:
            await scene.kill_at(Fault(site, side))
    await scene.judge()


MUTANTS_AND_FAULTS: Final[Mapping[str, tuple[Fault, set[Anomaly]]]] = {
    "done_before_acknowledged": (Fault("kafka.send", "before", "hang"), {Anomaly.LOST}),
    "no_replay": (Fault("kafka.send", "before"), {Anomaly.LOST}),
    "publish_before_logged": (Fault("outbox.relay.window.log", "before"), set()),
}
"""Where to crash, and what the checker must find; the last is found by the successor's restore guard."""


@pytest.mark.parametrize("rule", ["kept", "removed"])
@pytest.mark.parametrize("mutant", MUTANTS_AND_FAULTS)
async def test_a_relay_without_the_rule_is_found_out(
    log_pool: Pool, database: str, broker: str, topic: str, relays: Relays, mutant: str, rule: str
) -> None:
    """The negative controls of the sweep: one crash, one rule less, and the checker names the anomaly.

    A writer has its position and commits only after the crash, so that a window that is read again differs.
    """
    await create_topic(broker, topic, partitions=1)
    writers = Writers(log_pool, topic)
    await writers.set_up()
    fault, expected = MUTANTS_AND_FAULTS[mutant]
    async with log_pool.acquire() as late, outbox.transaction(late) as tx:
        await late.execute("insert into accounts (key) values ('late')")
        async with outbox.transaction(late) as inner:
            await writers.change(inner, "late")
        await writers.burst(6)
        broken = mutant if rule == "removed" else None
        relay = relays.start(database, broker, fault=fault, mutant=broken)
        if fault.action == "hang":
            await eventually(lambda: _logged(log_pool, 1), what="the first window is logged")
            await writers.burst(6)
            await eventually(lambda: _logged(log_pool, 2), what="the second window is logged")
            await relay.kill()
        assert await relay.wait() == -9, relay.log
        assert tx
    successor = relays.start(database, broker, mutant=broken)
    if broken and not expected:
        assert await successor.wait() == EXIT_REFUSED
        return
    await eventually(lambda: _settled(log_pool), what="the successor has done everything and idles")
    async with topic_reader(broker, topic) as reader:
        verdict = await writers.compare(await reader.records(identify), reader, duplicates_max=100)
    found = {anomaly for anomaly, finding in verdict.findings.items() if finding.count}
    assert found >= expected if broken else not found, verdict.explain()
    assert await successor.terminate() == 0


async def _logged(pool: Pool, number: int) -> bool:
    return bool(await pool.fetchval("select max(window_no) >= $1 from outbox.windows", number))


async def _settled(pool: Pool) -> bool:
    return bool(
        await pool.fetchval(
            f"""select exists (select {_IDLE}) and s.done_through = (select max(window_no) from outbox.windows)
                   and s.lease_epoch > 1 from outbox.shards s"""
        )
    )


def test_every_site_of_the_relay_is_killed_at() -> None:
    """The sweep knows all sites: a new statement or call joins it by itself, if not named above."""
    assert set(SITES) | _ADOPTION | _SELDOM == {
        name for name in crash_sites.sites() if name.startswith(("outbox.relay.", "kafka."))
    }
    assert {name for names in GROUPS.values() for name in names} == set(SITES)
    assert len(SITES) > 25


@pytest.mark.faults
@pytest.mark.timeout(900)
async def test_relay_killed_at_random_under_load(
    log_pool: Pool, database: str, broker: str, topic: str, relays: Relays
) -> None:
    """Forty kills at any moment, each lease left to run out, two relays at a time, writers never waiting."""
    scene = Scene(log_pool, database, broker, topic, relays)
    await scene.prepare()
    rng = random.Random(11)
    fleet = [scene.start(), scene.start()]
    for kill in range(40):
        scene.writers.seed = kill
        logged = await log_pool.fetchval("select coalesce(max(window_no), 0) from outbox.windows")
        goal = logged + rng.randint(1, 6)

        async def grown(goal: int = goal) -> bool:
            return bool(await log_pool.fetchval("select max(window_no) >= $1 from outbox.windows", goal))

        load = asyncio.create_task(scene.writers.run(writers=4, transactions=15))
        await eventually(grown, what=f"window {goal} is logged")
        victim = fleet.pop(rng.randrange(2))
        await victim.kill()
        scene.kills += 1
        fleet.append(scene.start())
        await load
    for relay in fleet:
        assert await relay.terminate() == 0, relay.log
    await scene.judge()
