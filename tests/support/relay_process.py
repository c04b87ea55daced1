"""Relays in processes of their own, which can be killed, stopped and told where to crash.

A *zygote* has imported everything and forks one child for each relay, so that a relay starts in milliseconds. It has
no event loop and no threads, which is what makes forking safe. It is asked in lines of JSON and answers likewise.
"""

import asyncio
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from outbox import postgres
from outbox.errors import RestoreDetected
from outbox.relay import Relay
from outbox.settings import Settings
from tests.support.faults import Fault, Injector, eventually, refuse_keys
from tests.support.mutants import MUTANTS

log = logging.getLogger(__name__)

_ROOT: Final = Path(__file__).parents[2]
_ANSWER_TIMEOUT_SECONDS: Final = 30.0
_CONNECTIONS: Final = 6

QUICK: Final[Mapping[str, Any]] = {"lease_seconds": 1.0, "idle_after_seconds": 0.03, "missing_topic_seconds": 5.0}
"""Settings with which a test need not wait."""
EXIT_REFUSED: Final = 3
"""The restore guard refused."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the zygote needs to know to start a relay."""

    url: str
    servers: str
    settings: Mapping[str, Any]
    visits_file: str
    log_file: str
    fault: Fault | None
    refused_prefix: str | None
    mutant: str | None


@dataclass(slots=True)
class RelayProcess:
    """One relay."""

    pid: int
    log_file: Path
    exited: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    """Its exit code, or the negative number of the signal that ended it."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if not self.exited.is_set():
            os.kill(self.pid, number)

    async def wait(self, *, timeout_seconds: float = 20.0) -> int:
        """Its exit code, once it has ended."""

        async def look() -> bool:
            return self.exited.is_set()

        await eventually(look, what=f"relay {self.pid} ended\n{self.log}", timeout_seconds=timeout_seconds)
        assert self.status is not None
        return self.status

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        await self.wait()

    async def terminate(self) -> int:
        """SIGTERM, and its exit code."""
        self.signal(signal.SIGTERM)
        return await self.wait()

    @property
    def log(self) -> str:
        """What it logged."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""


class Relays:
    """Starts relays through one zygote."""

    def __init__(self, zygote: "subprocess.Popen[str]", directory: Path) -> None:
        """For `relay_processes`."""
        self._zygote = zygote
        self._directory = directory
        self._started: dict[int, RelayProcess] = {}
        self._pid: int | None = None
        self._answered = threading.Event()
        self._count = 0
        self.visits_file = directory / "visits"
        threading.Thread(target=self._listen, daemon=True).start()

    def start(
        self,
        url: str,
        servers: str,
        *,
        fault: Fault | None = None,
        refused_prefix: str | None = None,
        mutant: str | None = None,
        **settings: Any,
    ) -> RelayProcess:
        """Start a relay; `settings` go on top of `QUICK`, `mutant` names a rule that it breaks (see `mutants`)."""
        self._count += 1
        log_file = self._directory / f"relay-{self._count}.log"
        order = Order(
            url, servers, {**QUICK, **settings}, str(self.visits_file), str(log_file), fault, refused_prefix, mutant
        )
        assert self._zygote.stdin is not None
        self._answered.clear()
        self._log_file = log_file
        self._zygote.stdin.write(json.dumps(asdict(order)) + "\n")
        self._zygote.stdin.flush()
        assert self._answered.wait(_ANSWER_TIMEOUT_SECONDS), "the zygote does not answer"
        assert self._pid is not None
        return self._started[self._pid]

    def kill_all(self) -> None:
        """Leave no relay behind."""
        for relay in self._started.values():
            relay.signal(signal.SIGKILL)
        for relay in self._started.values():
            assert relay.exited.wait(_ANSWER_TIMEOUT_SECONDS), f"relay {relay.pid} survives SIGKILL"
        self._started.clear()

    def visits(self) -> set[tuple[str, str]]:
        """Sites and sides that any relay of this zygote has passed."""
        lines = self.visits_file.read_text().splitlines() if self.visits_file.exists() else []
        pairs = (line.split(" ") for line in lines if not line.startswith("fired"))
        return {(site, side) for site, side in pairs}

    def fired(self) -> list[str]:
        """Faults that have happened, in order."""
        lines = self.visits_file.read_text().splitlines() if self.visits_file.exists() else []
        return [line.removeprefix("fired ") for line in lines if line.startswith("fired")]

    def _listen(self) -> None:
        assert self._zygote.stdout is not None
        for line in self._zygote.stdout:
            message = json.loads(line)
            if "started" in message:
                self._pid = int(message["started"])
                self._started[self._pid] = RelayProcess(self._pid, self._log_file)
                self._answered.set()
            elif (relay := self._started.get(message["ended"])) is not None:
                relay.status = message["status"]
                relay.exited.set()


@contextmanager
def relay_processes() -> Iterator[Relays]:
    """A zygote for the length of the block; its relays end with it."""
    with tempfile.TemporaryDirectory(prefix="sagabox-relays-") as directory:
        command = [sys.executable, "-m", "tests.support.relay_process"]
        zygote = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT, start_new_session=True
        )
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        relays = Relays(zygote, Path(directory))
        try:
            yield relays
            relays.kill_all()
        finally:
            zygote.stdin.close()
            zygote.wait()
            zygote.stdout.close()


# ------------------------------------------------------------------------------------------- in the zygote


def _serve_orders() -> None:
    """Fork for each line of input; report each child's end. The end of input ends all children."""
    children: set[int] = set()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.set_blocking(reader, False)
    pending = b""
    while True:
        readable, _, _ = select.select([0, reader], [], [])
        if reader in readable:
            while True:
                try:
                    os.read(reader, 512)
                except BlockingIOError:
                    break
            _reap(children)
        if 0 in readable:
            chunk = os.read(0, 65_536)
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                pid = os.fork()
                if not pid:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _run(json.loads(line))
                children.add(pid)
                _say({"started": pid})
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _reap(children: set[int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        children.discard(pid)
        _say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _say(message: dict[str, int]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def _run(order: dict[str, Any]) -> None:
    """The child's life; never returns."""
    code = 1
    try:
        logging.basicConfig(filename=order["log_file"], level=logging.INFO, format="%(asctime)s %(message)s")
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
        fault = Fault(**order["fault"]) if order["fault"] else None
        Injector(fault, Path(order["visits_file"])).install()
        if order["refused_prefix"]:
            refuse_keys(order["refused_prefix"])
        if order["mutant"]:
            MUTANTS[order["mutant"]]()
        code = asyncio.run(_relay(order))
    except BaseException:
        log.exception("the relay ended")
    finally:
        logging.shutdown()
        os._exit(code)


async def _relay(order: dict[str, Any]) -> int:
    settings = Settings(**order["settings"])
    async with postgres.open_pool(order["url"], max_size=_CONNECTIONS, application="relay") as pool:
        relay = Relay(pool, order["servers"], settings=settings)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, relay.stop)
        try:
            async with relay:
                await relay.run()
        except RestoreDetected:
            log.exception("refused")
            return EXIT_REFUSED
    return 0


if __name__ == "__main__":
    _serve_orders()
