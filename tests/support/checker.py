"""The exact history checker: what a run left behind, compared change by change with what it committed.

The truth is a business table written in the transaction of each event: for every key a chain of changes
1..n. Against it stand the whole topic from offset 0, the cache, and samples of the cache taken during the
run. Nothing is compared by count alone. `judge` is a pure function of these sequences;
`tests.support.history` reads them.

An anomaly is a name for one way to break a promise (docs/concepts.md says what the words mean). A run is
*valid* only if there is none and all that it was meant to exercise did happen: a run in which nothing was
rolled back says nothing about rollbacks.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, TypeAlias

from outbox.wire import Position

Row: TypeAlias = Mapping[str, object]

EXAMPLES_MAX: Final = 5


class Anomaly(StrEnum):
    """The ways to break a promise; the comment says which record, row or sample is the culprit."""

    LOST = "lost"  # a committed change that is nowhere on the topic
    SKIP = "skip"  # a lost change that a later one of its key went past: no lag will ever bring it
    PHANTOM = "phantom"  # a record that no committed change explains: rolled back, or emitted twice
    NONMONOTONIC = "nonmonotonic"  # a change whose first record comes after that of a later change of its key
    OVERTAKEN = "overtaken"  # a first record at or below a position already passed: every consumer drops it
    DUPLICATE = "duplicate"  # records beyond the first of an event, where there are more than the run allows
    WRONG_PARTITION = "wrong_partition"  # a record outside the partition that every Kafka client computes for its key
    POSITION_REUSED = "position_reused"  # one position for two events, or one event under two positions
    CACHE_DIVERGENCE = "cache_divergence"  # a cached row that is missing, left over, or differs from the source
    CACHE_REGRESSION = "cache_regression"  # a sample older than the one before it, or of a row that never was


@dataclass(frozen=True, slots=True)
class Change:
    """One committed change of a key, from the business table.

    Attributes:
        key: the Kafka key.
        version: place in the key's chain, from 1 without gaps.
        identity: what a record of this change, and of no other attempt at a change, carries.
        row: what a cache holds once it has applied the change; None if nothing.
    """

    key: str
    version: int
    identity: str
    row: Row | None


@dataclass(frozen=True, slots=True)
class TopicRecord:
    """One record of the topic; the fields from its headers are None where it has no such header."""

    partition: int
    offset: int
    key: str
    event_id: str | None
    identity: str
    position: Position | None

    def __str__(self) -> str:
        return f"{self.identity} at {self.partition}:{self.offset}, key {self.key}"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one observer saw of one key in the cache; samples are in the order in which he looked."""

    key: str
    row: Row | None


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Everything that a run left behind.

    Attributes:
        changes: the truth.
        records: the whole topic, in any order of partitions.
        rolled_back: identities that were emitted and then rolled back, as far as known.
        parked: identities set aside as poison, which may be on the topic or not.
        source: the owner's rows by key, in the cache's shape; by default what the changes leave.
        cache: the cache's rows by key; None if the run had no cache.
        samples: of the cache, by one observer.
        partition_of: the partition of a key.
        duplicates_max: how many duplicates the run's faults allow; none without faults.
        happened: how often each thing happened that the run was meant to exercise.
    """

    changes: Sequence[Change]
    records: Sequence[TopicRecord]
    partition_of: Callable[[str], int]
    rolled_back: Collection[str] = frozenset()
    parked: Collection[str] = frozenset()
    source: Mapping[str, Row] | None = None
    cache: Mapping[str, Row] | None = None
    samples: Sequence[Sample] = ()
    duplicates_max: int = 0
    happened: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """How often an anomaly occurred, and the first few places."""

    count: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the checker says; `published` counts committed changes found on the topic, `records` all of it."""

    committed: int
    published: int
    records: int
    duplicates: int
    rolled_back: int
    keys: int
    cached: int
    samples: int
    findings: Mapping[Anomaly, Finding]
    did_not_happen: tuple[str, ...]

    @property
    def valid(self) -> bool:
        """No anomaly, something was committed, and everything meant to be exercised happened."""
        return self.committed > 0 and not self.did_not_happen and not any(f.count for f in self.findings.values())

    def count(self, anomaly: Anomaly) -> int:
        """How often an anomaly occurred."""
        return self.findings[anomaly].count

    def explain(self) -> str:
        """The verdict as text: one line if valid, otherwise every anomaly with its first examples."""
        head = f"{self.committed} changes of {self.keys} keys, {self.records} records, "
        head += f"{self.duplicates} duplicates"
        if self.valid:
            return f"valid: {head}"
        lines = [f"not valid: {head}"]
        if not self.committed:
            lines.append("  nothing was committed")
        lines += [f"  did not happen: {name}" for name in self.did_not_happen]
        for anomaly, finding in self.findings.items():
            if finding.count:
                lines.append(f"  {anomaly}: {finding.count}")
                lines += [f"    {example}" for example in finding.examples]
        return "\n".join(lines)


