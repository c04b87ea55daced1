"""Two databases, Kafka, relays, consumers and a load, and the faults that befall them.

A fault is a method of `Scene`: it strikes, waits until its effect is a fact (another start time of the server, the
exit code of a process, another owner of the lease), and only then counts itself in `fired`. What the relay may answer
with duplicates also adds to `failures`, because the bound on duplicates is one for each failure.
"""

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from uuid import uuid4

import asyncpg

from outbox import Pool, retry
from outbox.embedded import Postgres
from outbox.upkeep import migrate
from tests.support.checker import Verdict
from tests.support.faults import Fault, eventually, stopped
from tests.support.follower import follower
from tests.support.kafka_server import RealKafka, create_topic
from tests.support.load import CACHE_TABLES, Load, applied_twice
from tests.support.program import Program
from tests.support.relay_process import RelayProcess, Relays

PARTITIONS: Final = 4
WINDOW_EVENTS: Final = 100
WINDOWS_IN_FLIGHT: Final = 2
RELAY: Final[dict[str, Any]] = {
    "lease_seconds": 2.0,
    "window_max_events": WINDOW_EVENTS,
    "windows_in_flight": WINDOWS_IN_FLIGHT,
    "publish_timeout_seconds": 3.0,
}
_RECOVERY_TIMEOUT_SECONDS: Final = 60.0
_SUPERVISE_SECONDS: Final = 0.2


class Server(Protocol):
    """What PostgreSQL and Kafka have in common here."""

    def crash_restart(self) -> None:
        """SIGKILL, then start."""

    def restart(self) -> None:
        """Stop in order, then start."""

    @property
    def pid(self) -> int:
        """Another one after each start."""


@dataclass(slots=True)
class Servers:
    """The servers of a scene; shared by scenes, each of which has databases and a topic of its own."""

    owner: Postgres
    reader: Postgres
    kafka: RealKafka


