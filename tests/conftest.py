"""Servers, databases and topics for tests.

The servers are started once a session, when the first test asks, on random ports. A test gets a database and
topic names of its own, so it runs beside anything. Fixtures are synchronous: they outlive a test's event loop.
"""

import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import asyncpg
import hypothesis
import pytest
import pytest_asyncio

from outbox import Pool, embedded
from outbox.embedded import Broker, Databases, Postgres
from outbox.upkeep import migrate
from tests.support import kafka_server
from tests.support.kafka_server import RealKafka
from tests.support.postgres_server import OLDEST_BIN_VARIABLE, find_postgres_15
from tests.support.relay_process import Relays, relay_processes

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("sagabox", deadline=None)
hypothesis.settings.load_profile("sagabox")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that uses a server which not every machine has is marked by that alone."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "real_kafka" in fixtures:
            item.add_marker(pytest.mark.real_kafka)
        if "postgres15" in fixtures:
            item.add_marker(pytest.mark.postgres15)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Databases]:
    """PostgreSQL 18, or the server that DATABASE_URL names; shared, so it must not be stopped or killed."""
    url = os.environ.get(embedded.DATABASE_URL)
    if url:
        yield Databases(url)
        return
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def postgres15() -> Iterator[Postgres]:
    """PostgreSQL 15, the oldest release that is supported; shared like the other."""
    bin_dir = find_postgres_15()
    if bin_dir is None:
        pytest.skip(f"no PostgreSQL 15 is installed; {OLDEST_BIN_VARIABLE} may name its bin directory")
    with Postgres(bin_dir=bin_dir) as server:
        yield server


@pytest.fixture(
    scope="session",
    params=[
        pytest.param("postgres", id="postgres18"),
        pytest.param("postgres15", id="postgres15", marks=pytest.mark.postgres15),
    ],
)
def any_postgres(request: pytest.FixtureRequest) -> Databases:
    """Each supported PostgreSQL in turn."""
    server = request.getfixturevalue(request.param)
    assert isinstance(server, Databases)
    return server


@pytest.fixture
def database(postgres: Databases) -> Iterator[str]:
    """The URL of a new, empty database on PostgreSQL 18."""
    yield from _fresh_database(postgres)


@pytest.fixture
def database15(postgres15: Postgres) -> Iterator[str]:
    """The URL of a new, empty database on PostgreSQL 15."""
    yield from _fresh_database(postgres15)


@pytest.fixture
def any_database(any_postgres: Databases) -> Iterator[str]:
    """The URL of a new, empty database on each supported PostgreSQL in turn."""
    yield from _fresh_database(any_postgres)


@pytest_asyncio.fixture
async def log_pool(database: str) -> AsyncIterator[Pool]:
    """A pool on a new database that has the log."""
    async with asyncpg.create_pool(database, min_size=1, max_size=20) as pool:
        await migrate.up(pool)
        yield pool


@pytest_asyncio.fixture
async def saga_pool(database: str) -> AsyncIterator[Pool]:
    """A pool on a new database that has the log and the sagas."""
    async with _saga_pool(database) as pool:
        yield pool


@pytest_asyncio.fixture
async def any_saga_pool(any_database: str) -> AsyncIterator[Pool]:
    """The same on each supported PostgreSQL in turn."""
    async with _saga_pool(any_database) as pool:
        yield pool


@asynccontextmanager
async def _saga_pool(url: str) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(url, min_size=1, max_size=20) as pool:
        await migrate.up(pool)
        await migrate.up(pool, package="saga")
        yield pool


@pytest.fixture(scope="session")
def _zygote() -> Iterator[Relays]:
    with relay_processes() as relays:
        yield relays


@pytest.fixture
def relays(_zygote: Relays) -> Iterator[Relays]:
    """Starts relays in processes of their own; none outlives the test."""
    yield _zygote
    _zygote.kill_all()


@pytest.fixture(scope="session")
def broker() -> Iterator[str]:
    """Bootstrap servers of the embedded broker, or of the one that KAFKA_BOOTSTRAP_SERVERS names."""
    servers = os.environ.get(embedded.KAFKA_BOOTSTRAP_SERVERS)
    if servers:
        yield servers
        return
    with Broker() as server:
        yield server.bootstrap_servers


@pytest.fixture(scope="session")
def real_kafka() -> Iterator[RealKafka]:
    """Apache Kafka; shared, so a test that stops or kills it must start it again."""
    reason = kafka_server.why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    with RealKafka() as server:
        yield server


@pytest.fixture
def topic() -> str:
    """A topic name that nobody else uses; the topic does not exist yet."""
    return f"topic-{uuid.uuid4().hex[:12]}"


def _fresh_database(server: Databases) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield server.create_database(name)
    server.drop_database(name)
