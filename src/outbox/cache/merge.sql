-- The one merge: what events say, in two statements, and what a page of the owner says, under the same rules.
-- Templates: {table}, {key}, its type and lists of columns are filled in once by table.compose, quoted.
--
-- Which of two wins, wherever they meet and in whichever order they come:
--   event against event: the higher log; within one log arrival, because events come deduplicated and in order;
--   event against page:  an event that the page's snapshot sees is part of the page; one that it does not see is newer;
--   page against page:   the later one (outbox.page_order).
-- The caller holds the cache's lock since an earlier statement (outbox.hold_caches, or alone for a page), so everything
-- that an earlier merge wrote is in this snapshot.

-- name: merge_rows
-- Full rows of distinct keys into the cache.
-- $1 cache, $2 all keys as text, $3 the rows: a JSON array of objects with the table's columns, sent as text, so that no
-- JSON codec of the service's connections encodes them a second time.
-- The table is only written to, never looked into, and what is looked into has an index: so a plan made when everything
-- was empty stays right, and is kept (apply.advance), because planning takes longer than a few rows do.
-- Locks: the rows written, in the order of their keys. Index: the key's, and the primary keys of tombstones and pages.
-- Rows: one a key, at most a batch; while a rebuild's pages are remembered, their ranges for each key that one may see.
with newest as materialized (
    -- What the newest page does not see, no page sees: in normal operation nothing more is looked up.
    select p.log_id, p.snapshot from outbox.pages p where p.cache = $1 order by p.place desc limit 1
), ranges as materialized (
    select p.log_id, p.snapshot, r.after_key::{key_type} as after_key, r.through_key::{key_type} as through_key
      from outbox.page_ranges r join outbox.pages p on p.id = r.page_id where r.cache = $1
), graves as materialized (
    -- Most caches delete nothing; the first condition is decided once and saves a probe for each key.
    -- The list is walked because PostgreSQL before 17 may filter all tombstones of the cache by `= any` instead.
    select t.key, t.place, t.log_id, p.log_id as page_log, p.snapshot as page_snapshot
      from unnest($2::text[]) k(key)
     cross join lateral (select o.key, o.ctid as place, o.log_id, o.page_id from outbox.tombstones o
                          where o.cache = $1 and o.key = k.key offset 0) t
      left join lateral (select o.log_id, o.snapshot from outbox.pages o where o.id = t.page_id offset 0) p on true
     where (select true from outbox.tombstones o where o.cache = $1 order by o.key limit 1)
), full_rows as materialized (
    select x.* from json_populate_recordset(null::{table}, $3::text::json) x
      left join newest n on true
     where not exists (select from graves g
                        where g.key = x.{key}::text
                          and (not outbox.supersedes(x.outbox_log, g.log_id)
                               or outbox.page_sees(g.page_log, g.page_snapshot, x.outbox_log, x.outbox_transaction_id)))
       and (n.log_id is null
            or outbox.page_sees(n.log_id, n.snapshot, x.outbox_log, x.outbox_transaction_id) is not true
            or not exists (select from ranges r
                            where (r.after_key is null or x.{key}::{key_type}{key_order} > r.after_key)
                              and (r.through_key is null or x.{key}::{key_type}{key_order} <= r.through_key)
                              and outbox.page_sees(r.log_id, r.snapshot, x.outbox_log, x.outbox_transaction_id)))
), unburied as (
    -- By their place, which every plan finds at once; nobody else changes them while the batch has its locks.
    delete from outbox.tombstones t
     where t.ctid = any (array(select g.place from graves g where g.key in (select x.{key}::text from full_rows x)))
)
insert into {table} as c ({written})
select {written_x} from full_rows x order by x.{key}
on conflict ({key}) do update set {changing_excluded}, last_synced_at = now()
 where outbox.supersedes(excluded.outbox_log, c.outbox_log)
   and (c.outbox_page is null
        or not exists (select from outbox.pages p
                        where p.id = c.outbox_page
                          and outbox.page_sees(p.log_id, p.snapshot, excluded.outbox_log, excluded.outbox_transaction_id)))

