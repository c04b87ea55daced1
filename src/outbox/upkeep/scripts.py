"""The migrations as this version ships them: files read, names checked, scripts cut into statements.

Statements are run and printed one by one, because some drivers (asyncpg with parameters, most pools of other
tools) take one at a time, and because an error then names the statement that failed.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """One migration as this version ships it."""

    package: str
    number: int
    name: str
    up: str
    down: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the up file: what was applied is what must not change."""
        return hashlib.sha256(self.up.encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.package} {self.number:04d}_{self.name}"


@cache
def shipped(package: str = "outbox") -> tuple[Migration, ...]:
    """The migrations of a package in order."""
    texts = {
        entry.name: entry.read_text(encoding="utf-8")
        for entry in resources.files(package).joinpath("migrations").iterdir()
        if entry.name.endswith(".sql")
    }
    found = sorted((match for match in map(_FILE.fullmatch, texts) if match), key=lambda match: int(match["number"]))
    migrations = tuple(
        Migration(
            package=package,
            number=int(match["number"]),
            name=match["name"],
            up=texts[match[0]],
            down=texts[match[0].replace(".up.", ".down.")],
        )
        for match in found
    )
    assert [m.number for m in migrations] == list(range(1, len(migrations) + 1)), f"{package} misses a migration"
    return migrations


_FILE: Final = re.compile(r"(?P<number>\d{4})_(?P<name>[a-z][a-z0-9_]*)\.up\.sql")


def split(script: str) -> list[str]:
    """The single statements of a script, each with the comments in front of it."""
    found = (match[0].strip() for match in _STATEMENT.finditer(script))
    return [text for text in found if _COMMENT.sub("", text).strip()]


_COMMENT: Final = re.compile(r"--[^\n]*|/\*.*?\*/", re.DOTALL)
_STATEMENT: Final = re.compile(
    r"""(?: --[^\n]* | /\*.*?\*/                       # comments
          | '(?:[^']|'')*' | "(?:[^"]|"")*"             # quotes
          | (?P<dollar>\$\w*\$) .*? (?P=dollar)          # function bodies
          | [^;] )+""",
    re.DOTALL | re.VERBOSE,
)
