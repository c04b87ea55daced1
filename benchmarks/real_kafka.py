"""Apache Kafka for measurements: as the tests start it, but compiled for speed, not for being ready soon."""

import os
from typing import Final

from outbox.embedded.kafka import answers_kafka
from outbox.embedded.process import ServerProcess
from tests.support import kafka_server
from tests.support.kafka_server import RealKafka

_START_TIMEOUT_SECONDS: Final = 90.0


class UnavailableError(RuntimeError):
    """Apache Kafka cannot run here; the text says why."""


class Kafka(RealKafka):
    """One broker with default flags of the Java machine and 1 GiB of heap."""

    def start(self) -> None:
        """Start it.

        Raises:
            UnavailableError: no Java, or no jars.
        """
        reason = kafka_server.why_unavailable()
        if reason is not None:
            raise UnavailableError(reason)
        super().start()

    def _launch(self, process: ServerProcess) -> None:
        command = ["java", "-Xmx1g", "-cp", f"{kafka_server._JARS}/*", "kafka.Kafka"]
        process.spawn([*command, process.directory / "server.properties"], environment=os.environ)
        process.await_ready(lambda: answers_kafka(self._port), timeout_seconds=_START_TIMEOUT_SECONDS)