-- name: merge_changes
-- Patches and deletions of distinct keys into the cache.
-- $1 cache, $2 all keys as text, $3 patches, $4 deletions, as merge_rows has its rows. $5 whether there is an owner: then
-- a patch of a newer log waits for a page of that log, unless the row is of that log already. The database
-- may have been restored without what the row says, and no later page that does not see the patch could mend it.
-- Locks: the rows written, in the order of their keys within each kind. Index: the key's, and the primary key of
-- tombstones. Rows: one a key, at most a batch; while a rebuild's pages are remembered, those too.
-- Returns the keys of patches that found no row to change.
with newest as materialized (
    select p.log_id, p.snapshot from outbox.pages p where p.cache = $1 order by p.place desc limit 1
), graves as materialized (
    select t.key, t.log_id, p.log_id as page_log, p.snapshot as page_snapshot
      from unnest($2::text[]) k(key)
     cross join lateral (select o.key, o.log_id, o.page_id from outbox.tombstones o
                          where o.cache = $1 and o.key = k.key offset 0) t
      left join outbox.pages p on p.id = t.page_id
     where exists (select from outbox.tombstones o where o.cache = $1)
), patches as materialized (
    select p.doc, n.{key} as key, n.outbox_log as log_id, n.outbox_transaction_id as transaction_id
      from jsonb_array_elements($3::text::jsonb) p(doc)
     cross join lateral jsonb_populate_record(null::{table}, p.doc) n
), deletions as materialized (
    select x.* from json_populate_recordset(null::{table}, $4::text::json) x
), held as materialized (
    select c.{key} as key, c.outbox_log as log_id, c.outbox_page as page_id from {table} c
     where c.{key} in (select p.key from patches p union all select d.{key} from deletions d)
     order by c.{key} for update
), settled as materialized (
    -- Keys of patches and deletions that are no news: an older log's, or part of a page that speaks for the key.
    select e.key from (select p.key, p.log_id, p.transaction_id from patches p
                       union all select d.{key}, d.outbox_log, d.outbox_transaction_id from deletions d) e
      left join newest n on true
      left join held h on h.key = e.key
     where not outbox.supersedes(e.log_id, h.log_id)
        or exists (select from graves g
                    where g.key = e.key::text
                      and (not outbox.supersedes(e.log_id, g.log_id)
                           or outbox.page_sees(g.page_log, g.page_snapshot, e.log_id, e.transaction_id)))
        or n.log_id is not null
           and outbox.page_sees(n.log_id, n.snapshot, e.log_id, e.transaction_id)
           and exists (select from outbox.pages p left join outbox.page_ranges r on r.page_id = p.id
                        where p.cache = $1
                          and outbox.page_sees(p.log_id, p.snapshot, e.log_id, e.transaction_id)
                          and (p.id = h.page_id
                               or r.page_id is not null
                                  and (r.after_key is null or e.key::{key_type}{key_order} > r.after_key::{key_type})
                                  and (r.through_key is null or e.key::{key_type}{key_order} <= r.through_key::{key_type})))
), founded as materialized (
    select p.key from patches p join held h on h.key = p.key
     where ($5 and outbox.log_ordinal(p.log_id) > outbox.log_ordinal(h.log_id)) is not true
), patched as (
    update {table} c
       set ({changing}, last_synced_at) =
           (select {changing_n}, now() from jsonb_populate_record(c, p.doc) n)
      from patches p
     where c.{key} = p.key and p.key in (select f.key from founded f) and p.key not in (select s.key from settled s)
), deleted as (
    delete from {table} c using deletions d
     where c.{key} = d.{key} and d.{key} in (select h.key from held h) and d.{key} not in (select s.key from settled s)
), buried as (
    insert into outbox.tombstones as t (cache, key, log_id, position, transaction_id)
    select $1, d.{key}::text, d.outbox_log, d.outbox_position, d.outbox_transaction_id from deletions d
     -- Without a place in a log nothing could be compared with it.
     where d.outbox_log is not null and d.{key} not in (select s.key from settled s)
     order by d.{key}::text
    on conflict (cache, key) do update
       set log_id = excluded.log_id, position = excluded.position, transaction_id = excluded.transaction_id,
           deleted_at = excluded.deleted_at
)
select p.key::text as missing from patches p
 where p.key not in (select f.key from founded f) and p.key not in (select s.key from settled s)

