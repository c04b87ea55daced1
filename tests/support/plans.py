"""What a statement touches, by PostgreSQL's own counters.

`EXPLAIN` does not look into functions, and the relay's transactions are functions. The per-transaction counters do:
they count every row that any scan took from a table or an index, whoever asked for it, and every page. A sequential
scan counts all rows of the table, an index scan the entries that it took from the index.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from outbox import Connection

_READ: Final = """
select coalesce(p.inhparent, t.oid)::regclass::text as "table",
       sum(c.rows)::bigint as rows, sum(c.pages)::bigint as pages
  from pg_class t
  left join pg_inherits p on p.inhrelid = t.oid
 cross join lateral (
       select pg_stat_get_xact_tuples_returned(t.oid) as rows, pg_stat_get_xact_blocks_fetched(t.oid) as pages
       union all
       select pg_stat_get_xact_tuples_returned(i.indexrelid), pg_stat_get_xact_blocks_fetched(i.indexrelid)
         from pg_index i where i.indrelid = t.oid) c
 where t.relkind = 'r' and t.relnamespace::regnamespace::text not like 'pg\\_%'
   and t.relnamespace::regnamespace::text <> 'information_schema'
 group by 1
"""


@dataclass(slots=True)
class Touched:
    """Rows and pages taken from each table, indexes and partitions included, once the block has ended."""

    rows: Mapping[str, int] = field(default_factory=dict)
    pages: Mapping[str, int] = field(default_factory=dict)


@asynccontextmanager
async def counted(connection: Connection) -> AsyncIterator[Touched]:
    """Count what the block's statements on this connection touch, in a transaction that is rolled back.

    The transaction also holds the counters together: PostgreSQL moves them on between transactions only.
    """
    touched = Touched()
    nested = connection.transaction()
    await nested.start()
    try:
        before = await _counters(connection)
        yield touched
        after = await _counters(connection)
        touched.rows = {name: after[name][0] - before[name][0] for name in after}
        touched.pages = {name: after[name][1] - before[name][1] for name in after}
    finally:
        await nested.rollback()


async def _counters(connection: Connection) -> dict[str, tuple[int, int]]:
    return {row["table"]: (row["rows"], row["pages"]) for row in await connection.fetch(_READ)}