class BrokenTruthError(ValueError):
    """The business table contradicts itself: the workload is at fault, not what it tests."""


def judge(history: History) -> Verdict:
    """Compare a history with its truth.

    Raises:
        BrokenTruthError: the truth itself has a gap, a repeated identity, or differs from the given source.
    """
    facts = _Facts(history)
    return Verdict(
        committed=len(history.changes),
        published=len(facts.found.keys() & facts.by_identity.keys()),
        records=len(history.records),
        duplicates=len(facts.duplicates),
        rolled_back=len(history.rolled_back),
        keys=len(facts.chains),
        cached=len(history.cache or {}),
        samples=len(history.samples),
        findings={anomaly: _finding(check(history, facts)) for anomaly, check in _CHECKS.items()},
        did_not_happen=tuple(name for name, count in history.happened.items() if not count),
    )


class _Facts:
    """What several checks need: the truth by key and identity, the records in order without duplicates."""

    def __init__(self, history: History) -> None:
        self.by_identity = {change.identity: change for change in history.changes}
        if len(self.by_identity) != len(history.changes):
            raise BrokenTruthError(
                "two committed changes have one identity: make every change of the workload distinct"
            )
        self.chains = _chains(history.changes)
        final = {key: chain[-1].row for key, chain in self.chains.items()}
        self.source = {key: row for key, row in final.items() if row is not None}
        if history.source is not None and dict(history.source) != self.source:
            key = next(k for k in history.source.keys() | self.source if history.source.get(k) != self.source.get(k))
            raise BrokenTruthError(
                f"the source says {history.source.get(key)} of key {key}, "
                f"its last change {self.source.get(key)}: write both in one transaction"
            )
        self.first: list[TopicRecord] = []
        self.duplicates: list[TopicRecord] = []
        seen: set[Hashable] = set()
        for record in sorted(history.records, key=lambda r: (r.partition, r.offset)):
            event: Hashable = record.event_id or (record.partition, record.offset)
            (self.duplicates if event in seen else self.first).append(record)
            seen.add(event)
        self.found: dict[str, TopicRecord] = {}
        for record in self.first:
            self.found.setdefault(record.identity, record)
        there = self.found.keys() | set(history.parked)
        self.lost = [change for change in history.changes if change.identity not in there]


def _chains(changes: Sequence[Change]) -> dict[str, list[Change]]:
    chains: dict[str, list[Change]] = defaultdict(list)
    for change in changes:
        chains[change.key].append(change)
    for key, chain in chains.items():
        chain.sort(key=lambda change: change.version)
        versions = [change.version for change in chain]
        if versions != list(range(1, len(chain) + 1)):
            raise BrokenTruthError(
                f"key {key} has the versions {versions}: number its changes from 1 under its row lock"
            )
    return dict(chains)


def _finding(culprits: Iterator[str]) -> Finding:
    texts = list(culprits)
    return Finding(len(texts), tuple(texts[:EXAMPLES_MAX]))


# ------------------------------------------------------------------------------------------------ the topic


def _lost(_: History, facts: _Facts) -> Iterator[str]:
    for change in facts.lost:
        yield f"version {change.version} of key {change.key}: {change.identity}"


def _skip(_: History, facts: _Facts) -> Iterator[str]:
    for change in facts.lost:
        last = max((c.version for c in facts.chains[change.key] if c.identity in facts.found), default=0)
        if change.version < last:
            yield f"version {change.version} of key {change.key}, while version {last} is there"


def _phantom(history: History, facts: _Facts) -> Iterator[str]:
    for record in facts.first:
        change = facts.by_identity.get(record.identity)
        if record.identity in history.rolled_back:
            yield f"rolled back: {record}"
        elif record.event_id is None or record.position is None:
            yield f"without ce_id or ob-pos: {record}"
        elif change is None or change.key != record.key:
            yield f"never committed: {record}"
        elif facts.found[record.identity] is not record:
            yield f"a second event for one change: {record}"


