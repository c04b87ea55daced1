"""Which savepoint statements a query text holds, read as PostgreSQL's own scanner reads it.

Comments, literals and dollar quotes may hold anything and count for nothing; names are folded and cut as PostgreSQL
does it.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

_IDENTIFIER_MAX_BYTES: Final = 63

_TOKEN: Final = re.compile(
    r"""(?P<blank>\s+ | --[^\r\n]*)
      | (?P<comment>/\*)
      | (?P<quoted>"(?:[^"]|"")*")
      | (?P<literal>[eE]'(?:[^'\\]|\\.|'')*' | '[^']*')
      | (?P<dollar>\$(?:[^\W\d]\w*)?\$)
      | (?P<word>[^\W\d][\w$]*)
      | (?P<end>;)
      | (?P<other>\d[\w.]* | .)""",
    re.VERBOSE | re.DOTALL,
)
_COMMENT_EDGE: Final = re.compile(r"/\*|\*/")
_KINDS: Final[dict[str, Literal["open", "release", "rollback"]]] = {
    "savepoint": "open",
    "release": "release",
    "rollback": "rollback",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One SAVEPOINT, RELEASE or ROLLBACK TO."""

    kind: Literal["open", "release", "rollback"]
    name: str


@dataclass(frozen=True, slots=True)
class Text:
    """What a query text does to savepoints, in order, and how many statements it has."""

    changes: tuple[Change, ...]
    statements: int


def read(query: str) -> Text:
    """Find the savepoint statements of a query text."""
    changes: list[Change] = []
    statements = 0
    for statement in _statements(query):
        statements += 1
        change = _change(statement)
        if change is not None:
            changes.append(change)
    return Text(tuple(changes), statements)


def _change(statement: list[str]) -> Change | None:
    kind = _KINDS.get(statement[0].lower())
    if kind is None or len(statement) < 2:
        return None
    rest = statement[1:]
    if kind == "rollback":
        while rest and rest[0].lower() in {"work", "transaction"}:
            rest = rest[1:]
        if not rest or rest[0].lower() != "to":
            return None
        rest = rest[1:]
    # A savepoint may itself be called "savepoint": the word is noise only where a name follows.
    if kind != "open" and len(rest) > 1 and rest[0].lower() == "savepoint":
        rest = rest[1:]
    return Change(kind, _identifier(rest[0])) if rest else None


def _identifier(token: str) -> str:
    if token.startswith('"'):
        name = token[1:-1].replace('""', '"')
    else:
        name = "".join(c.lower() if c.isascii() else c for c in token)
    return name.encode()[:_IDENTIFIER_MAX_BYTES].decode(errors="ignore")


def _statements(query: str) -> Iterator[list[str]]:
    """The first tokens of each statement; six are as many as a savepoint statement has."""
    tokens: list[str] = []
    at = 0
    while (match := _TOKEN.match(query, at)) is not None:
        at = match.end()
        kind, text = match.lastgroup, match[0]
        if kind == "comment":
            at = _after_comment(query, at)
        elif kind == "dollar":
            end = query.find(text, at)
            at = len(query) if end < 0 else end + len(text)
            tokens.append(text)
        elif kind == "end":
            if tokens:
                yield tokens
            tokens = []
        elif kind != "blank" and len(tokens) < 6:
            tokens.append(text)
    if tokens:
        yield tokens


def _after_comment(query: str, at: int) -> int:
    depth = 1  # PostgreSQL's comments nest
    while depth and (edge := _COMMENT_EDGE.search(query, at)) is not None:
        depth += 1 if edge[0] == "/*" else -1
        at = edge.end()
    return len(query) if depth else at
