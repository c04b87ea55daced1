"""The fold: what remains of one key's events in a batch, and which of them have to wait. Pure.

A full row or `DELETE` makes everything before it irrelevant, failed events included: that is how a poison event heals.
A patch changes what is known of the row so far; where the batch began in the middle of the row's life that is only the
patch's own columns, the later over the earlier, and the database has the rest.

A failed event, and a patch of a row that is known to be absent, begin a queue: the events from there on wait in
parking, in order, because applying a later one first would show a state that never was. The next full row or `DELETE`
ends it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from pydantic import BaseModel

from outbox.cache.effects import DELETE, Delete, Patch
from outbox.wire import Position


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an event cannot be applied: the name of the error, for grouping, and what it said."""

    reason: str
    detail: str

    @classmethod
    def of(cls, error: BaseException) -> "Fault":
        """From the error."""
        return cls(type(error).__name__, str(error))


ROW_MISSING: Final = Fault(
    "RowMissing", "a patch came, but the cache has no row to change; a full row of the key resolves it"
)

Effect: TypeAlias = BaseModel | Patch | Delete | Fault

_LATER: Final = (Patch, Fault)
"""What says nothing without what came before. Asking for BaseModel instead costs six times more, for every event."""


@dataclass(slots=True)
class Step:
    """One event of a key: what its handler said, and where it came from."""

    effect: Effect
    position: Position | None
    source: Any = None
    """The record, for parking."""


@dataclass(slots=True)
class Folded:
    """What to do about one key.

    Attributes:
        base: the row as the batch leaves it, or DELETE; None if the batch has nothing but patches.
        columns: the patched columns, where there is no base.
        last: the event that the row will show as its last; None if nothing takes effect.
        queue: the steps that wait in parking.
        fault: why the first of them does.
    """

    base: BaseModel | Delete | None = None
    columns: dict[str, object] = field(default_factory=dict)
    last: Step | None = None
    queue: Sequence[Step] = ()
    fault: Fault | None = None


def fold(steps: Sequence[Step]) -> Folded:
    """Fold one key's steps, in order."""
    start = len(steps) - 1
    if start == 0 and not isinstance(steps[0].effect, _LATER):  # as most keys of a large cache
        return Folded(steps[0].effect, {}, steps[0])
    while start >= 0 and isinstance(steps[start].effect, _LATER):
        start -= 1
    if start < 0:
        return _from_patches(steps)
    full = steps[start]
    assert not isinstance(full.effect, _LATER)
    folded = Folded(full.effect, {}, full)
    if start + 1 < len(steps):
        _patch_base(folded, steps[start + 1 :])
    return folded


def _from_patches(steps: Sequence[Step]) -> Folded:
    folded = Folded()
    for index, step in enumerate(steps):
        if isinstance(step.effect, Fault):
            folded.fault, folded.queue = step.effect, steps[index:]
            return folded
        assert isinstance(step.effect, Patch)
        folded.columns |= step.effect.columns
        folded.last = step
    return folded


def _patch_base(folded: Folded, steps: Sequence[Step]) -> None:
    changes: dict[str, object] = {}
    for index, step in enumerate(steps):
        if isinstance(step.effect, Fault) or folded.base is DELETE:
            folded.fault = step.effect if isinstance(step.effect, Fault) else ROW_MISSING
            folded.queue = steps[index:]
            break
        assert isinstance(step.effect, Patch)
        changes |= step.effect.columns
        folded.last = step
    if changes:
        assert isinstance(folded.base, BaseModel)
        folded.base = patched(folded.base, changes)


def patched(row: BaseModel, columns: Mapping[str, object]) -> BaseModel:
    """The row with these columns changed; their values have been checked."""
    return row.model_copy(update=dict(columns))


def newest_log_only(steps: list[Step]) -> list[Step]:
    """Without the events of older logs that came after one of a newer log: the higher ordinal wins."""
    kept: list[Step] = []
    highest = 0
    for step in steps:
        if step.position is not None:
            if step.position.log_ordinal < highest:
                continue
            highest = step.position.log_ordinal
        kept.append(step)
    return kept
