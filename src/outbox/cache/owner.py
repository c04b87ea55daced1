"""The owner of a cache's data, as the cache asks it: pages of rows, each with the snapshot that it was read in.

    page = await owner.page(after, 5_000)       rows in the order of their keys, the log id, pg_current_snapshot()

The snapshot is what lets a page meet live events in any order (`pages`): an event is newer than the page exactly if its
transaction is not visible in that snapshot. So everything rests on rows and snapshot being of one moment.

Guarantees of `SqlOwner`:

* Rows, snapshot and log id come from **one statement**. With two statements, a transaction that commits between them
  would be in the snapshot and not in the rows, and its event would be taken for old, for ever.
* A page is refused on a standby, whose snapshots list no transaction in progress; inside a transaction that has
  written, which sees rows that nobody else does, or that keeps the snapshot of an earlier statement; and in a
  copy of the log's database, whose transaction ids mean something else.
* A page holds every row of the query between its first and its last key, so a key that it lacks did not exist. `last`
  says that this goes on to the end of all keys.
* Values are text and JSON that do not depend on the session: UTC, ISO 8601, numeric as text with all its digits.
* What one question can cost is bounded: rows, bytes, keys.

The owner's side over HTTP is `serve`, the cache's side `http.HttpOwner`. Nothing is kept between two questions, so a
crash on either side leaves nothing behind.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, LiteralString, Protocol, runtime_checkable
from uuid import UUID

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError

from outbox import garbage, limits, postgres
from outbox.cache.table import quote
from outbox.errors import NotMigrated, OwnerError, OwnerRequestInvalid, OwnerUnavailable
from outbox.event import key_text
from outbox.postgres import Connection, Record, Statement
from outbox.transaction import Db, Transaction

SQL: Final = postgres.Statements("outbox", "cache/owner.sql")

BUCKETS: Final = 1_024
"""Into which keys are spread for comparing digests."""

_KEY_TYPES: Final[dict[str, LiteralString]] = {
    "uuid": "uuid",
    "int2": "bigint",
    "int4": "bigint",
    "int8": "bigint",
    "text": "text",
    "varchar": "text",
    "bpchar": "text",
    "citext": "text",
}
"""What a key is compared as."""
_SLOT: Final = re.compile(r"\{(\w+)\}")


class OwnerPage(BaseModel):
    """Rows of the owner's table and, read by the same statement, its log id and snapshot.

    Attributes:
        log: id of the owner's current log.
        snapshot: `pg_current_snapshot()` of the statement that read the rows.
        rows: values of JSON by column name.
        last: of a page by key order: there are no rows after it.
    """

    model_config = ConfigDict(extra="ignore")

    log: Annotated[str, Field(pattern=r"^[0-9a-f]{1,15}-[0-9a-f]{4}$")]
    snapshot: Annotated[str, Field(pattern=r"^[0-9]{1,20}:[0-9]{1,20}:([0-9]{1,20}(,[0-9]{1,20})*)?$")]
    rows: list[dict[str, Any]]
    last: bool


@runtime_checkable
class Owner(Protocol):
    """What a cache asks of its owner; `SqlOwner` and `HttpOwner` answer it.

    All methods raise OwnerUnavailable where asking again later may help, and OwnerError where it will not.
    """

    def page(self, after: object | None, limit: int) -> Awaitable[OwnerPage]:
        """All rows from behind the key `after` (None: from the first key) on, in the order of keys, at most `limit`."""
        ...

    def get(self, key: object) -> Awaitable[OwnerPage]:
        """The row of a key; no row where it does not exist."""
        ...


@runtime_checkable
class ComparableOwner(Owner, Protocol):
    """An owner that a cache can be reconciled with."""

    def get_many(self, keys: Sequence[object]) -> Awaitable[OwnerPage]:
        """The rows of these keys that exist, in no order, of one snapshot."""
        ...

    def digests(self, columns: Sequence[str]) -> Awaitable[OwnerPage]:
        """Rows `bucket`, `count`, `digest` of the buckets that are not empty, over these columns of all rows."""
        ...

    def bucket_keys(
        self, columns: Sequence[str], buckets: Sequence[int], after: str, limit: int
    ) -> Awaitable[OwnerPage]:
        """Rows `key`, `digest` of the rows in some buckets, whose key as text is after `after`, at most `limit`."""
        ...


@dataclass(frozen=True, slots=True)
class _Query:
    """The owner's query as PostgreSQL described it."""

    text: LiteralString
    columns: dict[str, str]
    key: str

    def compose(self, template: Statement, digested: Sequence[str] = ()) -> Statement:
        """A statement over the query; the columns in it are columns of the query, quoted."""
        key = f"q.{quote(self.key)}"
        kind = _KEY_TYPES[self.columns[self.key]]
        slots = {
            "query": self.text,
            "state": SQL.state.text,
            "shown": ", ".join(map(self._shown, self.columns)),
            "key": f"{key}::text" if kind == "text" else key,
            "order": f'{key}::text collate "C"' if kind == "text" else key,
            "compared": kind,
            "digested": ", ".join(map(self._digested, digested)),
        }
        return replace(template, text=_SLOT.sub(lambda match: slots[match[1]], template.text))

    def argument(self, key: object) -> object:
        """A key, or its text, as a parameter of a statement.

        Raises:
            OwnerRequestInvalid: it is no key of this query.
        """
        kind = _KEY_TYPES[self.columns[self.key]]
        try:
            text = key_text(key)
            value = UUID(text) if kind == "uuid" else int(text) if kind == "bigint" else text
        except ValueError as error:
            raise OwnerRequestInvalid("key", f"{key!r} is no {kind} ({error})", "send a key of the query") from error
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise OwnerRequestInvalid("key", f"{value} is no bigint", "send a key of the query")
        return value

    def _shown(self, name: str) -> str:
        column = quote(name)
        numeric = {"numeric": "::text", "numeric[]": "::text[]"}.get(self.columns[name], "")
        return f"q.{column}{numeric} as {column}" if numeric else f"q.{column}"

    def _digested(self, name: str) -> str:
        column = quote(name)
        return f"trim_scale(q.{column}) as {column}" if self.columns[name] == "numeric" else f"q.{column}"