-- name: merge_page
-- One page of the owner, recorded as $2 in outbox.pages and, where it speaks for a range of keys, in outbox.page_ranges.
-- $1 cache, $3 its rows as a JSON array sent as text, $4 the keys that were asked for, where it speaks for single keys.
-- A key that the page speaks for and lacks is deleted; of a single key a tombstone remembers it, of a range the range.
-- A row that a page wrote belongs to its log and has no position, unless the event that it had is of the same log.
-- Locks: the rows written, in the order of their keys. Index: the key's, for text keys one `collate "C"` if there is; the
-- primary key of tombstones. Rows: the page's, and those of its range that the cache has.
-- Returns how many rows were written and removed, and the keys of rows that were not, because the page does not see their
-- last event; those are looked for only where rows were not written.
with page as materialized (
    select p.id, p.log_id, p.snapshot, outbox.log_ordinal(p.log_id) as ordinal, p.place
      from outbox.pages p where p.id = $2
), later as materialized (
    select p.id from outbox.pages p cross join page
     where p.cache = $1 and p.id <> page.id and p.place > page.place
), page_rows as materialized (
    select x.* from json_populate_recordset(null::{table}, $3::text::json) x
), blocked as materialized (
    select x.{key} as key
      from page_rows x
     cross join page
     cross join lateral (select o.log_id, o.transaction_id, o.page_id from outbox.tombstones o
                          where o.cache = $1 and o.key = x.{key}::text offset 0) t
     where exists (select from outbox.tombstones o where o.cache = $1)
       and (outbox.page_sees(page.log_id, page.snapshot, t.log_id, t.transaction_id) is false
            or t.page_id in (select l.id from later l))
    union all
    select x.{key}
      from page_rows x
      join outbox.page_ranges r
        on r.page_id in (select l.id from later l)
       and (r.after_key is null or x.{key}::{key_type}{key_order} > r.after_key::{key_type})
       and (r.through_key is null or x.{key}::{key_type}{key_order} <= r.through_key::{key_type})
), upserted as (
    insert into {table} as c ({columns}, outbox_log, outbox_page)
    select {columns_x}, page.log_id, page.id
      from page_rows x cross join page
     where x.{key} not in (select b.key from blocked b) order by x.{key}
    on conflict ({key}) do update
       set {changing_page}outbox_page = excluded.outbox_page, outbox_log = excluded.outbox_log,
           outbox_position = case when c.outbox_log = excluded.outbox_log then c.outbox_position end,
           outbox_transaction_id = case when c.outbox_log = excluded.outbox_log then c.outbox_transaction_id end,
           outbox_partition = case when c.outbox_log = excluded.outbox_log then c.outbox_partition end,
           outbox_offset = case when c.outbox_log = excluded.outbox_log then c.outbox_offset end,
           last_synced_at = now()
     -- outbox.page_sees, written out: PostgreSQL does not inline it here, and a call for each row takes longer than all else.
     where (case when c.outbox_log = (select q.log_id from page q)
                 then pg_visible_in_snapshot(c.outbox_transaction_id, (select q.snapshot from page q))
                 else (select q.ordinal from page q) > outbox.log_ordinal(c.outbox_log) end) is not false
       and (c.outbox_page is null or c.outbox_page not in (select l.id from later l))
    returning c.{key} as key
), unburied as (
    delete from outbox.tombstones t
     where t.cache = $1 and t.key = any (array(select u.key::text from upserted u))
       and (select exists (select from outbox.tombstones o where o.cache = $1))
), spoken_for as materialized (
    -- Each kind of range by itself, so that the key's index finds its keys. The first page of a rebuild and the last one,
    -- whose ranges are open at one end, may each read all of the index once.
    select k.key from outbox.page_ranges r
     cross join lateral (
        select c.{key} as key from {table} c where r.after_key is null and r.through_key is null
        union all
        select c.{key} from {table} c where r.after_key is null and c.{key}{key_order} <= r.through_key::{key_type}
        union all
        select c.{key} from {table} c where r.through_key is null and c.{key}{key_order} > r.after_key::{key_type}
        union all
        select c.{key} from {table} c
         where c.{key}{key_order} > r.after_key::{key_type} and c.{key}{key_order} <= r.through_key::{key_type}) k
     where r.page_id = $2
    union all
    select c.{key} from {table} c where c.{key} = any ($4::text[]::{key_type}[])
), absent as materialized (
    select s.key from spoken_for s where s.key not in (select x.{key} from page_rows x)
), removed as (
    delete from {table} c
     where c.{key} = any (array(select a.key from absent a))
       and (case when c.outbox_log = (select q.log_id from page q)
                 then pg_visible_in_snapshot(c.outbox_transaction_id, (select q.snapshot from page q))
                 else (select q.ordinal from page q) > outbox.log_ordinal(c.outbox_log) end) is not false
       and (c.outbox_page is null or c.outbox_page not in (select l.id from later l))
    returning c.{key} as key
), buried as (
    insert into outbox.tombstones as t (cache, key, log_id, page_id)
    select $1, k.key, page.log_id, page.id
      from unnest($4::text[]) k(key) cross join page
     where k.key not in (select x.{key}::text from page_rows x)
       and k.key not in (select s.key::text from spoken_for s where s.key not in (select d.key from removed d))
     order by k.key
    on conflict (cache, key) do update
       set page_id = excluded.page_id, log_id = excluded.log_id,
           position = case when t.log_id = excluded.log_id then t.position end,
           transaction_id = case when t.log_id = excluded.log_id then t.transaction_id end
     where outbox.page_sees((select q.log_id from page q), (select q.snapshot from page q), t.log_id, t.transaction_id)
           is not false
       and (t.page_id is null or t.page_id not in (select l.id from later l))
), late as (
    select x.{key}::text as key from page_rows x join {table} c on c.{key} = x.{key}
     where (select count(*) from upserted) < (select count(*) from page_rows)
       and x.{key} not in (select u.key from upserted u)
       and outbox.page_sees((select q.log_id from page q), (select q.snapshot from page q), c.outbox_log,
                            c.outbox_transaction_id) is false
       and (c.outbox_page is null or c.outbox_page not in (select l.id from later l))
)
select (select count(*) from upserted) as written, (select count(*) from removed) as removed,
       array(select l.key from late l) as late
