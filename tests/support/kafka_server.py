"""Apache Kafka itself, for the tests that need durability, idempotence or transactions.

The jars are those of `tests/kafka/pom.xml`; Maven fetches them once into `.cache`. One process in KRaft mode
is broker and controller. Run as a program, this module fetches the jars and says where they are.
"""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic

from outbox.embedded.kafka import answers_kafka
from outbox.embedded.process import EmbeddedServerError, ServerProcess, free_port

_ROOT: Final = Path(__file__).parents[2]
_POM: Final = _ROOT / "tests" / "kafka" / "pom.xml"
_JARS: Final = _ROOT / ".cache" / "kafka-jars"
_JAVA_OLDEST: Final = 17
_FETCH_TIMEOUT_SECONDS: Final = 600.0
_TOOL_TIMEOUT_SECONDS: Final = 60.0
_START_TIMEOUT_SECONDS: Final = 60.0
_CLUSTER_ID: Final = "c2FnYWJveC10ZXN0cy0xMQ"  # any 16 bytes in base64url

SETTINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        # A killed broker is let in again when its old session is over; the default is nine seconds.
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
        "auto.create.topics.enable": "false",  # a misspelt topic is a bug in the test
        "group.initial.rebalance.delay.ms": "0",
        "group.min.session.timeout.ms": "1000",  # the default would have tests wait for killed consumers
        "offsets.topic.num.partitions": "4",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "log.cleaner.dedupe.buffer.size": "8388608",
        "log.cleaner.threads": "1",
        "num.network.threads": "2",
        "num.io.threads": "4",
    }
)


class RealKafka:
    """One Apache Kafka with a log directory of its own; a context manager that starts it and stops it.

    The port and the log directory survive `kill`, `shutdown` and `restart`; `stop` removes the logs.
    """

    def __init__(self, *, settings: Mapping[str, str] | None = None) -> None:
        """Nothing runs yet; `settings` go into server.properties on top of `SETTINGS`."""
        self._settings = {**SETTINGS, **(settings or {})}
        self._process: ServerProcess | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect."""
        assert self._process is not None, "start it first"
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The process number of the Java machine."""
        assert self._process is not None, "start it first"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.running

    def start(self) -> None:
        """Start it and wait until it answers."""
        if self.running:
            return
        if self._process is not None:
            self._launch(self._process)
            return
        self._process = ServerProcess("kafka", Path(tempfile.mkdtemp(prefix="sagabox-real-kafka-")))
        try:
            self._format(self._process.directory)
            self._launch(self._process)
        except BaseException:
            self.stop()
            raise

    def shutdown(self) -> None:
        """SIGTERM: stop it in order and keep the logs."""
        if self._process is not None:
            self._process.stop(signal.SIGTERM, timeout_seconds=60)

    def kill(self) -> None:
        """SIGKILL, and keep the logs as they are on disk."""
        if self._process is not None:
            self._process.kill()

    def restart(self) -> None:
        """`shutdown`, then `start` on the same port with the same logs."""
        self.shutdown()
        self.start()

    def crash_restart(self) -> None:
        """`kill`, then `start` on the same port with the same logs."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Stop it and remove its logs."""
        if self._process is None:
            return
        process, self._process = self._process, None
        # Nobody will read these logs again, so nothing needs to be flushed.
        process.kill()
        process.dispose()

    def _format(self, directory: Path) -> None:
        self._port = free_port()
        controller = free_port()
        properties = {
            **self._settings,
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://127.0.0.1:{self._port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self._port}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "log.dirs": str(directory / "logs"),
        }
        config = directory / "server.properties"
        config.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        tool = ["kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(config)]
        done = subprocess.run(
            [*_java("64m"), *tool], check=False, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_SECONDS
        )
        if done.returncode != 0:
            raise EmbeddedServerError(f"formatting Kafka's storage failed: {done.stdout}{done.stderr}")

    def _launch(self, process: ServerProcess) -> None:
        process.spawn([*_java("512m"), "kafka.Kafka", process.directory / "server.properties"], environment=os.environ)
        process.await_ready(lambda: answers_kafka(self._port), timeout_seconds=_START_TIMEOUT_SECONDS)


async def create_topic(
    bootstrap_servers: str, name: str, *, partitions: int = 1, settings: Mapping[str, str] | None = None
) -> None:
    """Create a topic on any broker, the embedded one included."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        topic = NewTopic(name, partitions, 1, topic_configs=dict(settings or {}))
        answer = await admin.create_topics([topic])
    finally:
        await admin.close()
    for topic_name, code, *message in answer.topic_errors:
        assert code == 0, f"creating topic {topic_name} failed: {code} {message}"


async def grow_topic(bootstrap_servers: str, name: str, *, partitions: int) -> None:
    """Give a topic more partitions; not on the embedded broker, which cannot."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap_servers)
    await admin.start()
    try:
        answer = await admin.create_partitions({name: NewPartitions(partitions)})
    finally:
        await admin.close()
    for topic_name, code, *message in answer.topic_errors:
        assert code == 0, f"growing topic {topic_name} failed: {code} {message}"


@cache
def why_unavailable() -> str | None:
    """The reason why Apache Kafka cannot run here, or None; fetches the jars at the first call."""
    version = _java_version()
    if version is None:
        return "Apache Kafka needs Java 17, and there is no java on PATH"
    if version < _JAVA_OLDEST:
        return f"Apache Kafka needs Java 17, and java on PATH is {version}"
    _JARS.parent.mkdir(exist_ok=True)
    with (_JARS.parent / "kafka-jars.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be fetching them
        return _fetch_jars()


def _fetch_jars() -> str | None:
    # The pom beside the jars tells which versions they are; it is written last, so they are complete.
    fetched = _JARS / "pom.xml"
    if fetched.exists() and fetched.read_bytes() == _POM.read_bytes():
        return None
    if shutil.which("mvn") is None:
        return "Apache Kafka's jars are fetched by Maven, and there is no mvn on PATH"
    shutil.rmtree(_JARS, ignore_errors=True)
    command = [
        "mvn",
        "-q",
        "-B",
        "-f",
        str(_POM),
        "dependency:copy-dependencies",
        f"-DoutputDirectory={_JARS}",
    ]
    done = subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_FETCH_TIMEOUT_SECONDS,
    )
    if done.returncode != 0:
        return f"Maven could not fetch Apache Kafka: {(done.stdout + done.stderr)[-500:]}"
    shutil.copyfile(_POM, fetched)
    return None


def _java_version() -> int | None:
    java = shutil.which("java")
    if java is None:
        return None
    done = subprocess.run([java, "-version"], check=False, capture_output=True, text=True)
    found = re.search(r'version "(\d+)', done.stderr)
    return int(found.group(1)) if found else None


def _java(heap: str) -> list[str]:
    flags = [
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-Xshare:auto",
    ]  # ready soon, rather than fast later
    return ["java", f"-Xmx{heap}", *flags, "-cp", f"{_JARS}/*"]


if __name__ == "__main__":
    reason = why_unavailable()
    sys.stdout.write(f"{reason or f'Apache Kafka is in {_JARS.relative_to(_ROOT)}'}\n")
