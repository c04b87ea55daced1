-- What a cache needs to know about the user's table. Reads the catalogue only.

-- name: resolve
-- Which table a quoted name means on this connection; null where there is none.
select to_regclass($1)::oid

-- name: describe
-- The columns of a table ($1) and which of them alone are unique. Rows: its columns. A missing table has none.
select r.oid, n.nspname as schema, r.relname as "table", r.relkind::text as kind, a.attname as name,
       coalesce(b.typname, t.typname)::text as type, t.typcategory::text as category,
       a.attnotnull as required, (a.atthasdef or a.attidentity <> '') as has_default,
       (a.attgenerated <> '' or a.attidentity = 'a') as generated,
       exists (select from pg_index i
                where i.indrelid = r.oid and i.indisunique and i.indimmediate and i.indisvalid
                  and i.indpred is null and i.indexprs is null
                  and i.indnkeyatts = 1 and i.indkey[0] = a.attnum) as is_unique
  from pg_class r
  join pg_namespace n on n.oid = r.relnamespace
  join pg_attribute a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
  join pg_type t on t.oid = a.atttypid
  left join pg_type b on b.oid = t.typbasetype
 where r.oid = $1
 order by a.attnum