class _Request(BaseModel):
    """What `serve` reads from a request's parameters."""

    model_config = ConfigDict(extra="ignore")

    after: str | None = None
    limit: Annotated[int, Field(ge=1)] = limits.OWNER_PAGE_ROWS
    key: str | None = None
    keys: Json[Annotated[list[str], Field(max_length=limits.OWNER_KEYS_MAX)]] | None = None
    columns: Json[list[str]] | None = None
    buckets: Json[Annotated[list[Annotated[int, Field(ge=0, lt=BUCKETS)]], Field(max_length=BUCKETS)]] | None = None


class SqlOwner:
    """An owner that is a query in a database with a log: the service's own, or one that it may read."""

    def __init__(self, db: Db | Callable[[], Db], query: LiteralString, *, key: str | None = None) -> None:
        """Answers from a query such as `select id as agent_id, name as agent_name from agents`.

        Args:
            db: where to read; a function is called each time, for a pool that does not exist yet when modules are
                imported.
            query: a select without parameters, one row a key, with a column for each of the cache's. It has to return
                what has been committed: not what a function remembers, nor what another database says.
            key: the column with the event's key; where not given, the query's first.
        """
        self._db = db
        self._text: LiteralString = query.strip().rstrip(";")
        self._key = key
        self._query: _Query | None = None
        self._statements: dict[tuple[str, tuple[str, ...]], Statement] = {}

    async def page(self, after: object | None, limit: int) -> OwnerPage:
        """Rows in the order of their keys, from behind `after` on: at most `limit`, and at most 16 MiB of them.

        Raises:
            OwnerUnavailable: this connection may not answer.
            OwnerError: the query will not do.
        """
        limit = max(1, min(limit, limits.OWNER_PAGE_MAX_ROWS))
        while True:
            arguments = (limit + 1, limits.OWNER_PAGE_MAX_BYTES)
            if after is None:
                record, rows = await self._read(SQL.first, *arguments)
            else:
                record, rows = await self._read(SQL.next, *arguments, (await self._described()).argument(after))
            if rows is not None:
                last = len(rows) <= limit
                return _page(record, rows if last else rows[:limit], last=last)
            if limit == 1:
                raise self._too_large()
            limit //= 2

    async def get(self, key: object) -> OwnerPage:
        """The row of a key; no row where it does not exist. Raises as `page`."""
        return await self.get_many([key])

    async def get_many(self, keys: Sequence[object]) -> OwnerPage:
        """The rows of these keys that exist, in no order. Raises as `page`."""
        query = await self._described()
        record, rows = await self._read(SQL.some, [query.argument(key) for key in keys], limits.OWNER_ANSWER_MAX_BYTES)
        if rows is None:
            raise self._too_large()
        return _page(record, rows, last=True)

    async def digests(self, columns: Sequence[str]) -> OwnerPage:
        """Count and digest of each bucket of keys, over these columns. Raises as `page`."""
        record, rows = await self._read(SQL.digests, digested=columns)
        return _page(record, rows or [], last=True)

    async def bucket_keys(self, columns: Sequence[str], buckets: Sequence[int], after: str, limit: int) -> OwnerPage:
        """Keys and digests of the rows in some buckets. Raises as `page`."""
        limit = max(1, min(limit, limits.OWNER_PAGE_MAX_ROWS))
        record, rows = await self._read(SQL.bucket_keys, list(buckets), limit + 1, after, digested=columns)
        found = rows or []
        return _page(record, found[:limit], last=len(found) <= limit)

    async def serve(self, params: Mapping[str, str]) -> OwnerPage:
        """Answer what an `HttpOwner` asks, out of the query parameters of its request.

            @app.get("/agents")
            async def agents(request: Request) -> OwnerPage:
                return await owner.serve(request.query_params)

        Any error of the server's kind (status 5xx) tells the cache to ask again.

        Raises:
            OwnerRequestInvalid: a parameter cannot be read.
            OwnerUnavailable, OwnerError: as `page`.
        """
        try:
            asked = _Request.model_validate(dict(params))
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False, include_input=False, include_context=False)
            field = str(first["loc"][0]) if first["loc"] else "parameters"
            raise OwnerRequestInvalid(field, first["msg"], "ask with the HttpOwner of this version") from None
        if asked.columns is not None and asked.buckets is not None:
            return await self.bucket_keys(asked.columns, asked.buckets, asked.after or "", asked.limit)
        if asked.columns is not None:
            return await self.digests(asked.columns)
        if asked.keys is not None:
            return await self.get_many(asked.keys)
        if asked.key is not None:
            return await self.get(asked.key)
        return await self.page(asked.after, asked.limit)

    # ----------------------------------------------------------------------------------------------- reading

    async def _read(
        self, template: Statement, *arguments: object, digested: Sequence[str] = ()
    ) -> tuple[Record, list[dict[str, Any]] | None]:
        statement = await self._statement(template, digested)
        async with postgres.acquire(self._target()) as connection:
            is_nested = connection.is_in_transaction()
            async with postgres.look(connection):
                await SQL.session.execute(connection)
                try:
                    (record,) = await statement.fetch(connection, *arguments, timeout=limits.OWNER_SCAN_SECONDS)
                except postgres.PostgresError as error:
                    raise _explained(error) from error
        if is_nested and record["keeps_snapshot"]:
            raise OwnerUnavailable(
                "the transaction keeps the snapshot of its first statement, and would show what was true then; "
                "read from the pool, or in a READ COMMITTED transaction"
            )
        _check(record)
        if record["rows"] is None and record["count"]:
            return record, None
        with garbage.held():
            return record, pydantic_core.from_json(record["rows"] or "[]")

    async def _statement(self, template: Statement, digested: Sequence[str]) -> Statement:
        query = await self._described()
        for name in digested:
            if name not in query.columns:
                raise OwnerRequestInvalid("columns", f"the query has no column {name!r}", "select it in the query")
        place = (template.name, tuple(digested))
        if place not in self._statements:
            if len(self._statements) > _STATEMENTS_KEPT:
                self._statements.clear()
            self._statements[place] = query.compose(template, digested)
        return self._statements[place]

    async def _described(self) -> _Query:
        if self._query is None:
            statement = replace(SQL.describe, text=SQL.describe.text.replace("{query}", self._text))
            async with postgres.acquire(self._target()) as connection, postgres.look(connection):
                try:
                    columns = await statement.columns(connection)
                except postgres.PostgresError as error:
                    raise _explained(error) from error
                except ValueError as error:
                    raise OwnerError(f"the owner's query {error}; write the values into it") from error
            self._query = _checked(self._text, columns, self._key)
        return self._query

    def _target(self) -> "Connection | postgres.Pool":
        db = self._db() if callable(self._db) else self._db
        return db.connection if isinstance(db, Transaction) else db

    def _too_large(self) -> OwnerError:
        return OwnerError(
            f"one row or answer has more than {limits.OWNER_PAGE_MAX_BYTES} bytes; leave large columns out of the query"
        )


