"""Who runs PostgreSQL when we are root, which it refuses to be.

Root starts it as `nobody`. That account must be able to reach the server's directory and its programs; a
checkout below /root, or in a directory made by mktemp, is closed to it. Rather than open such directories to
everybody, the programs are copied to where the account can read them.
"""

import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outbox.embedded.process import EmbeddedServerError

_UNPRIVILEGED = "nobody"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The account that runs a server: our own, or another if we are root."""

    uid: int | None = None
    gid: int | None = None

    @property
    def popen_options(self) -> dict[str, Any]:
        """What to pass to `subprocess`."""
        if self.uid is None:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}

    def make_directory(self, prefix: str) -> Path:
        """A new temporary directory that belongs to the account and that no other may enter."""
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=self._temporary_root()))
        if self.uid is not None and self.gid is not None:
            os.chown(directory, self.uid, self.gid)
        return directory

    def give(self, path: Path) -> None:
        """Make the account the owner of a file."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def reachable_programs(self, bin_dir: Path, directory: Path) -> Path:
        """`bin_dir` if the account can run what is there, or a copy of the installation in `directory`."""
        if self.uid is None or self._can_run(bin_dir / "postgres"):
            return bin_dir
        installation = bin_dir.parent
        copy = directory / "programs" / installation.parent.name / installation.name
        shutil.copytree(installation, copy, symlinks=True)
        # A wheel keeps the libraries its programs link to beside the package, under a name of its own.
        for libraries in installation.parent.parent.glob(f"{installation.parent.name}.libs"):
            shutil.copytree(libraries, directory / "programs" / libraries.name, symlinks=True)
        _open_to_all(directory / "programs")
        if not self._can_run(copy / bin_dir.name / "postgres"):
            raise EmbeddedServerError(
                f"{bin_dir}/postgres cannot be run by {_UNPRIVILEGED!r}, nor can its copy in {directory}; "
                "run as an ordinary user, or set TMPDIR to a directory that allows programs"
            )
        return copy / bin_dir.name

    def _can_run(self, program: Path) -> bool:
        try:
            done = subprocess.run(
                [program, "--version"], check=False, capture_output=True, cwd="/", **self.popen_options
            )
        except OSError:
            return False
        return done.returncode == 0

    def _temporary_root(self) -> Path:
        candidates = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]  # noqa: S108 - mkdtemp follows
        if self.uid is None:
            return candidates[0]
        for candidate in candidates:
            path = candidate.resolve()
            if all(part.stat().st_mode & stat.S_IXOTH for part in [path, *path.parents] if part.exists()):
                return path
        raise EmbeddedServerError(f"no temporary directory is open to {_UNPRIVILEGED!r}; set TMPDIR to one that is")


def current() -> Account:
    """Our own account, or `nobody` if we are root."""
    if os.geteuid() != 0:
        return Account()
    try:
        entry = pwd.getpwnam(_UNPRIVILEGED)
    except KeyError:
        raise EmbeddedServerError(
            f"PostgreSQL refuses root and there is no account {_UNPRIVILEGED!r}; run as an ordinary user"
        ) from None
    return Account(uid=entry.pw_uid, gid=entry.pw_gid)


def _open_to_all(root: Path) -> None:
    for path in [root, *root.rglob("*")]:
        if path.is_symlink():
            continue
        mode = path.stat().st_mode
        may_execute = stat.S_IXGRP | stat.S_IXOTH if mode & stat.S_IXUSR else 0
        path.chmod(mode | stat.S_IRGRP | stat.S_IROTH | may_execute)
