"""A cache's table: does it fit the declaration, and the statements that name it.

A statement cannot take a table or a column as a parameter, so those that touch a user's table are templates in a `.sql`
file. They are filled once, when the table has been found in the catalogue, with identifiers that the catalogue returned
and `quote` quoted. Values are always parameters (ADR 0011).
"""

import re
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Final, Union, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel

from outbox import postgres
from outbox.errors import CacheDeclarationError
from outbox.postgres import Connection, Pool, Record, Statement

SQL: Final = postgres.Statements("outbox", "cache/table.sql")

SYNCED: Final = "last_synced_at"
RUNTIME: Final = ("outbox_log", "outbox_position", "outbox_transaction_id", "outbox_partition", "outbox_offset")
"""Of the event that wrote the row: its log, its position there, its transaction; its partition and offset in Kafka."""
PAGE: Final = "outbox_page"
"""The last page of the owner that wrote the row."""

_TABLE_KINDS: Final = frozenset({"r", "p"})
_KEY_TYPES: Final[dict[str, type]] = {"uuid": UUID, "int2": int, "int4": int, "int8": int}
_WIDEST: Final = {UUID: "uuid", int: "bigint", str: "text"}
_KEY_TEXT_TYPES: Final = frozenset({"text", "varchar", "bpchar", "citext"})
_JSON: Final = frozenset({"json", "jsonb"})
_CATEGORIES: Final = {
    "A": "array",
    "B": "bool",
    "D": "date/time",
    "E": "enum",
    "N": "number",
    "S": "text",
    "T": "interval",
}
_FITTING: Final[tuple[tuple[type | tuple[type, ...], str], ...]] = (
    # The first class that a field's type is a subclass of decides which categories of types can hold it.
    (Enum, "ESN"),
    (bool, "B"),
    ((int, float, Decimal), "N"),
    (str, "SE"),
    (UUID, "S"),
    ((datetime, date, time), "DS"),
    (timedelta, "TS"),
    ((list, tuple, set, frozenset), "A"),
    ((dict, BaseModel), ""),
)


@dataclass(frozen=True, slots=True)
class Table:
    """The table of a cache as the catalogue has it, checked against the row class.

    Attributes:
        oid: its identity, whatever it is called.
        columns: declared columns that events write, in the order of the row class.
        read: declared columns that readers get; `last_synced_at` too, where it is declared.
        json: columns whose values travel as JSON text.
        exact: columns whose values JSON cannot carry in every case: bytes, and numbers that are not finite.
        binary: of them, those of bytes.
        numeric: of them, those whose text may end in zeros that do not count.
    """

    oid: int
    schema: str
    name: str
    key: str
    key_type: type
    columns: tuple[str, ...]
    read: tuple[str, ...]
    json: frozenset[str]
    exact: frozenset[str]
    binary: frozenset[str]
    numeric: frozenset[str]

    @property
    def full_name(self) -> str:
        """Schema and name, quoted."""
        return f"{quote(self.schema)}.{quote(self.name)}"

    def compose(self, template: Statement, **more: str) -> Statement:
        """A statement for this table out of a template; it keeps the template's name as its crash site.

        Args:
            template: with slots in braces.
            more: further slots, of quoted names.
        """
        written = (*self.columns, *RUNTIME)
        changing = tuple(column for column in written if column != self.key)
        slots = {
            "table": self.full_name,
            "key": quote(self.key),
            "key_type": _WIDEST[self.key_type],
            "key_order": ' collate "C"' if self.key_type is str else "",
            "columns": _list("{}", self.columns),
            "columns_x": _list("x.{}", self.columns),
            "changing_page": "".join(
                f"{quote(column)} = excluded.{quote(column)}, " for column in self.columns if column != self.key
            ),
            "written": _list("{}", written),
            "written_x": _list("x.{}", written),
            "changing": _list("{}", changing),
            "changing_n": _list("n.{}", changing),
            "changing_excluded": _list("{0} = excluded.{0}", changing),
            "read_c": ", ".join(self._reading(column) for column in self.read),
            **more,
        }
        text = _SLOT.sub(lambda match: slots[match[1]], template.text)
        return replace(template, text=text)

    def _reading(self, column: str) -> str:
        # JSON as text, so that a codec that the service set on its connections cannot decode it a second time.
        name = quote(column)
        return f"c.{name}::text as {name}" if column in self.json else f"c.{name}"


_SLOT: Final = re.compile(r"\{(\w+)\}")


def quote(identifier: str) -> str:
    """An SQL identifier, exactly as given."""
    return '"' + identifier.replace('"', '""') + '"'


