"""A cache: a table of this service that follows the events of another one.

    agents = Cache(CachedAgent, table="workflow_agent_cache", key="agent_id", topic="llm.agents")

    @agents.on
    def renamed(event: AgentRenamed) -> CachedAgent: ...

A declaration holds no connection. `Consumer` feeds it; `get`, `get_many` and `wait_for` read it on whatever the
caller has; `fold` runs its handlers without a database. The table belongs to the service: plain SQL reads it, and its
migration calls `outbox.prepare_cache` for the columns that say which event each row is from.

Guarantees:

* The table equals the fold of the events that reached it, in order, each counted once, whatever was delivered twice,
  late, or by a process that had lost its partition (`consumer.apply`).
* A row never moves backwards, and what was deleted is not resurrected by an old event.
* An event that cannot be applied sets its own key aside, and nobody else's (`consumer.poison`).
"""

import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any, Final, Generic, TypeAlias, TypeVar
from uuid import UUID

from pydantic import BaseModel, TypeAdapter

from outbox import limits
from outbox.cache import handlers, table
from outbox.cache.effects import DELETE, Delete, Patch
from outbox.cache.fold import Fault, Step
from outbox.cache.fold import fold as fold_key
from outbox.cache.freshness import FreshReader
from outbox.cache.handlers import Handler, Shape
from outbox.cache.memory import Memory
from outbox.cache.merge import Merge
from outbox.cache.owner import Owner
from outbox.errors import CacheDeclarationError
from outbox.event import Event, key_text, kind_of
from outbox.postgres import Connection, Pool
from outbox.receipt import Receipt
from outbox.transaction import Db, Transaction

__all__ = ["DELETE", "Cache", "Delete", "Duration", "Patch"]

E = TypeVar("E", bound=Event)
Row = TypeVar("Row", bound=BaseModel)
CacheKey: TypeAlias = UUID | str | int
Duration: TypeAlias = float | timedelta
"""Seconds, or a timedelta."""

_RESERVED_NAMES: Final = frozenset({"relay"})


