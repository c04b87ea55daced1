"""What the demo plays on: two databases, a topic, and every service in a process of its own."""

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, LiteralString

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from outbox import Pool, embedded
from outbox.embedded.process import ServerProcess
from outbox.upkeep import migrate

HERE: Final = Path(__file__).parent
REPOSITORY: Final = HERE.parent.parent
TOPIC: Final = "llm.agents"
PARTITIONS: Final = 6
LOOK_SECONDS: Final = 0.05
OUTBOX: Final = Path(sys.executable).with_name("outbox")
"""The command that `pip install sagabox` puts beside Python."""

QUICK: Final = {"SAGABOX_SESSION_TIMEOUT_SECONDS": "3", "SAGABOX_FETCH_WAIT_SECONDS": "0.005"}
"""For the embedded broker: it makes the first member of a group wait for half a session, in case more come, and a fetch
for all of its time, whatever arrives meanwhile."""


class DemoError(Exception):
    """The demo cannot go on; says why."""


class OverdueError(DemoError):
    """Something awaited did not happen in time."""


class Stage:
    """The servers' addresses, a pool on each database, and the processes started so far."""

    def __init__(
        self, kafka: str, urls: tuple[str, str], pools: tuple[Pool, Pool], settings: Mapping[str, str]
    ) -> None:
        self.kafka = kafka
        self.owner, self.cache = pools
        self.owner_url, self.cache_url = urls
        self._settings = settings
        self._services: list[ServerProcess] = []

    def start(self, name: str, *command: str | Path, database_url: str) -> ServerProcess:
        """Start a process, which finds its servers where every service does: in the environment."""
        service = ServerProcess(name, Path(mkdtemp(prefix=f"sagabox-{name}-")))
        self._services.append(service)
        environment = {
            "DATABASE_URL": database_url,
            "CACHE_DATABASE_URL": self.cache_url,
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka,
            "PYTHONPATH": str(REPOSITORY),
            **self._settings,
        }
        service.spawn(command, environment={**os.environ, **environment})
        return service

    def start_python(self, name: str, module: str, *arguments: str | Path, database_url: str) -> ServerProcess:
        """Start one of our own programs."""
        return self.start(name, sys.executable, "-m", module, *arguments, database_url=database_url)

    async def stop(self, service: ServerProcess) -> None:
        """SIGTERM, and what is in flight is finished."""
        await asyncio.to_thread(service.stop, signal.SIGTERM)
        self.check(service)

    def kill(self, service: ServerProcess) -> None:
        """SIGKILL, on purpose."""
        service.kill()
        self._services.remove(service)
        service.dispose()

    def check(self, service: ServerProcess) -> None:
        """Complain about a service that failed."""
        if not service.running and service.exit_status != 0:
            raise DemoError(f"{service.name} ended with status {service.exit_status}:\n{service.log_tail()}")

    async def wait_until(self, what: str, holds: Callable[[], Awaitable[bool]], timeout_seconds: float) -> None:
        """Look until something holds, while all services live.

        Raises:
            OverdueError: it does not hold in time.
            DemoError: a service failed.
        """
        deadline = time.monotonic() + timeout_seconds
        while not await holds():
            for service in self._services:
                self.check(service)
            if time.monotonic() > deadline:
                logs = "\n".join(f"--- {service.name}\n{service.log_tail()}" for service in self._services)
                raise OverdueError(f"waited {timeout_seconds:.0f} s in vain until {what}\n{logs}")
            await asyncio.sleep(LOOK_SECONDS)

    async def holds(self, pool: Pool, count: LiteralString, *, at_least: int) -> bool:
        """Whether a query for a number has reached it."""
        return bool(await pool.fetchval(count) >= at_least)

    async def clear(self) -> None:
        """End at once whatever still runs, as after Ctrl-C."""
        for service in self._services:
            await asyncio.to_thread(service.kill)
            service.dispose()


@asynccontextmanager
async def stage() -> AsyncIterator[Stage]:
    """Servers, migrated databases and the topic; on servers of your own all of it is removed afterwards."""
    async with embedded.stack() as servers:
        suffix = "" if servers.embedded_postgres else f"_demo_{uuid.uuid4().hex[:8]}"
        async with (
            _database(servers, f"llm_agent_db{suffix}") as (owner_url, owner),
            _database(servers, f"workflow_db{suffix}") as (cache_url, cache),
            _topic(servers.kafka),
        ):
            for pool, schema in ((owner, "agent_service.sql"), (cache, "workflow_service.sql")):
                await migrate.up(pool)
                await pool.execute((HERE / schema).read_text())
            quick = QUICK if servers.embedded_broker else {}
            set_up = Stage(servers.kafka, (owner_url, cache_url), (owner, cache), quick)
            try:
                yield set_up
            finally:
                await set_up.clear()


@asynccontextmanager
async def _database(servers: embedded.Stack, name: str) -> AsyncIterator[tuple[str, Pool]]:
    url = await asyncio.to_thread(servers.create_database, name)
    try:
        async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
            yield url, pool
    finally:
        await asyncio.to_thread(servers.drop_database, name)


@asynccontextmanager
async def _topic(kafka: str) -> AsyncIterator[None]:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        if TOPIC in await admin.list_topics():
            raise DemoError(f"the topic {TOPIC} exists on {kafka} already; the demo wants an empty one of its own")
        await admin.create_topics([NewTopic(TOPIC, PARTITIONS, 1)])
        try:
            yield
        finally:
            await admin.delete_topics([TOPIC])
    finally:
        await admin.close()
