"""Which PostgreSQL servers the tests may use: the embedded one, and the oldest release that is supported."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

OLDEST_BIN_VARIABLE: Final = "SAGABOX_POSTGRES_15_BIN"
_USUAL_PLACES: Final = (
    "/usr/lib/postgresql/15/bin",
    "/usr/pgsql-15/bin",
    "/opt/homebrew/opt/postgresql@15/bin",
    "/usr/local/opt/postgresql@15/bin",
)


def find_postgres_15() -> Path | None:
    """The programs of an installed PostgreSQL 15, or None."""
    named = os.environ.get(OLDEST_BIN_VARIABLE)
    candidates = [named] if named else [*_USUAL_PLACES, _bin_dir_on_path()]
    for candidate in candidates:
        if candidate is not None and _is_version_15(Path(candidate)):
            return Path(candidate)
    return None


def _bin_dir_on_path() -> str | None:
    pg_config = shutil.which("pg_config")
    if pg_config is None:
        return None
    done = subprocess.run([pg_config, "--bindir"], check=False, capture_output=True, text=True)
    return done.stdout.strip() or None


def _is_version_15(bin_dir: Path) -> bool:
    # pg_config may belong to a client library newer than the server beside it, so the server is asked.
    try:
        done = subprocess.run([bin_dir / "postgres", "--version"], check=False, capture_output=True, text=True)
    except OSError:
        return False
    return " 15." in done.stdout