def quoted_name(table: str) -> str:
    """The name of a cache's table as it is declared, with its schema or without."""
    return ".".join(quote(part) for part in table.split(".", 1))


def _list(form: str, columns: Sequence[str]) -> str:
    return ", ".join(form.format(quote(column)) for column in columns)


async def find(db: Connection | Pool, row: type[BaseModel], table: str, key: str) -> Table:
    """The table of a declaration.

    Raises:
        CacheDeclarationError: it does not exist or does not fit; says which column and what to do.
    """
    oid = await SQL.resolve.fetchval(db, quoted_name(table))
    return await find_by_oid(db, row, table, key, oid)


async def find_by_oid(db: Connection | Pool, row: type[BaseModel], table: str, key: str, oid: int | None) -> Table:
    """The same for a table that is known by its identity; errors call it `table`.

    Raises:
        CacheDeclarationError: see `find`.
    """
    found = [] if oid is None else await SQL.describe.fetch(db, oid)
    if not found or found[0]["kind"] not in _TABLE_KINDS:
        raise CacheDeclarationError(
            f"cache {table}: there is no such table on the connection's search_path; create it in a migration of "
            "the service, followed by: select outbox.prepare_cache('...')"
        )
    columns: dict[str, Record] = {column["name"]: column for column in found}
    fields = tuple(row.model_fields)
    for name in (*RUNTIME, PAGE, SYNCED):
        if name not in columns:
            raise CacheDeclarationError(
                f"cache {table}: column {name} is missing; run in a migration: select outbox.prepare_cache('{table}')"
            )
    for name in fields:
        _check_column(table, name, row.model_fields[name].annotation, columns.get(name))
    _check_unwritten(table, fields, found)
    return Table(
        oid=found[0]["oid"],
        schema=found[0]["schema"],
        name=found[0]["table"],
        key=key,
        key_type=key_type_of(table, columns[key]),
        columns=tuple(name for name in fields if name != SYNCED),
        read=fields,
        json=frozenset(name for name in fields if columns[name]["type"] in _JSON),
        exact=frozenset(name for name in fields if columns[name]["type"] in {"bytea", "float4", "float8", "numeric"}),
        binary=frozenset(name for name in fields if columns[name]["type"] == "bytea"),
        numeric=frozenset(name for name in fields if columns[name]["type"] == "numeric"),
    )


def key_type_of(table: str, column: Record) -> type:
    """As what keys of a column, from `describe`, are compared.

    Raises:
        CacheDeclarationError: it cannot be a key.
    """
    name = column["name"]
    if not column["is_unique"]:
        raise CacheDeclarationError(f"cache {table}: key {name} needs a primary key or a unique index of its own")
    if column["type"] in _KEY_TEXT_TYPES:
        return str
    if column["type"] not in _KEY_TYPES:
        raise CacheDeclarationError(f"cache {table}: key {name} is {column['type']}; use uuid, text or an integer type")
    return _KEY_TYPES[column["type"]]


def _check_column(table: str, name: str, annotation: Any, column: Record | None) -> None:
    if column is None:
        raise CacheDeclarationError(
            f"cache {table}: column {name} is missing; add it, or drop the field from the row class"
        )
    if column["generated"]:
        raise CacheDeclarationError(f"cache {table}: column {name} is generated; drop the field from the row class")
    fits = _fits(annotation, column["type"], column["category"])
    if not fits:
        kind = _CATEGORIES.get(column["category"], column["type"])
        raise CacheDeclarationError(
            f"cache {table}: column {name} is {column['type']} ({kind}), which does not hold "
            f"{annotation}; change one of them"
        )


def _check_unwritten(table: str, fields: Collection[str], columns: Sequence[Record]) -> None:
    for column in columns:
        free = not column["required"] or column["has_default"] or column["generated"]
        if column["name"] not in fields and not free:
            raise CacheDeclarationError(
                f"cache {table}: column {column['name']} is not null without a default and not in the row class, so "
                "no row could be inserted; declare it, or give it a default"
            )


def _fits(annotation: Any, type_name: str, category: str) -> bool:
    """Whether values of an annotation survive the way into a column and back; unknown annotations are believed."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _fits(get_args(annotation)[0], type_name, category)
    if origin in {Union, types.UnionType}:
        members = [member for member in get_args(annotation) if member is not types.NoneType]
        return all(_fits(member, type_name, category) for member in members)
    plain = origin or annotation
    if origin is typing.Literal or not isinstance(plain, type):
        return True
    if plain is UUID and type_name == "uuid":
        return True
    for classes, categories in _FITTING:
        if issubclass(plain, classes):
            return category in categories or (type_name in _JSON and plain not in {UUID, datetime, date, time})
    return True
