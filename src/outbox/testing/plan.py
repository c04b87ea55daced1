"""What may happen to a stream of events on its way into a cache: a plan, drawn by Hypothesis and told in words.

Smaller is simpler: the first fate, the events' own order, fewer steps. So the plan that Hypothesis shrinks a failure to
has nothing in it that the failure does not need.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from hypothesis import strategies as st

STEPS_MAX: Final = 12


class Fate(enum.Enum):
    """What becomes of a batch; its value says it."""

    APPLIED = ""
    DIED_EARLY = "the consumer died before it wrote rows; another one read the batch again"
    DIED_LATE = "the consumer died after it wrote rows, before COMMIT; another one read the batch again"
    REPLY_LOST = "it committed, but the consumer did not learn so, and sent the batch again"
    TAKEN_OVER = "another consumer had taken the partition over, was right to refuse it, and applied it itself"


@dataclass(frozen=True, slots=True)
class Batch:
    """The next records are applied in one transaction."""

    size: int
    fate: Fate


@dataclass(frozen=True, slots=True)
class Again:
    """What was published from this event on is published once more, as it is after a crash of a relay."""

    first: int


@dataclass(frozen=True, slots=True)
class PageRead:
    """The owner's rows after so many of the events are merged; of all keys, or of those with these numbers."""

    after: int
    keys: tuple[int, ...] | None


Step: TypeAlias = Batch | Again | PageRead


@dataclass(frozen=True, slots=True)
class Plan:
    """One way for the events to arrive.

    Attributes:
        order: events by number; those of one key keep their order.
        ids: of the transactions that wrote them: a place in this order may have a higher id than the next.
        steps: what happens; after them, whatever is left is applied.
    """

    order: tuple[int, ...]
    ids: tuple[int, ...]
    steps: tuple[Step, ...]


@st.composite
def plans(draw: st.DrawFn, keys: Sequence[str], *, owner: bool) -> Plan:
    """Plans for events with these keys."""
    count = len(keys)
    steps: list[st.SearchStrategy[Step]] = [
        st.builds(Batch, st.integers(1, count), st.sampled_from(Fate)),
        st.builds(Again, st.integers(0, count - 1)),
    ]
    ids = tuple(range(count))
    if owner:
        some = st.lists(st.integers(0, len(set(keys)) - 1), min_size=1, max_size=3, unique=True).map(tuple)
        steps.append(st.builds(PageRead, st.integers(0, count), st.none() | some))
        ids = tuple(draw(st.permutations(range(count))))
    return Plan(_order(draw, keys), ids, tuple(draw(st.lists(st.one_of(steps), max_size=STEPS_MAX))))


def _order(draw: st.DrawFn, keys: Sequence[str]) -> tuple[int, ...]:
    """Interleaves the keys: each time, the next event is the first one left of some key; of the first one, if 0."""
    # One choice an event, even where there is none: what takes fewer choices counts as simpler.
    choices = draw(st.lists(st.integers(0, len(set(keys)) - 1), min_size=len(keys), max_size=len(keys)))
    left = list(range(len(keys)))
    order = []
    for choice in choices:
        heads = [number for place, number in enumerate(left) if keys[number] not in {keys[n] for n in left[:place]}]
        order.append(heads[choice % len(heads)])
        left.remove(order[-1])
    return tuple(order)
