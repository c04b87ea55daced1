"""An owner, its relay and Kafka as they are seen from a cache, in memory: what may arrive, and what must come of it.

Independent of the code under test: no SQL, nothing of `outbox.cache`. A key's *history* is the list of the states that
its row had, in the order of the commits; each state is a pair of numbers that names it, or None where there is no row.

What makes it hard, as in PostgreSQL:

* A transaction takes its id early and commits late, so that of one key 763 may come before 762, and a snapshot has
  transactions in its in-progress list. Some are rolled back.
* Positions are taken before the commit, while the changed rows are locked; other transactions commit in between.
* A window of the log is what has become visible; its records go to partitions, may be published a second time, and
  late bytes of a zombie relay may follow at any time.
* The log may be adopted: ids begin again, and what was not logged yet is told once more under the new log. If the
  database was restored from a backup, the last states of some keys were never there.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Final, TypeAlias

from tests.support.caching import Rec

Row: TypeAlias = tuple[int, int]
State: TypeAlias = Row | None

TOPIC: Final = "model.rows"
FULL, PATCH_A, PATCH_B, GONE = "row.written", "row.a_patched", "row.b_patched", "row.gone"
SHARDS: Final = 2
PARTITIONS: Final = 4


@dataclass(frozen=True, slots=True)
class Change:
    """One event, as the log has it."""

    key: int
    type: str
    state: State
    at: int
    """Which state of the key's history it leads to."""
    position: int
    transaction_id: int


@dataclass(slots=True)
class OpenTransaction:
    """Of an id that was taken; with changes once it has inserted its events."""

    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ReadPage:
    """What the owner answers; keys are None for a page of a range."""

    log: str
    snapshot: str
    rows: list[dict[str, Any]]
    speaks_for: dict[int, int]
    """Its keys, and which state of their history it has."""
    after: int | None = None
    through: int | None = None
    keys: tuple[int, ...] | None = None


class Owner:
    """The owner's database: one table, one log."""

    def __init__(self, rng: Random, keys: int) -> None:
        self.rng = rng
        self.keys = range(keys)
        self.table: dict[int, Row] = {}
        self.history: list[list[State]] = [[None] for _ in self.keys]
        self.unlogged: list[Change] = []
        self.logs = 1
        self._open: dict[int, OpenTransaction] = {}
        self._locked: set[int] = set()
        self._next_id = 100
        self._highest_ended = 99
        self._position = 0
        self._commits: list[dict[int, State]] = []
        """What each commit replaced, for going back to a backup."""
        self._paged: set[int] = set()
        """Positions of changes that a page held before they were logged."""

    @property
    def log_id(self) -> str:
        """Grows with each adoption."""
        return f"18c2a3b4d{self.logs:02x}-ab12"

    def work(self, changes: int) -> None:
        """Commit about this many changes."""
        while changes > 0:
            flushed = [number for number, found in self._open.items() if found.changes]
            idle = [number for number, found in self._open.items() if not found.changes]
            choice = self.rng.random()
            if choice < 0.3 and len(idle) < 6:
                self._open[self._next_id] = OpenTransaction()
                self._next_id += self.rng.choice((1, 1, 1, 2))
            elif choice < 0.6 and idle and len(flushed) < 3:
                self._flush(self.rng.choice(idle))
            elif choice < 0.95 and flushed:
                changes -= self._commit(self.rng.choice(flushed))
            elif self._open and self.rng.random() < 0.2:
                self._roll_back(self.rng.choice(list(self._open)))

    def end_all(self) -> None:
        """Commit what has inserted its events, roll back the rest."""
        for number, found in list(self._open.items()):
            if found.changes:
                self._commit(number)
            else:
                self._roll_back(number)

    def _flush(self, number: int) -> None:
        found = self._open[number]
        size = self.rng.choice((1, 2, 10, 60))
        for key in self.rng.sample(self.keys, min(size, len(self.keys))):
            if key in self._locked:
                continue
            self._locked.add(key)
            self._position += 1
            name = len(self.history[key])
            row = self.table.get(key)
            kind = FULL if row is None else self.rng.choices((FULL, PATCH_A, PATCH_B, GONE), (3, 3, 3, 2))[0]
            after: State = (name, name)
            if kind == GONE:
                after = None
            elif kind != FULL:
                assert row is not None
                after = (name, row[1]) if kind == PATCH_A else (row[0], name)
            found.changes.append(Change(key, kind, after, name, self._position, number))

    def _commit(self, number: int) -> int:
        changes = self._open.pop(number).changes
        replaced: dict[int, State] = {}
        for change in changes:
            replaced[change.key] = self.table.get(change.key)
            self._set(change.key, change.state)
            self._locked.discard(change.key)
            self.unlogged.append(change)
        self._commits.append(replaced)
        self._highest_ended = max(self._highest_ended, number)
        return len(changes)

    def _set(self, key: int, state: State) -> None:
        self.history[key].append(state)
        if state is None:
            self.table.pop(key, None)
        else:
            self.table[key] = state

    def _roll_back(self, number: int) -> None:
        for change in self._open.pop(number).changes:
            self._locked.discard(change.key)
        self._highest_ended = max(self._highest_ended, number)

    def snapshot(self) -> str:
        """As `pg_current_snapshot()` has it: its xmax follows the highest id that has ended."""
        xmax = self._highest_ended + 1
        in_progress = sorted(number for number in self._open if number < xmax)
        return f"{in_progress[0] if in_progress else xmax}:{xmax}:{','.join(map(str, in_progress))}"

    def read_range(self, after: int | None, through: int | None) -> ReadPage:
        """The rows of a range of keys."""
        low = -1 if after is None else after
        high = len(self.keys) - 1 if through is None else through
        rows = [self._document(key, row) for key, row in sorted(self.table.items()) if low < key <= high]
        self._paged |= {change.position for change in self.unlogged if low < change.key <= high}
        return ReadPage(self.log_id, self.snapshot(), rows, self._at(range(low + 1, high + 1)), after, through)

    def read_keys(self, keys: Iterable[int]) -> ReadPage:
        """The rows of single keys."""
        asked = tuple(keys)
        rows = [self._document(key, self.table[key]) for key in asked if key in self.table]
        self._paged |= {change.position for change in self.unlogged if change.key in asked}
        return ReadPage(self.log_id, self.snapshot(), rows, self._at(asked), keys=asked)

    def _at(self, keys: Iterable[int]) -> dict[int, int]:
        return {key: len(self.history[key]) - 1 for key in keys}

    @staticmethod
    def _document(key: int, row: Row) -> dict[str, Any]:
        return {"id": key, "a": row[0], "b": row[1]}

    def adopt(self, *, lost_commits: int = 0) -> set[int]:
        """Begin a new log, after a dump and restore, or from a backup that lacks the last commits.

        Returns the keys that are on their way back for a while: those whose last states were never there, and those
        of changes that a page of the former log holds already, and that the new log tells under another id.
        """
        for number in list(self._open):
            self._roll_back(number)
        lost = self._forget(lost_commits)
        self.logs += 1
        self._next_id = self.rng.choice((10, self._next_id))
        number, self._next_id = self._next_id, self._next_id + 1
        self._highest_ended = number
        self._commits.clear()
        told_again = {change.key for change in self.unlogged}
        again: list[Change] = []
        for change in self.unlogged:
            again.append(replace(change, at=len(self.history[change.key]), transaction_id=number))
            self.history[change.key].append(change.state)
        self.unlogged = again
        for key in lost - told_again:
            self.history[key].append(self.table.get(key))
        return lost | {change.key for change in self.unlogged if change.position in self._paged}

    def _forget(self, commits: int) -> set[int]:
        lost: set[int] = set()
        for replaced in reversed(self._commits[len(self._commits) - commits :] if commits else []):
            for key, state in replaced.items():
                lost.add(key)
                # Of the key's events that are not logged yet, the last is of this commit.
                mine = [change for change in self.unlogged if change.key == key]
                if mine:
                    self.unlogged.remove(mine[-1])
                if state is None:
                    self.table.pop(key, None)
                else:
                    self.table[key] = state
        return lost


