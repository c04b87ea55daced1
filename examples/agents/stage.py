"""What the demo plays on: databases, topics, and every service in a process of its own."""

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Final, LiteralString, NamedTuple

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from rich.console import Console

from outbox import Pool, embedded
from outbox.embedded.process import ServerProcess
from outbox.upkeep import migrate

HERE: Final = Path(__file__).parent
REPOSITORY: Final = HERE.parent.parent
TOPIC: Final = "llm.agents"
TOPICS: Final = {
    TOPIC: 6,
    "saga.validation.commands": 2,
    "saga.notification.commands": 2,
    "saga.workflow_execution.replies": 2,
}
"""And how many partitions each has."""
SCHEMAS: Final = {
    "llm_agent_db": ("agent_service.sql",),
    "workflow_db": ("workflow_service.sql",),
    "validation_db": ("validation_service.sql", "trouble.sql"),
    "notification_db": ("notification_service.sql", "trouble.sql"),
}
LOOK_SECONDS: Final = 0.05
OUTBOX: Final = Path(sys.executable).with_name("outbox")
SAGA: Final = Path(sys.executable).with_name("saga")
"""The commands that `pip install sagabox` puts beside Python."""

QUICK: Final = {"SAGABOX_SESSION_TIMEOUT_SECONDS": "3", "SAGABOX_FETCH_WAIT_SECONDS": "0.005"}
"""For the embedded broker: it makes the first member of a group wait for half a session, in case more come, and a fetch
for all of its time, whatever arrives meanwhile."""


class DemoError(Exception):
    """The demo cannot go on; says why."""


class OverdueError(DemoError):
    """Something awaited did not happen in time."""


class Database(NamedTuple):
    """Of one service: its address, and a pool for those who look on."""

    url: str
    pool: Pool


class Stage:
    """The servers' addresses, the databases, and the processes started so far."""

    def __init__(self, kafka: str, databases: Mapping[str, Database], settings: Mapping[str, str]) -> None:
        self.kafka = kafka
        self.databases = databases
        self.agents, self.workflows = databases["llm_agent_db"], databases["workflow_db"]
        self._settings = settings
        self._services: list[ServerProcess] = []

    def start(self, name: str, *command: str | Path, database: Database) -> ServerProcess:
        """Start a process, which finds its servers where every service does: in the environment."""
        service = ServerProcess(name, Path(mkdtemp(prefix=f"sagabox-{name}-")))
        self._services.append(service)
        environment = {
            "DATABASE_URL": database.url,
            "AGENTS_DATABASE_URL": self.agents.url,
            "CACHE_DATABASE_URL": self.workflows.url,
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka,
            "PYTHONPATH": str(REPOSITORY),
            **self._settings,
        }
        service.spawn(command, environment={**os.environ, **environment})
        return service

    def start_python(self, name: str, module: str, *arguments: str | Path, database: Database) -> ServerProcess:
        """Start one of our own programs."""
        return self.start(name, sys.executable, "-m", module, *arguments, database=database)

    async def stop(self, service: ServerProcess) -> None:
        """SIGTERM, and what is in flight is finished."""
        await asyncio.to_thread(service.stop, signal.SIGTERM)
        self.check(service)

    def kill(self, service: ServerProcess) -> None:
        """SIGKILL, on purpose."""
        service.kill()
        self._services.remove(service)
        service.dispose()

    @contextmanager
    def frozen(self, service: ServerProcess) -> Iterator[None]:
        """A process that stands still for the length of the block, as one does whose machine has no time for it."""
        os.kill(service.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(service.pid, signal.SIGCONT)

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

    async def wait_in_hope(
        self, console: Console, what: str, holds: Callable[[], Awaitable[bool]], timeout_seconds: float
    ) -> None:
        """Wait, but not for ever: what does not happen is for the verdict to name."""
        try:
            await self.wait_until(what, holds, timeout_seconds)
        except OverdueError as error:
            console.print(str(error), style="red", markup=False, soft_wrap=True)

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
    """Servers, migrated databases and topics; on servers of your own all of it is removed afterwards."""
    async with embedded.stack() as servers, AsyncExitStack() as stack:
        suffix = "" if servers.embedded_postgres else f"_demo_{uuid.uuid4().hex[:8]}"
        databases = {}
        for name, schemas in SCHEMAS.items():
            database = await stack.enter_async_context(_database(servers, f"{name}{suffix}"))
            await migrate.up(database.pool)
            await migrate.up(database.pool, package="saga")
            for schema in schemas:
                await database.pool.execute((HERE / schema).read_text())
            databases[name] = database
        await stack.enter_async_context(_topics(servers.kafka))
        set_up = Stage(servers.kafka, databases, QUICK if servers.embedded_broker else {})
        try:
            yield set_up
        finally:
            await set_up.clear()


@asynccontextmanager
async def _database(servers: embedded.Stack, name: str) -> AsyncIterator[Database]:
    url = await asyncio.to_thread(servers.create_database, name)
    try:
        async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool:
            yield Database(url, pool)
    finally:
        await asyncio.to_thread(servers.drop_database, name)


@asynccontextmanager
async def _topics(kafka: str) -> AsyncIterator[None]:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        if there := sorted(TOPICS.keys() & set(await admin.list_topics())):
            raise DemoError(f"{', '.join(there)} on {kafka} already; the demo wants empty topics of its own")
        await admin.create_topics([NewTopic(name, partitions, 1) for name, partitions in TOPICS.items()])
        try:
            yield
        finally:
            await admin.delete_topics([*TOPICS])
    finally:
        await admin.close()
