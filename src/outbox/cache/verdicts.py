"""What became of each record of one key, by the rules of the consumer and of the merge; pure.

Records are judged in the order of their offsets. The first rule that fits decides:

    not read yet      at or behind the consumer's position
    replayed          sent once more on purpose, and the cache does not take such
    duplicate         its (window, ordinal) is at or below one that came before, of the same log and shard
    unknown type      the cache has no handler for it
    parked            it waits
    part of a page    a page of the owner that speaks for the key has seen its transaction
    older log         the row, or what deleted it, is of a newer log
    applied last      row or tombstone say so
    superseded        a later event of the key took effect
    no trace          none of these: discarded while it was parked, or the row was changed by other hands
"""

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from outbox import wire
from outbox.consumer.record import Arrival, event_id
from outbox.wire import Position

_TIME_MS_MAX: Final = 253_402_300_799_000


class Verdict(enum.StrEnum):
    """See the module."""

    NOT_READ = "not read yet"
    REPLAYED = "replayed on purpose"
    DUPLICATE = "duplicate"
    UNKNOWN_TYPE = "unknown type"
    PARKED = "parked"
    SEEN_BY_PAGE = "part of a page"
    OLDER_LOG = "older log"
    APPLIED_LAST = "applied last"
    SUPERSEDED = "superseded"
    NO_TRACE = "no trace"


_LAST: Final = Verdict.APPLIED_LAST


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One record and its verdict.

    Attributes:
        because: the offset of the record, or the id of the page, that decided; where one did.
    """

    offset: int
    event_type: str | None
    event_id: str | None
    at: datetime
    log_id: str | None
    position: int | None
    transaction_id: int | None
    verdict: Verdict
    because: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the database says, as far as verdicts need it.

    Attributes:
        next_offset: of the consumer, in the partition of the records.
        handled: event types that the cache takes; None where its declaration is not at hand.
        replays: whether it takes replayed records.
        parked: offsets of events that wait.
        offset: of the row's last event, if it came from this partition.
        position: of the last event of row or tombstone, with its log.
        log_id: of row or tombstone.
    """

    next_offset: int
    handled: Collection[str] | None = None
    replays: bool = False
    parked: Collection[int] = ()
    offset: int | None = None
    position: int | None = None
    log_id: str | None = None


@dataclass(slots=True)
class Scan:
    """Goes through a partition: notes duplicates among all of its records, keeps those of the key."""

    marks: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    firsts: dict[Position, int] = field(default_factory=dict)
    """Offsets of the key's records by what they say of themselves."""
    records: list[tuple[Arrival, int | None, bool]] = field(default_factory=list)
    """Of the key: the record, the offset of the same one before, and whether it is a duplicate."""

    def take(self, found: Arrival, *, is_of_key: bool) -> None:
        """The next record."""
        at = found.position
        duplicate = False
        if at is not None and not found.is_replay:
            mark, origin = (at.window, at.ordinal), (at.log_id, at.shard)
            duplicate = mark <= self.marks.get(origin, (-1, -1))
            if not duplicate:
                self.marks[origin] = mark
        if is_of_key:
            self.records.append((found, self.firsts.get(at) if at else None, duplicate))
            if at is not None:
                self.firsts.setdefault(at, found.record.offset)


def judge(scan: Scan, known: Known, seen: Mapping[int, int]) -> list[Judged]:
    """The verdict of each record of the key; `seen` says by offset which page contains it."""
    firm = [_judge(found, first, known, seen, duplicate=duplicate) for found, first, duplicate in scan.records]
    applied = [
        one.record.offset for (one, _, _), (verdict, _) in zip(scan.records, firm, strict=True) if verdict is _LAST
    ]
    last = known.offset if known.offset is not None else max(applied, default=None)
    judged = []
    for (found, _, _), (verdict, because) in zip(scan.records, firm, strict=True):
        if verdict is Verdict.NO_TRACE and last is not None and found.record.offset < last:
            verdict, because = Verdict.SUPERSEDED, last  # noqa: PLW2901 - the verdict of this record, refined
        judged.append(_judged(found, verdict, because))
    return judged


def _judge(
    found: Arrival, first: int | None, known: Known, seen: Mapping[int, int], *, duplicate: bool
) -> tuple[Verdict, int | None]:
    offset, at = found.record.offset, found.position
    rules: Iterable[tuple[bool, Verdict, int | None]] = (
        (offset >= known.next_offset, Verdict.NOT_READ, None),
        (found.is_replay and not known.replays, Verdict.REPLAYED, None),
        (duplicate, Verdict.DUPLICATE, first),
        (known.handled is not None and found.event_type not in known.handled, Verdict.UNKNOWN_TYPE, None),
        (offset in known.parked, Verdict.PARKED, None),
        (offset in seen, Verdict.SEEN_BY_PAGE, seen.get(offset)),
        (_is_older(at, known.log_id), Verdict.OLDER_LOG, None),
        (_is_last(offset, at, known), Verdict.APPLIED_LAST, None),
    )
    return next(((verdict, because) for fits, verdict, because in rules if fits), (Verdict.NO_TRACE, None))


def _is_older(at: Position | None, log_id: str | None) -> bool:
    return at is not None and log_id is not None and at.log_ordinal < wire.log_ordinal(log_id)


def _is_last(offset: int, at: Position | None, known: Known) -> bool:
    if known.offset is not None:
        return offset == known.offset
    return at is not None and (at.log_id, at.position) == (known.log_id, known.position)


def _judged(found: Arrival, verdict: Verdict, because: int | None) -> Judged:
    at = found.position
    return Judged(
        offset=found.record.offset,
        event_type=found.event_type,
        event_id=event_id(found.record),
        at=datetime.fromtimestamp(min(max(found.record.timestamp, 0), _TIME_MS_MAX) / 1000, UTC),
        log_id=at.log_id if at else None,
        position=at.position if at else None,
        transaction_id=at.transaction_id if at else None,
        verdict=verdict,
        because=because,
    )