class Relay:
    """Publishes the log to partitions; numbers its windows for each shard."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.partitions: list[list[Rec]] = [[] for _ in range(PARTITIONS)]
        self.changes: dict[bytes, Change] = {}
        """By `ob-pos`."""
        self._windows = [0] * SHARDS
        self._last: list[list[Rec]] = [[], []]

    def publish(self, shard: int) -> None:
        """Log what has become visible in windows, and publish them, maybe twice."""
        rng = self.owner.rng
        rows = sorted((row for row in self.owner.unlogged if row.key % SHARDS == shard), key=lambda row: row.position)
        self.owner.unlogged = [row for row in self.owner.unlogged if row.key % SHARDS != shard]
        size = rng.choice((1_000_000, 1_000_000, 50, 15))
        for start in range(0, len(rows), size):
            self._windows[shard] += 1
            window = [
                self._record(row, shard, self._windows[shard], ordinal)
                for ordinal, row in enumerate(rows[start : start + size], start=1)
            ]
            if rng.random() < 0.2:  # the relay dies: a prefix is out, and the last two windows are published again
                self._append(self._prefixes(window))
                self._append(self._last[shard])
            self._append(window)
            self._last[shard] = window

    def zombie(self) -> None:
        """Late bytes of a relay that lost its lease."""
        rng = self.owner.rng
        records = rng.choice(self.partitions)
        if records:
            start = rng.randrange(len(records))
            self._append(records[start : start + rng.choice((1, 5, 100))])

    def _prefixes(self, window: list[Rec]) -> Iterator[Rec]:
        for number in range(PARTITIONS):
            mine = [record for record in window if record.partition == number]
            yield from mine[: self.owner.rng.randint(0, len(mine))]

    def _append(self, records: Iterable[Rec]) -> None:
        for record in list(records):
            log = self.partitions[record.partition]
            log.append(Rec(len(log), record.key, record.value, record.headers, topic=TOPIC, partition=record.partition))

    def _record(self, row: Change, shard: int, window: int, ordinal: int) -> Rec:
        where = f"{self.owner.log_id}/{shard}/{window}/{ordinal}/{row.position}/{row.transaction_id}".encode()
        self.changes[where] = row
        body = f'{{"id":{row.key}'
        if row.state is not None and row.type != PATCH_B:
            body += f',"a":{row.state[0]}'
        if row.state is not None and row.type != PATCH_A:
            body += f',"b":{row.state[1]}'
        headers: list[tuple[str, bytes | None]] = [("ce_type", row.type.encode()), ("ob-pos", where)]
        partition = row.key // SHARDS % PARTITIONS
        return Rec(0, str(row.key).encode(), f"{body}}}".encode(), headers, topic=TOPIC, partition=partition)
