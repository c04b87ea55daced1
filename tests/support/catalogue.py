"""What a database's schemas hold, as text that can be compared: no oids, no order of creation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncpg

_CATALOGUE = """
with ours as (
    select oid, nspname, nspacl from pg_namespace
     where nspname not like 'pg\\_%' and nspname <> 'information_schema'
)
select 'schema', n.nspname::text, concat_ws(' ', n.nspacl::text, obj_description(n.oid, 'pg_namespace')) from ours n
union all
select 'relation ' || c.relkind::text, c.oid::regclass::text,
       concat_ws(' ', c.relpersistence, c.reloptions::text, c.relacl::text, obj_description(c.oid, 'pg_class'),
                 case when c.relkind = 'i' then pg_get_indexdef(c.oid) end)
  from pg_class c join ours n on n.oid = c.relnamespace
union all
select 'column', a.attrelid::regclass::text || '.' || a.attname::text,
       concat_ws(' ', a.attnum, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                 pg_get_expr(d.adbin, d.adrelid), col_description(a.attrelid, a.attnum))
  from pg_attribute a
  join pg_class c on c.oid = a.attrelid
  join ours n on n.oid = c.relnamespace
  left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
 where a.attnum > 0 and not a.attisdropped and c.relkind in ('r', 'p', 'v')
union all
select 'constraint', o.conrelid::regclass::text || '.' || o.conname::text, pg_get_constraintdef(o.oid)
  from pg_constraint o join ours n on n.oid = o.connamespace
union all
select 'function', p.oid::regprocedure::text,
       concat_ws(' ', pg_get_functiondef(p.oid), p.proacl::text, obj_description(p.oid, 'pg_proc'))
  from pg_proc p join ours n on n.oid = p.pronamespace
union all
select 'trigger', t.tgrelid::regclass::text || '.' || t.tgname::text, pg_get_triggerdef(t.oid)
  from pg_trigger t join pg_class c on c.oid = t.tgrelid join ours n on n.oid = c.relnamespace
 where not t.tgisinternal
 order by 1, 2, 3
"""


async def catalogue(connection: "asyncpg.Connection[asyncpg.Record]") -> Sequence[tuple[str, str, str]]:
    """Every schema, relation, column, constraint, function and trigger with its definition, rights and comment."""
    return [(row[0], row[1], row[2]) for row in await connection.fetch(_CATALOGUE)]
