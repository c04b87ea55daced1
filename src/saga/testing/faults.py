"""What can go wrong, where, and choosing it.

Wherever a run could take another turn, the machine names the *site* and the turns that are possible there. A plain run
takes none of them; one of `explore` takes those of its history, and notes what else there was.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

Turn: TypeAlias = Literal[
    "rejects",
    "fails",
    "fails for good",
    "crash before",
    "crash after",
    "times out",
    "times out, landed",
    "lands late",
    "answer lost",
    "cancel",
    "signal",
    "reply twice",
    "reply late",
]

DO: Final[tuple[Turn, ...]] = ("rejects", "crash before", "crash after", "times out", "times out, landed", "lands late")
UNDO: Final[tuple[Turn, ...]] = ("fails", "fails for good", "crash before", "crash after", "times out, landed")
TRANSACTION: Final[tuple[Turn, ...]] = ("rejects", "crash before", "crash after", "answer lost")
UNDO_TRANSACTION: Final[tuple[Turn, ...]] = ("fails for good", "crash before", "crash after", "answer lost")
COMMAND: Final[tuple[Turn, ...]] = ("rejects", "reply twice", "reply late")
UNDO_COMMAND: Final[tuple[Turn, ...]] = ("fails for good", "reply twice", "reply late")
WRITE: Final[tuple[Turn, ...]] = ("crash before", "crash after", "answer lost", "cancel")
WRITE_RACED: Final[tuple[Turn, ...]] = (*WRITE, "signal")
"""Where signals are still to come: the next one comes right before the write."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One turn at one site."""

    site: str
    turn: Turn

    def __str__(self) -> str:
        return f"{self.site}: {self.turn}"


@dataclass(slots=True)
class Choices:
    """The turns of one history, and the sites that it came by."""

    turns: Mapping[str, Turn] = field(default_factory=dict)
    seen: dict[str, tuple[Turn, ...]] = field(default_factory=dict)
    taken: list[Fault] = field(default_factory=list)

    def at(self, site: str, turns: tuple[Turn, ...]) -> Turn | None:
        """The turn that is taken here; each site is come by once, a repeated one is another."""
        self.seen.setdefault(site, turns)
        turn = self.turns.get(site)
        if turn is None or turn not in turns:
            return None
        fault = Fault(site, turn)
        if fault in self.taken:
            return None
        self.taken.append(fault)
        return turn