@dataclass(slots=True)
class Scene:
    """One run."""

    servers: Servers
    relays: Relays
    owner_url: str
    load: Load
    cache_pool: Pool
    rng: random.Random
    running: list[RelayProcess] = field(default_factory=list)
    followers: list[Program] = field(default_factory=list)
    ended: list[RelayProcess] = field(default_factory=list)
    """Relays that ended by themselves."""
    fired: Counter[str] = field(default_factory=Counter)
    failures: int = 0
    window_events: int = WINDOW_EVENTS
    """What the relays were told, for the bound on duplicates."""

    @property
    def bootstrap(self) -> str:
        """Where Kafka is."""
        return self.servers.kafka.bootstrap_servers

    def start_relay(self, fault: Fault | None = None) -> RelayProcess:
        """One more relay."""
        relay = self.relays.start(self.owner_url, self.bootstrap, fault=fault, **RELAY)
        self.running.append(relay)
        return relay

    async def strike(self, name: str) -> None:
        """The fault of that name, once, and count it."""
        try:
            await FAULTS[name](self)
        except AssertionError as error:
            raise AssertionError(f"{name}, after {dict(self.fired)}: {error}\n{self.logs()}") from error
        self.fired[name] += 1

    @asynccontextmanager
    async def under_load(self) -> AsyncIterator[None]:
        """Write for the length of the block, which begins when the first changes have come all the way."""
        async with self.load.running(), self._supervised():

            async def look() -> bool:
                return bool(await self.cache_pool.fetchval("select exists (select from applications)"))

            await eventually(look, what="the first cached row", timeout_seconds=_RECOVERY_TIMEOUT_SECONDS)
            yield

    @asynccontextmanager
    async def _supervised(self) -> AsyncIterator[None]:
        """Start again what ends by itself, as a relay does that finds no database when it starts."""
        stopping = asyncio.Event()

        async def supervise() -> None:
            while not await retry.pause(_SUPERVISE_SECONDS, stopping):
                for relay in [relay for relay in self.running if relay.exited.is_set()]:
                    self.running.remove(relay)
                    self.ended.append(relay)
                    self.start_relay()

        task = asyncio.create_task(supervise())
        try:
            yield
        finally:
            stopping.set()
            await task

    # --------------------------------------------------------------------------------------------- faults

    async def _restarted(self, server: Server, how: Callable[[], None]) -> None:
        before = server.pid
        await asyncio.to_thread(how)
        assert server.pid != before, "it is still the same process"

    async def owner_crashes(self) -> None:
        """SIGKILL of the database that has the log; commits are in doubt, the relay's among them."""
        self.failures += 1
        await self._restarted(self.servers.owner, self.servers.owner.crash_restart)

    async def owner_restarts(self) -> None:
        """An ordered stop, which ends every connection, and a start."""
        self.failures += 1
        await self._restarted(self.servers.owner, self.servers.owner.restart)

    async def reader_crashes(self) -> None:
        """SIGKILL of the database that has the cache."""
        await self._restarted(self.servers.reader, self.servers.reader.crash_restart)

    async def reader_restarts(self) -> None:
        """An ordered stop and start of the database that has the cache."""
        await self._restarted(self.servers.reader, self.servers.reader.restart)

    async def kafka_crashes(self) -> None:
        """SIGKILL of the broker; batches are in doubt."""
        self.failures += 1
        await self._restarted(self.servers.kafka, self.servers.kafka.crash_restart)

    async def kafka_restarts(self) -> None:
        """An ordered stop and start of the broker."""
        self.failures += 1
        await self._restarted(self.servers.kafka, self.servers.kafka.restart)

    async def kafka_freezes(self) -> None:
        """SIGSTOP of the broker until a relay has given its producer up; what it was sent before is written later."""
        self.failures += 1
        await self._done_past(0, (await self._shard())[1], "windows done before the broker freezes")
        pid = self.servers.kafka.pid
        before = self._given_up()

        async def look() -> bool:
            return self._given_up() > before

        os.kill(pid, signal.SIGSTOP)
        try:
            await stopped(pid)
            await eventually(look, what="a relay gives up its producer", timeout_seconds=_RECOVERY_TIMEOUT_SECONDS)
        finally:
            os.kill(pid, signal.SIGCONT)

    def _given_up(self) -> int:
        """How often relays made another producer, or began anew because of Kafka."""
        marks = ("another producer goes on", "starting again from the log")
        return sum(relay.log.count(mark) for relay in self.running for mark in marks)

    async def backends_die(self) -> None:
        """A stream of pg_terminate_backend, writers' and relays' alike, one for each few events."""
        for kind in ("relay", "", "relay", ""):
            ended = await self._terminate(kind)
            self.failures += ended if kind == "relay" else 0
            await self.load.more(self.rng.randint(5, 40))

    async def _terminate(self, application: str) -> int:
        """End one or more sessions of a kind, as soon as there is one."""

        async def look() -> int:
            try:
                found: int = await self.load.pool.fetchval(
                    "select count(*) filter (where pg_terminate_backend(pid)) from"
                    " (select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
                    "     and application_name = $1 order by random() limit 1) s",
                    application,
                )
            except (asyncpg.PostgresConnectionError, asyncpg.InterfaceError):
                return 0  # the session that asks was one of those that were ended before
            return found

        return await eventually(look, what=f"a session of {application or 'a writer'} to end")

    async def relay_dies(self) -> None:
        """SIGKILL of a relay, which has the lease or stands by; another one is started."""
        self.failures += 1
        victim = self.running.pop(self.rng.randrange(len(self.running)))
        await victim.kill()
        assert victim.status == -signal.SIGKILL, f"{victim.status}\n{victim.log}"
        self.start_relay()

    async def follower_dies(self) -> None:
        """SIGKILL of a consumer, and a new one."""
        victim = self.rng.choice(self.followers)
        assert await asyncio.to_thread(victim.kill) == -signal.SIGKILL, victim.log
        victim.start()

    async def relay_becomes_a_zombie(self) -> None:
        """SIGSTOP of the relay that has the lease, just before it sends; SIGCONT when its successor has published."""
        self.failures += 2
        while self.running:
            await self.running.pop().kill()
        zombie = self.start_relay(Fault("kafka.send", "before", "stop", self.rng.randint(5, 30)))
        await stopped(zombie.pid, timeout_seconds=_RECOVERY_TIMEOUT_SECONDS)
        epoch, _ = await self._shard()
        self.start_relay()
        succeeded_at = await self._done_past(epoch, 0, "a successor")
        await self._done_past(epoch, succeeded_at, "windows done by the successor")
        zombie.signal(signal.SIGCONT)

        async def look() -> bool:
            return any(word in zombie.log for word in ("ran out", "taken over", "belongs to epoch"))

        await eventually(look, what="the zombie sees that it is one", timeout_seconds=_RECOVERY_TIMEOUT_SECONDS)

    async def _shard(self) -> tuple[int, int]:
        """Epoch of the lease, and the windows known to be done."""
        row = await self.load.pool.fetchrow("select lease_epoch, done_through from outbox.shards where shard = 0")
        assert row is not None
        return row["lease_epoch"], row["done_through"]

    async def _done_past(self, epoch: int, done_through: int, what: str) -> int:
        """Wait for a later epoch and later windows done."""

        async def look() -> int:
            found_epoch, found_through = await self._shard()
            return found_through if found_epoch > epoch and found_through > done_through else 0

        return await eventually(look, what=what, timeout_seconds=_RECOVERY_TIMEOUT_SECONDS)

    # -------------------------------------------------------------------------------------------- verdict

    async def verdict(self, *faults: str) -> Verdict:
        """Settle, judge, and print it in a line.

        Raises:
            AssertionError: anything but a valid history in which each of `faults` happened.
        """
        unsettled = await self.load.settled(self.bootstrap, self.cache_pool)
        torn = await self.load.torn()
        bugs = [relay.log[-3000:] for relay in self.ended if not _for_want_of_a_database(relay)]
        allowed = self.failures * WINDOWS_IN_FLIGHT * self.window_events
        happened = {name: self.fired[name] for name in faults}
        happened |= {mode: self.load.happened[mode] for mode in ("plain", "rolled_back", "savepoint", "closed")}
        verdict = await self.load.verdict(self.bootstrap, self.cache_pool, duplicates_max=allowed, happened=happened)
        twice = await applied_twice(self.cache_pool)
        line = self._line(verdict, allowed)
        assert unsettled is None, f"{unsettled}\n{line}\n{self.logs()}"
        assert verdict.valid, f"{line}\n{self.logs()}"
        assert not bugs, "a relay ended by itself:\n" + "\n".join(bugs)
        assert not torn, f"transactions committed in part: {torn[:3]}"
        assert not twice, f"applied twice: {twice[:5]}"
        assert not await self.load.parked()
        sys.stdout.write(f"{line}\n")
        return verdict

    def _line(self, verdict: Verdict, allowed: int) -> str:
        doubt = {name: count for name, count in self.load.happened.items() if name.startswith("in")}
        fired = ", ".join(f"{name} {count}" for name, count in self.fired.items())
        return f"{verdict.explain()} (of {allowed} allowed), {verdict.samples} writes of the cache; {doubt}; {fired}"

    def logs(self) -> str:
        """The ends of all logs."""
        texts = [f"--- relay {relay.pid}\n{relay.log[-3000:]}" for relay in [*self.ended, *self.running]]
        texts += [f"--- follower\n{program.log[-3000:]}" for program in self.followers]
        return "\n".join(texts)


