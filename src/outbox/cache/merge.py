"""The one merge: folded keys into the cache's table; one SQL statement for full rows, one for patches and deletions.

Rows travel as JSON, one parameter for all of them, and PostgreSQL turns each value into its column's type as it would
read a literal: arrays, jsonb, numeric, enums and domains work without a line for each (ADR 0012 has the measurements).
What JSON cannot carry, bytes and numbers that are not finite, is written the way PostgreSQL reads them as text.

A statement of a batch sees everything that earlier batches of its partition wrote, because they are serialised by the
partition's row in `outbox.positions`, and every page of the owner that was merged, because batches share the cache's
lock and pages have it alone; both are locked in an earlier statement. Which of two wins is said in `merge.sql`.
"""

import enum
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from pydantic import BaseModel

from outbox import postgres
from outbox.cache.effects import DELETE
from outbox.cache.fold import Folded, Step
from outbox.cache.handlers import Shape
from outbox.cache.table import Table
from outbox.postgres import Connection

SQL: Final = postgres.Statements("outbox", "cache/merge.sql")


class Kind(enum.IntEnum):
    """What a change does to its row."""

    ROW = 0
    PATCH = 1
    DELETION = 2


class Change:
    """One key's part of a merge, encoded.

    It holds on to no event and no row: a batch has thousands, and they had better be gone before it is written.
    """

    __slots__ = ("document", "key", "kind", "log_id")

    def __init__(self, key: str, kind: Kind, document: bytes, log_id: str | None) -> None:
        """Of the key whose text is `key`; its last event is from the log `log_id`."""
        self.key = key
        self.kind = kind
        self.document = document
        self.log_id = log_id


class Merge:
    """Merges into one cache's table."""

    def __init__(self, shape: Shape, table: Table, *, owned: bool) -> None:
        """For a table that was checked against the cache's row class.

        Args:
            shape: of the rows.
            table: as the catalogue has it.
            owned: whether there is an owner, whose page can give what a patch lacks.
        """
        self._owned = owned
        self.table: Final = table
        self.shape: Final = shape
        self._table = table
        self._merge_rows = table.compose(SQL.merge_rows)
        self._merge_changes = table.compose(SQL.merge_changes)
        self._key_field = json.dumps(table.key)

    def change(self, key: str, folded: Folded, partition: int) -> Change:
        """Encode what happens to one key, by events of a Kafka partition.

        Raises:
            ValueError: a value has no JSON form.
        """
        last, base = folded.last, folded.base
        assert last is not None
        if base is None:
            kind, body = Kind.PATCH, self._patch_document(key, folded.columns)
        elif base is DELETE:
            kind, body = Kind.DELETION, self._patch_document(key, {})
        else:
            kind, body = Kind.ROW, self._row_document(base)
        log_id = None if last.position is None else last.position.log_id
        return Change(key, kind, body[:-1] + _runtime(last, partition), log_id)

    def rows(self, rows: list[BaseModel]) -> str:
        """Rows of a page of the owner, as one JSON array."""
        if self._table.exact:
            return _array([self._row_document(row) for row in rows])
        return self.shape.rows.dump_json(rows).decode()

    async def __call__(self, connection: Connection, changes: Sequence[Change]) -> list[str]:
        """Merge changes of distinct keys; returns the keys of patches that found no row."""
        rows = [change for change in changes if change.kind is Kind.ROW]
        if rows:
            await self._merge_rows.execute(connection, self._table.oid, _keys(rows), _documents(rows))
        if len(rows) == len(changes):
            return []
        patches = [change for change in changes if change.kind is Kind.PATCH]
        deletions = [change for change in changes if change.kind is Kind.DELETION]
        missing = await self._merge_changes.fetch(
            connection,
            self._table.oid,
            _keys([*patches, *deletions]),
            _documents(patches),
            _documents(deletions),
            self._owned,
        )
        return [record["missing"] for record in missing]

    def _row_document(self, row: BaseModel) -> bytes:
        if not self._table.exact:
            return row.__pydantic_serializer__.to_json(row)
        odd = _odd(row.__dict__, self._table)
        return _with(row.__pydantic_serializer__.to_json(row, exclude=set(odd)), odd)

    def _patch_document(self, key: str, columns: dict[str, object]) -> bytes:
        odd = _odd(columns, self._table) if self._table.exact else {}
        parts = [f"{self._key_field}:{json.dumps(key)}".encode()]
        parts += [
            json.dumps(name).encode() + b":" + self.shape.adapter(name).dump_json(value)
            for name, value in columns.items()
            if name not in odd
        ]
        return _with(b"{" + b",".join(parts) + b"}", odd)


def _keys(changes: Sequence[Change]) -> list[str]:
    return [change.key for change in changes]


def _documents(changes: Sequence[Change]) -> str:
    return _array([change.document for change in changes])


def _odd(values: dict[str, object], table: Table) -> dict[str, str]:
    """The values that JSON cannot carry, as text that PostgreSQL reads."""
    odd = {}
    for name in table.exact & values.keys():
        value = values[name]
        if isinstance(value, bytes):
            odd[name] = "\\x" + value.hex()
        elif isinstance(value, float) and not math.isfinite(value):
            odd[name] = str(value)
    return odd


def _with(body: bytes, extra: dict[str, str]) -> bytes:
    if not extra:
        return body
    more = json.dumps(extra).encode()
    return more if body == b"{}" else body[:-1] + b"," + more[1:]


def _runtime(last: Step, partition: int) -> bytes:
    at, offset = last.position, "null" if last.source is None else last.source.record.offset
    if at is None:
        text = (
            f'{_origin(None, partition)},"outbox_position":null,"outbox_transaction_id":null,"outbox_offset":{offset}}}'
        )
        return text.encode()
    log_id, _, _, _, position, transaction_id = at
    return (
        f'{_origin(log_id, partition)},"outbox_position":{position},"outbox_transaction_id":{transaction_id},'
        f'"outbox_offset":{offset}}}'
    ).encode()


@lru_cache(maxsize=1024)
def _origin(log_id: str | None, partition: int) -> str:
    """What rows of one log in one partition share."""
    log = "null" if log_id is None else f'"{log_id}"'
    return f',"outbox_log":{log},"outbox_partition":{partition}'


def _array(documents: Sequence[bytes]) -> str:
    return "[" + b",".join(documents).decode() + "]"