_STATEMENTS_KEPT: Final = 64


def _checked(text: LiteralString, columns: Sequence[tuple[str, str]], key: str | None) -> _Query:
    names = [name for name, _ in columns]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise OwnerError(f"the owner's query returns column {twice!r} twice; name each column once")
    key = names[0] if key is None else key
    found = dict(columns)
    if key not in found:
        raise OwnerError(f"the owner's query has no column {key!r}, which is to be its key; select it")
    if found[key] not in _KEY_TYPES:
        raise OwnerError(
            f"key {key} of the owner's query is {found[key]}; cast it to uuid, text or bigint in the query"
        )
    return _Query(text, found, key)


def _check(record: Record) -> None:
    """Refuse a page that would not be worth its snapshot."""
    if record["standby"]:
        raise OwnerUnavailable(
            "a standby cannot answer for its owner: its snapshots lack what is in progress; read from the primary"
        )
    if record["writing"]:
        raise OwnerUnavailable(
            "the transaction has written already, and would show rows that have not been committed; "
            "read before the first write, or from the pool"
        )
    if record["log"] is None:
        raise NotMigrated("outbox.logs has no current row; restore it, or run: outbox adopt")
    if not record["lives_here"]:
        raise OwnerUnavailable(
            f"log {record['log']} belongs to another database: this one was restored, promoted or copied; "
            "see: outbox adopt --help"
        )


def _explained(error: postgres.PostgresError) -> Exception:
    """An error of the owner's statement, with what to do."""
    if postgres.sqlstate(error) in postgres.UNDEFINED and "outbox." in str(error):
        return NotMigrated(f"the owner's database has no log ({error}); run: outbox migrate up")
    if (postgres.sqlstate(error) or "")[:2] in _WRONG_QUERY:
        return OwnerError(f"the owner's query fails: {error}; correct it, and let this role read what it needs")
    return error


_WRONG_QUERY: Final = frozenset({"0A", "21", "22", "25", "2F", "42"})
"""Not supported, cardinality, data, a write where only reading is allowed, syntax and names and rights."""


def _page(record: Record, rows: list[dict[str, Any]], *, last: bool) -> OwnerPage:
    return OwnerPage.model_construct(log=record["log"], snapshot=record["snapshot"], rows=rows, last=last)
