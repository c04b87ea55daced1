"""Reading a cache: rows as models, and waiting until a row has seen a transaction."""

import asyncio
import json
from collections.abc import Collection, Mapping
from typing import Any, Final, Generic, TypeVar

from pydantic import BaseModel

from outbox import clock, limits, postgres
from outbox.cache.table import Table
from outbox.errors import WaitTimeout
from outbox.postgres import Connection, Pool, Record
from outbox.receipt import Receipt

SQL: Final = postgres.Statements("outbox", "cache/read.sql")

Row = TypeVar("Row", bound=BaseModel)


class Reader(Generic[Row]):
    """Reads one cache's table."""

    def __init__(self, cache: str, row: type[Row], table: Table) -> None:
        """For the cache declared for table `cache`."""
        self._cache = cache
        self._row = row
        self._table = table
        self._one = table.compose(SQL.one)
        self._many = table.compose(SQL.many)
        self._seen = table.compose(SQL.seen)

    async def one(self, db: Pool | Connection, key: str) -> Row | None:
        """The row of a key."""
        record = await self._one.fetchrow(db, self._argument(key))
        return None if record is None else self.model(record)

    async def many(self, db: Pool | Connection, keys: Collection[str]) -> list[Row]:
        """The rows of these keys that exist."""
        return [self.model(record) for record in await self.records(db, keys)]

    async def records(self, db: Pool | Connection, keys: Collection[str]) -> list[Record]:
        """What PostgreSQL has of these keys; `model` makes rows of it."""
        return await self._many.fetch(db, [self._argument(key) for key in keys])

    async def once_seen(
        self, db: Pool | Connection, key: str, receipt: Receipt, position: int, timeout: float
    ) -> Row | None:
        """The row of a key as soon as the cache has this position of a receipt; None once that or later deleted it.

        Raises:
            WaitTimeout: it does not in `timeout` seconds.
        """
        log_id = receipt.log_id
        seen = (self._table.full_name, log_id, position, str(receipt.transaction_id))
        deadline = clock.monotonic() + timeout
        pause = limits.WAIT_POLL_MIN_SECONDS
        while True:
            record = await self._seen.fetchrow(db, self._argument(key), key, *seen)
            assert record is not None
            if record["outbox_seen"]:
                return self.model(record) if record["outbox_found"] else None
            if record["outbox_keeps_snapshot"] and not postgres.is_pool(db) and db.is_in_transaction():
                raise WaitTimeout(
                    f"cache {self._cache}: key {key} does not show position {position} of log {log_id}, and never will "
                    "in this transaction, which keeps its snapshot; give wait_for the pool"
                )
            left = deadline - clock.monotonic()
            if left <= 0:
                raise WaitTimeout(
                    f"cache {self._cache}: key {key} did not show position {position} of log {log_id} in {timeout} s; "
                    "read without waiting, or look at `outbox status` for a relay or consumer that lags"
                )
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, limits.WAIT_POLL_MAX_SECONDS)

    def _argument(self, key: str) -> object:
        return key if self._table.key_type is str else self._table.key_type(key)

    def model(self, record: Record | Mapping[str, Any]) -> Row:
        """The row in a record of the table."""
        values: dict[str, Any] = {name: record[name] for name in self._table.read}
        for name in self._table.json:
            if values[name] is not None:
                values[name] = json.loads(values[name])
        return self._row.model_validate(values)
