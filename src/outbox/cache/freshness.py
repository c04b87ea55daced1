"""Freshness: `get(db, key, fresh_within=5)` answers with what was true five seconds ago or later, or says it cannot.

A row is believed if, in one snapshot of the database,

* the consumer has applied everything that had committed at its owner by `complete_as_of` (`consumer.watermarks`), and
  that is at most `fresh_within` seconds ago by this database's clock;
* the key waits in nobody's parking: neither the owner's relay nor this cache has set an event of it aside;
* the cache is whole: all of the owner's pages were merged from the log that is followed; or, without an owner, it has
  had every event from the topic's first on, and all from one log.

Else the owner answers, if the cache has one; else `Stale` is raised. A relay that stands still is noticed although the
consumer has no lag: without watermarks `complete_as_of` gets older by itself.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from outbox import clock, postgres
from outbox.cache.asking import answers
from outbox.cache.owner import Owner
from outbox.cache.read import Reader
from outbox.cache.table import SYNCED, Table
from outbox.errors import OwnerRowInvalid, Stale, StaleReason
from outbox.postgres import Connection, Pool, Record

SQL: Final = postgres.Statements("outbox", "cache/freshness.sql")

Row = TypeVar("Row", bound=BaseModel)


class FreshReader(Reader[Row]):
    """Reads one cache's table, and knows how fresh that is."""

    def __init__(self, cache: str, row: type[Row], table: Table, owner: Owner | None) -> None:
        """For the cache declared for table `cache`; `owner` answers where it is stale."""
        super().__init__(cache, row, table)
        self._owner = owner
        self._fresh_one = table.compose(SQL.one)
        self._fresh_many = table.compose(SQL.many)

    async def fresh_one(self, db: Pool | Connection, key: str, within: float) -> Row | None:
        """The row of a key, at most `within` seconds old.

        Raises:
            Stale: it may be older, and there is no owner to ask.
            OwnerError: there is one, and it does not answer.
        """
        is_owned = self._owner is not None
        record = await self._fresh_one.fetchrow(db, self._argument(key), key, self._cache, is_owned)
        assert record is not None, "freshness is one row"
        reason = _doubt(record, within)
        if reason is None:
            return self.model(record) if record["outbox_found"] else None
        if self._owner is None:
            raise self._stale(key, record, reason)
        rows = self._of_owner((await self._owner.get(self._argument(key))).rows)
        return rows[0] if rows else None

    async def fresh_many(self, db: Pool | Connection, keys: Collection[str], within: float) -> list[Row]:
        """The rows of these keys that exist, each at most `within` seconds old; raises what `fresh_one` raises."""
        arguments = [self._argument(key) for key in keys]
        records = await self._fresh_many.fetch(db, arguments, list(keys), self._cache, self._owner is not None)
        rows: list[Row] = []
        stale: list[str] = []
        for record in records:
            reason = _doubt(record, within)
            if reason is None:
                rows += [self.model(record)] if record["outbox_found"] else []
            elif self._owner is None:
                raise self._stale(record["outbox_key"], record, reason)
            else:
                stale.append(record["outbox_key"])
        return rows + await self._ask(stale) if stale else rows

    async def _ask(self, keys: Sequence[str]) -> list[Row]:
        """The owner's rows of these keys."""
        assert self._owner is not None
        found: list[Row] = []
        async for _, page in answers(self._owner, keys, self._table.key_type):
            found += self._of_owner(page.rows)
        return found

    def _of_owner(self, rows: Sequence[Mapping[str, Any]]) -> list[Row]:
        now: dict[str, Any] = {}
        if SYNCED in self._row.model_fields:
            now[SYNCED] = datetime.fromtimestamp(clock.wall(), tz=UTC)
        try:
            return [self._row.model_validate({**now, **row}) for row in rows]
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            raise OwnerRowInvalid(
                f"cache {self._cache}: a row of its owner does not fit {self._row.__name__}, field "
                f"{'.'.join(map(str, first['loc'])) or '-'}: {first['msg']}; let the owner's query return what the row "
                "class takes, or change the row class"
            ) from None

    def _stale(self, key: str, record: Record, reason: StaleReason) -> Stale:
        lag = record["outbox_lag_seconds"]
        is_known = lag is not None and reason is not StaleReason.INCOMPLETE
        return Stale(self._cache, key, lag if is_known else math.inf, reason)


def _doubt(record: Record, within: float) -> StaleReason | None:
    """Why a row is not to be believed; None where it is."""
    lag = record["outbox_lag_seconds"]
    if lag is None:
        return StaleReason.UNKNOWN
    if not record["outbox_complete"]:
        return StaleReason.INCOMPLETE
    if record["outbox_parked"]:
        return StaleReason.PARKED
    return StaleReason.BEHIND if lag > within else None