class Cache(Generic[Row]):
    """Declares a cache: rows of class `Row` in a table, kept by the handlers registered with `on`."""

    def __init__(
        self,
        row: type[Row],
        *,
        table: str,
        key: str,
        topic: str,
        owner: Owner | None = None,
        replays: bool = False,
        memory_max_rows: int | None = None,
    ) -> None:
        """Declare it; usually a module's constant.

        Args:
            row: a pydantic model; a field is a column of the same name. A field `last_synced_at` is for readers only.
            table: the service's table, exactly as it is called; `schema.table` where the search_path does not find it.
            key: the field and column with the event's key; needs a primary key or a unique index of its own.
            topic: where the events come from.
            owner: whom to copy rows from: a `SqlOwner`, an `HttpOwner`. Without one, the cache begins with the topic's
                earliest event.
            replays: take records that somebody sent once more on purpose (header `ob-replay`); else they are dropped.
            memory_max_rows: how many rows a process may remember (`memory`); consumers then notify of changes.

        Raises:
            CacheDeclarationError: the row class and the key do not fit together, or the bound is no bound.
        """
        _check_declaration(row, table, key)
        if memory_max_rows is not None and not 1 <= memory_max_rows <= limits.MEMORY_MAX_ROWS:
            raise CacheDeclarationError(
                f"cache {table}: memory_max_rows is {memory_max_rows}; use 1 to {limits.MEMORY_MAX_ROWS}"
            )
        self.row: Final = row
        self.table: Final = table
        self.key: Final = key
        self.topic: Final = topic
        self.owner: Final = owner
        self.replays: Final = replays
        self.memory_max_rows: Final = memory_max_rows
        self.shape: Final = Shape(row, key)
        self.handlers: Final[dict[str, Handler]] = {}
        """By event type."""
        self._reader: FreshReader[Row] | None = None
        self._memory: Memory[Row] | None = None

    def on(self, handler: Callable[[E], Row | Patch | Delete]) -> Callable[[E], Row | Patch | Delete]:
        """Register a handler for the event types in its annotation: one event class, or a union of them.

        Handlers are pure: they look at the event and nothing else, because `fold` and every retry call them again.

        Raises:
            CacheDeclarationError: the annotations do not say enough, or an event type has a handler already.
        """
        for found in handlers.inspect_handler(handler, self.row, self.topic):
            if found.kind.type in self.handlers:
                other = self.handlers[found.kind.type].function
                raise CacheDeclarationError(
                    f"cache {self.table}: {found.kind.type} is handled by {getattr(other, '__qualname__', other)} "
                    "already; one event has one effect, so merge the two handlers"
                )
            self.handlers[found.kind.type] = found
        return handler

    async def get(self, db: Db, key: CacheKey, *, fresh_within: Duration | None = None) -> Row | None:
        """The row of a key, as the cache has it now; with `fresh_within`, known to be at most that old.

        Where the cache cannot tell, its owner is asked, if it has one.

        Raises:
            Stale: the row may be older, and there is no owner to ask.
            OwnerError: there is one, and it does not answer.
        """
        target, text = _target(db), self._key_text(key)
        if fresh_within is None and self._memory is not None and db is self._memory.pool:
            return await self._memory.one(text)
        reader = await self._prepared(target)
        if fresh_within is None:
            return await reader.one(target, text)
        with self._seen([text]):
            return await reader.fresh_one(target, text, _seconds(fresh_within))

    async def get_many(self, db: Db, keys: Iterable[CacheKey], *, fresh_within: Duration | None = None) -> list[Row]:
        """The rows of these keys that exist, in no order; at most `limits.GET_MANY_MAX_KEYS` keys.

        With `fresh_within` each is known to be at most that old; the owner is asked for those that are not.

        Raises:
            ValueError: more keys than that.
            Stale, OwnerError: as `get` raises them.
        """
        texts = {self._key_text(key) for key in keys}
        if len(texts) > limits.GET_MANY_MAX_KEYS:
            raise ValueError(f"get_many takes at most {limits.GET_MANY_MAX_KEYS} keys, not {len(texts)}: ask in parts")
        if fresh_within is None and self._memory is not None and db is self._memory.pool:
            return await self._memory.many(texts)
        target = _target(db)
        reader = await self._prepared(target)
        if fresh_within is None:
            return await reader.many(target, texts)
        with self._seen(texts):
            return await reader.fresh_many(target, texts, _seconds(fresh_within))

    @asynccontextmanager
    async def memory(self, db: Pool) -> AsyncIterator[Memory[Row]]:
        """While the block lasts, `get` and `get_many` on this very pool are answered from memory where they can.

            async with asyncpg.create_pool(dsn) as pool, agents.memory(pool):
                yield

        One connection of the pool listens for changes; it has to reach the server itself, not a pooler. What is read
        with `fresh_within`, by `wait_for`, on a connection or in a transaction comes from the table.

        Raises:
            CacheDeclarationError: the cache declares no `memory_max_rows`, has memory already, or does not fit the
                table.
        """
        if self.memory_max_rows is None:
            raise CacheDeclarationError(f"cache {self.table}: declare memory_max_rows to let processes remember rows")
        if self._memory is not None:
            raise CacheDeclarationError(f"cache {self.table}: has memory in this process already; enter memory() once")
        made = Memory(db, self.table, self.key, self.memory_max_rows, lambda: self._prepared(db))
        self._memory = made
        try:
            async with made:
                yield made
        finally:
            self._memory = None

    async def wait_for(self, db: Db, key: CacheKey, receipt: Receipt | str, *, timeout: Duration) -> Row | None:
        """The row of a key once it has seen the transaction of a receipt; None if that deleted it.

        A receipt without an event of this key says nothing about it: the row is returned as it is. Give a pool rather
        than a connection: between two looks the connection is free for others.

        Raises:
            WaitTimeout: the row has not seen it in `timeout`. The transaction is in the log and will be.
            ReceiptUnavailable: `receipt` is no receipt.
        """
        target = _target(db)
        text = self._key_text(key)
        receipt = receipt if isinstance(receipt, Receipt) else Receipt(receipt)
        position = receipt.position(self.topic, text)
        reader = await self._prepared(target)
        with self._seen([text]):
            if position is None:
                return await reader.one(target, text)
            return await reader.once_seen(target, text, receipt, position, _seconds(timeout))

    @contextmanager
    def _seen(self, keys: Iterable[str]) -> Iterator[None]:
        """The caller sees rows that may be newer than the remembered ones; the next `get` must not go back."""
        try:
            yield
        finally:
            if self._memory is not None:
                self._memory.forget(keys)

    def fold(self, events: Iterable[Event]) -> list[Row]:
        """The rows after these events, from nothing, without a database; in the order of the keys' first events.

        What a handler raises is raised here. A patch of a row that is not there has no effect, as in the table.

        Raises:
            CacheDeclarationError: a handler's answer does not fit; a consumer would park the event.
        """
        steps: dict[str, list[Step]] = {}
        for event in events:
            handler = self.handlers.get(kind_of(type(event)).type)
            if handler is None:
                continue
            key = handlers.event_key(handler, event)
            effect = self.shape.checked(handler.function(event), key)
            if isinstance(effect, Fault):
                raise CacheDeclarationError(f"{handler.kind.type} of {key}: {effect.reason}: {effect.detail}")
            steps.setdefault(key, []).append(Step(effect, None))
        rows = (fold_key(of_key).base for of_key in steps.values())
        return [row for row in rows if isinstance(row, self.row)]

    async def prepare(self, db: Pool | Connection, oid: int | None = None) -> Merge:
        """Check the declaration against its table, or another one that is to take its place, and prepare the merge.

        Raises:
            CacheDeclarationError: the table does not fit.
        """
        if oid is None:
            found = await table.find(db, self.row, self.table, self.key)
        else:
            found = await table.find_by_oid(db, self.row, self.table, self.key, oid)
        return Merge(self.shape, found, owned=self.owner is not None)

    async def _prepared(self, db: Pool | Connection) -> FreshReader[Row]:
        if self._reader is None:
            found = await table.find(db, self.row, self.table, self.key)
            self._reader = FreshReader(self.table, self.row, found, self.owner)
        return self._reader

    def _key_text(self, key: CacheKey) -> str:
        adapter: TypeAdapter[Any] = self.shape.adapter(self.key)
        return key_text(adapter.validate_python(key))


def _check_declaration(row: type[Any], table: str, key: str) -> None:
    if not (inspect.isclass(row) and issubclass(row, BaseModel)):
        raise CacheDeclarationError(f"cache {table}: {row!r} is no pydantic model; declare the row as a BaseModel")
    if key not in row.model_fields:
        raise CacheDeclarationError(f"cache {table}: {row.__name__} has no field {key!r}; name the key's column")
    if table in _RESERVED_NAMES or not 1 <= len(table.encode()) <= 127:
        raise CacheDeclarationError(f"cache {table!r}: not usable as a name; choose another table")
    by_name = row.model_config.get("populate_by_name") or row.model_config.get("validate_by_name")
    for name, field in row.model_fields.items():
        if name.startswith("outbox_"):
            raise CacheDeclarationError(f"cache {table}: field {name} has our prefix outbox_; choose another name")
        if field.validation_alias is not None and not by_name:
            raise CacheDeclarationError(
                f"cache {table}: field {name} has an alias, and rows are read by column name; "
                "set populate_by_name=True in the row's model_config"
            )


def _target(db: Db) -> Pool | Connection:
    return db.connection if isinstance(db, Transaction) else db


def _seconds(duration: Duration) -> float:
    return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
