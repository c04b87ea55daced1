"""Servers that are meant to be killed, and seeds that repeat a run.

A run's random choices come from one seed, which is printed; `SAGABOX_SEED` gives it again.
"""

import os
import secrets
import sys
from collections.abc import Iterator

import pytest

from outbox.embedded import Postgres
from tests.support.kafka_server import RealKafka
from tests.support.scene import Servers

SEED_VARIABLE = "SAGABOX_SEED"


@pytest.fixture(scope="session")
def servers(real_kafka: RealKafka) -> Iterator[Servers]:
    """Two databases of their own and Apache Kafka."""
    with Postgres() as owner, Postgres() as reader:
        yield Servers(owner, reader, real_kafka)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Printed, with the command that repeats the test."""
    given = os.environ.get(SEED_VARIABLE)
    number = int(given) if given else secrets.randbelow(1_000_000)
    sys.stdout.write(f"seed {number}; to repeat: {SEED_VARIABLE}={number} pytest '{request.node.nodeid}'\n")
    return number


@pytest.fixture(autouse=True)
def all_servers_run(request: pytest.FixtureRequest) -> Iterator[None]:
    """A failed test must not leave the next one without a server."""
    yield
    if "servers" in request.fixturenames:
        found: Servers = request.getfixturevalue("servers")
        for server in (found.owner, found.reader, found.kafka):
            server.start()
