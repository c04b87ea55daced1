-- The one merge. A template: {table}, {key} and lists of columns are filled in once by table.compose, quoted.

-- name: merge
-- Rows, patches and deletions of distinct keys into the cache. The caller holds the lock of the partition's row in
-- outbox.positions, taken by an earlier statement, so everything that an earlier merge wrote is in this snapshot.
-- $1 cache, $2 all keys as text, $3 full rows, $4 patches, $5 deletions: JSON arrays of objects with the table's columns,
-- sent as text, so that no JSON codec of the service's connections encodes them a second time.
-- Locks: the rows written, in the order of their keys within each kind. Index: the key's, and the primary key of
-- tombstones. Rows: one a key, at most a batch. Returns the keys of patches that found no row.
with graves as materialized (
    -- Most caches delete nothing; the first condition is decided once and saves a probe for each key.
    -- The list is walked because PostgreSQL before 17 may filter all tombstones of the cache by `= any` instead.
    select t.key, t.log_id
      from unnest($2::text[]) k(key)
     cross join lateral (select o.key, o.log_id from outbox.tombstones o
                          where o.cache = $1 and o.key = k.key offset 0) t
     where exists (select from outbox.tombstones o where o.cache = $1)
), full_rows as materialized (
    select x.* from json_populate_recordset(null::{table}, $3::text::json) x
     where not exists (select from graves g
                        where g.key = x.{key}::text and not outbox.supersedes(x.outbox_log, g.log_id))
), patches as materialized (
    select p.doc, (jsonb_populate_record(null::{table}, p.doc)).{key} as key, p.doc ->> 'outbox_log' as log_id
      from jsonb_array_elements($4::text::jsonb) p(doc)
), deletions as materialized (
    select x.* from json_populate_recordset(null::{table}, $5::text::json) x
), held as materialized (
    select c.{key} as key, c.outbox_log as log_id from {table} c
     where c.{key} in (select p.key from patches p union all select d.{key} from deletions d)
     order by c.{key} for update
), upserted as (
    insert into {table} as c ({written})
    select {written_x} from full_rows x order by x.{key}
    on conflict ({key}) do update set {changing_excluded}, last_synced_at = now()
     where outbox.supersedes(excluded.outbox_log, c.outbox_log)
), unburied as (
    delete from outbox.tombstones t using graves g
     where t.cache = $1 and t.key = g.key and g.key in (select x.{key}::text from full_rows x)
), patched as (
    update {table} c
       set ({changing}, last_synced_at) =
           (select {changing_n}, now() from jsonb_populate_record(c, p.doc) n)
      from patches p join held h on h.key = p.key
     where c.{key} = p.key and outbox.supersedes(p.log_id, h.log_id)
    returning c.{key} as key
), deleted as (
    delete from {table} c using deletions d join held h on h.key = d.{key}
     where c.{key} = d.{key} and outbox.supersedes(d.outbox_log, h.log_id)
), buried as (
    insert into outbox.tombstones as t (cache, key, log_id, position, transaction_id)
    select $1, d.{key}::text, d.outbox_log, d.outbox_position, d.outbox_transaction_id from deletions d
     where not exists (select from held h where h.key = d.{key} and not outbox.supersedes(d.outbox_log, h.log_id))
     order by d.{key}::text
    on conflict (cache, key) do update
       set log_id = excluded.log_id, position = excluded.position, transaction_id = excluded.transaction_id,
           deleted_at = excluded.deleted_at
     where outbox.supersedes(excluded.log_id, t.log_id)
)
select p.key::text as missing from patches p
 where not exists (select from patched u where u.key = p.key)
   and not exists (select from held h where h.key = p.key and not outbox.supersedes(p.log_id, h.log_id))
   and not exists (select from graves g where g.key = p.key::text and not outbox.supersedes(p.log_id, g.log_id))