def _nonmonotonic(_: History, facts: _Facts) -> Iterator[str]:
    newest: dict[tuple[int, str], int] = defaultdict(int)
    for record in facts.found.values():
        change = facts.by_identity.get(record.identity)
        if change is None:
            continue
        place = (record.partition, change.key)
        if change.version < newest[place]:
            yield f"version {change.version} after version {newest[place]}: {record}"
        newest[place] = max(newest[place], change.version)


def _overtaken(_: History, facts: _Facts) -> Iterator[str]:
    passed: dict[tuple[int, int], tuple[int, int, int]] = {}
    # Duplicates lie at or below what they repeat, so only first records move the mark.
    for record in facts.first:
        if record.position is None:
            continue
        stream = (record.partition, record.position.shard)
        mark = (record.position.log_ordinal, *record.position.mark)
        if mark <= passed.get(stream, (0, 0, 0)):
            yield f"position {mark} after {passed[stream]}: {record}"
        passed[stream] = max(mark, passed.get(stream, mark))


def _duplicate(history: History, facts: _Facts) -> Iterator[str]:
    if len(facts.duplicates) > history.duplicates_max:
        yield from map(str, facts.duplicates)


def _wrong_partition(history: History, _: _Facts) -> Iterator[str]:
    for record in history.records:
        if record.partition != (right := history.partition_of(record.key)):
            yield f"belongs to partition {right}: {record}"


def _position_reused(history: History, _: _Facts) -> Iterator[str]:
    # A replayed window repeats event and position together; anything else makes a position mean two things.
    event_at: dict[tuple[object, ...], str] = {}
    position_of: dict[str, Position] = {}
    for record in history.records:
        if record.position is None or record.event_id is None:
            continue
        log_id, shard, window, ordinal, position, _transaction_id = record.position
        for place in (("mark", log_id, shard, window, ordinal), ("position", log_id, position)):
            if event_at.setdefault(place, record.event_id) != record.event_id:
                yield f"{'/'.join(map(str, place))} also belongs to event {event_at[place]}: {record}"
        if position_of.setdefault(record.event_id, record.position) != record.position:
            yield f"also stands at {position_of[record.event_id]}, here at {record.position}: {record}"


# ------------------------------------------------------------------------------------------------ the cache


def _cache_divergence(history: History, facts: _Facts) -> Iterator[str]:
    if history.cache is None:
        return
    for key in sorted(facts.source.keys() | history.cache.keys()):
        wanted, cached = facts.source.get(key), history.cache.get(key)
        if wanted != cached:
            yield f"key {key}: source {_text(wanted)}, cache {_text(cached)}"


def _cache_regression(history: History, facts: _Facts) -> Iterator[str]:
    """Each sample must show a version not below the one before it.

    A row may look the same at several versions (a name taken back, absence before the first and after the
    last), so the lowest version that is still possible is kept: if that choice fails, every choice fails.
    """
    reached: dict[str, int] = defaultdict(int)
    for sample in history.samples:
        states: list[Row | None] = [None, *(change.row for change in facts.chains.get(sample.key, []))]
        possible = [version for version, row in enumerate(states) if row == sample.row]
        later = [version for version in possible if version >= reached[sample.key]]
        if later:
            reached[sample.key] = later[0]
        else:
            seen = f"was version {possible[-1]}" if possible else "never was"
            yield f"key {sample.key}: {_text(sample.row)}, which {seen}, after version {reached[sample.key]}"


def _text(row: Row | None) -> str:
    return "nothing" if row is None else ", ".join(f"{name}={value!r}" for name, value in row.items())


_CHECKS: Final[Mapping[Anomaly, Callable[[History, _Facts], Iterator[str]]]] = {
    Anomaly.LOST: _lost,
    Anomaly.SKIP: _skip,
    Anomaly.PHANTOM: _phantom,
    Anomaly.NONMONOTONIC: _nonmonotonic,
    Anomaly.OVERTAKEN: _overtaken,
    Anomaly.DUPLICATE: _duplicate,
    Anomaly.WRONG_PARTITION: _wrong_partition,
    Anomaly.POSITION_REUSED: _position_reused,
    Anomaly.CACHE_DIVERGENCE: _cache_divergence,
    Anomaly.CACHE_REGRESSION: _cache_regression,
}