def _for_want_of_a_database(relay: RelayProcess) -> bool:
    """Whether it ended because it could not connect when it started; a running one has to live through that."""
    return "lease taken" not in relay.log


FAULTS: Final[dict[str, Callable[[Scene], Coroutine[Any, Any, None]]]] = {
    "owner crashes": Scene.owner_crashes,
    "owner restarts": Scene.owner_restarts,
    "reader crashes": Scene.reader_crashes,
    "reader restarts": Scene.reader_restarts,
    "kafka crashes": Scene.kafka_crashes,
    "kafka restarts": Scene.kafka_restarts,
    "kafka freezes": Scene.kafka_freezes,
    "backends die": Scene.backends_die,
    "relay dies": Scene.relay_dies,
    "follower dies": Scene.follower_dies,
    "relay becomes a zombie": Scene.relay_becomes_a_zombie,
}


@asynccontextmanager
async def scene(
    servers: Servers,
    relays: Relays,
    seed: int,
    *,
    relay_count: int = 1,
    follower_count: int = 1,
    key_count: int = 40,
    rate: float = 400.0,
) -> AsyncIterator[Scene]:
    """Everything running on databases and a topic of its own, the load not yet."""
    name = uuid4().hex[:12]
    topic = f"accounts-{name}"
    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, relays.kill_all)
        pools = []
        for server, role in ((servers.owner, "owner"), (servers.reader, "reader")):
            url = server.create_database(f"{role}_{name}")
            stack.push_async_callback(asyncio.to_thread, server.drop_database, f"{role}_{name}")
            pool = await stack.enter_async_context(asyncpg.create_pool(url, min_size=1, max_size=12))
            await migrate.up(pool)
            pools.append((url, pool))
        (owner_url, owner_pool), (reader_url, reader_pool) = pools
        await create_topic(servers.kafka.bootstrap_servers, topic, partitions=PARTITIONS)
        await reader_pool.execute(CACHE_TABLES)
        load = Load(owner_pool, topic, keys=tuple(f"key-{n}" for n in range(key_count)), seed=seed, rate=rate)
        await load.set_up()
        made = Scene(servers, relays, owner_url, load, reader_pool, random.Random(seed))
        for _ in range(relay_count):
            made.start_relay()
        for _ in range(follower_count):
            program = follower(reader_url, servers.kafka.bootstrap_servers, topic)
            stack.push_async_callback(asyncio.to_thread, program.dispose)
            made.followers.append(program)
            program.start()
        yield made
