-- Reading a cache. Templates, like the merge.

-- name: one
-- The row of a key. No lock; by the key's index; at most one row.
select {read_c} from {table} c where c.{key} = $1

-- name: many
-- The rows of some keys. No lock; by the key's index; at most one row a key.
select {read_c} from {table} c where c.{key} = any ($1)

-- name: seen
-- The row of a key ($1, as text $2), and whether the cache has the event at position $5 of log $4, of transaction $6, or
-- something newer: row or tombstone shows that position or a later one, a page of the owner that speaks for the key sees
-- the transaction, or everything below some later transaction was applied and the key is not parked.
-- $3 the table's name, because another table may have it since the statement was composed. No lock; by the key's index, primary keys and what is remembered of pages; one row.
select {read_c}, c.{key} is not null as outbox_found,
       current_setting('transaction_isolation') <> 'read committed' as outbox_keeps_snapshot,
       coalesce(c.outbox_log = $4 and c.outbox_position >= $5
                or c.outbox_log <> $4 and outbox.log_ordinal(c.outbox_log) > outbox.log_ordinal($4), false)
    or coalesce(t.log_id = $4 and t.position >= $5
                or t.log_id <> $4 and outbox.log_ordinal(t.log_id) > outbox.log_ordinal($4), false)
    or exists (select from outbox.pages p left join outbox.page_ranges r on r.page_id = p.id
                where p.cache = to_regclass($3) and outbox.page_sees(p.log_id, p.snapshot, $4, $6::text::xid8)
                  and (p.id in (c.outbox_page, t.page_id)
                       or r.page_id is not null
                          and (r.after_key is null or $2::text::{key_type}{key_order} > r.after_key::{key_type})
                          and (r.through_key is null or $2::text::{key_type}{key_order} <= r.through_key::{key_type})))
    or exists (select from outbox.caches k
                 join outbox.freshness f on f.consumer = k.consumer and f.topic = k.topic
                where k.cache = to_regclass($3) and f.log_id = $4 and f.oldest_xid > $6::text::xid8
                  and outbox.key_hash(k.topic, $2) <> all (f.parked)
                  and not exists (select from outbox.parked_keys q
                                   where q.parker = k.name and q.topic = k.topic and q.key = $2)) as outbox_seen
  from (select) one
  left join {table} c on c.{key} = $1
  left join outbox.tombstones t on t.cache = to_regclass($3) and t.key = $2
