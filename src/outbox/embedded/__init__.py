"""PostgreSQL and a Kafka-compatible broker out of wheels: no Docker, no JVM.

    with embedded.stack() as stack:
        url = stack.create_database("shop")
        servers = stack.kafka

Both start in about a second on random ports, beside whatever else runs, and are gone afterwards, even if the
program is killed. `DATABASE_URL` and `KAFKA_BOOTSTRAP_SERVERS` name servers of your own instead; then nothing
is started for them. Needs the extra `sagabox[embedded]`. Not for production.
"""

import asyncio
import os
from contextlib import ExitStack
from typing import Final, Self

from outbox.embedded.databases import Databases
from outbox.embedded.kafka import Broker
from outbox.embedded.postgres import Postgres
from outbox.embedded.process import EmbeddedServerError

__all__ = ["Broker", "Databases", "EmbeddedServerError", "Postgres", "Stack", "stack"]

DATABASE_URL: Final = "DATABASE_URL"
KAFKA_BOOTSTRAP_SERVERS: Final = "KAFKA_BOOTSTRAP_SERVERS"


class Stack:
    """Both servers, between entering and leaving; `with` and `async with` do the same.

    Attributes:
        embedded_postgres: the server that was started, or None where `DATABASE_URL` named one.
        embedded_broker: the broker that was started, or None where `KAFKA_BOOTSTRAP_SERVERS` named one.
    """

    def __init__(self) -> None:
        """Nothing runs yet."""
        self.embedded_postgres: Postgres | None = None
        self.embedded_broker: Broker | None = None
        self._databases: Databases | None = None
        self._kafka: str | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as starting:
            database_url = os.environ.get(DATABASE_URL)
            if database_url:
                self._databases = Databases(database_url)
            else:
                self._databases = self.embedded_postgres = starting.enter_context(Postgres())
            self._kafka = os.environ.get(KAFKA_BOOTSTRAP_SERVERS)
            if not self._kafka:
                self.embedded_broker = starting.enter_context(Broker())
                self._kafka = self.embedded_broker.bootstrap_servers
            self._exit = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._exit.close)

    @property
    def postgres(self) -> Databases:
        """The server, for creating and dropping databases."""
        if self._databases is None:
            raise EmbeddedServerError("the stack has not been entered; use `with`")
        return self._databases

    @property
    def kafka(self) -> str:
        """The broker's bootstrap servers."""
        if self._kafka is None:
            raise EmbeddedServerError("the stack has not been entered; use `with`")
        return self._kafka

    @property
    def running(self) -> bool:
        """Whether the servers that this stack started still live."""
        return all(server.running for server in (self.embedded_postgres, self.embedded_broker) if server)

    def database_url(self, name: str | None = None) -> str:
        """The URL of a database; without a name, of the server's default one."""
        return self.postgres.dsn(name)

    def create_database(self, name: str) -> str:
        """Create a database and return its URL."""
        return self.postgres.create_database(name)

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, and end whatever is connected to it."""
        self.postgres.drop_database(name)


def stack() -> Stack:
    """PostgreSQL and Kafka for the length of a `with` or `async with` block."""
    return Stack()
