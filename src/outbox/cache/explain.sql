-- Why a row is what it is. Takes no lock but those of a read. Templates where they name {table}.

-- name: subject
-- The cache whose live table is $1 (a quoted name, as it is on this connection) or that is declared as $2, and how fresh
-- it is for the key $3. Rows: at most one of caches; by primary keys.
select c.cache::oid as oid, c.name, c.consumer, c.topic, c.complete_log, f.log_id, f.complete_as_of,
       date_part('epoch', clock_timestamp() - f.complete_as_of) as lag_seconds,
       coalesce(outbox.key_hash(c.topic, $3) = any (f.parked), false) as parked_at_owner
  from outbox.caches c
  left join outbox.freshness f on f.consumer = c.consumer and f.topic = c.topic
 where c.role = 'live' and (c.cache = to_regclass($1)::oid or c.name = $2)
 order by (c.cache = to_regclass($1)::oid) is true desc limit 1

-- name: row
-- The row of a key. By the key's index; at most one row.
select to_jsonb(c)::text as document, c.outbox_log as log_id, c.outbox_position as position,
       c.outbox_transaction_id::text as transaction_id, c.outbox_partition as partition, c.outbox_offset as "offset",
       c.outbox_page as page_id, c.last_synced_at as at
  from {table} c where c.{key} = $1::text::{key_type}

-- name: tombstone
-- What says that the key is deleted. By primary key; at most one row.
select t.log_id, t.position, t.transaction_id::text as transaction_id, t.page_id, t.deleted_at as at
  from outbox.tombstones t where t.cache = $1::oid and t.key = $2

-- name: pages
-- Pages of the owner that speak for a key ($2), or that row or tombstone ($3) name; the newest first. Reads what is
-- remembered of the cache's pages, by idx_pages_cache_place. Rows: at most $4.
select p.id, p.log_id, p.snapshot::text as snapshot, p.merged_at, r.page_id is not null as is_range, r.after_key, r.through_key
  from outbox.pages p left join outbox.page_ranges r on r.page_id = p.id
 where p.cache = $1::oid
   and (p.id = any ($3::bigint[])
        or r.page_id is not null
           and (r.after_key is null or $2::text::{key_type}{key_order} > r.after_key::{key_type})
           and (r.through_key is null or $2::text::{key_type}{key_order} <= r.through_key::{key_type}))
 order by p.place desc, p.id desc limit $4

-- name: seen
-- For events by their number, log ($1) and transaction ($2): the newest of the pages $3 that contains each, by the rule of
-- the merge. Rows: those events that a page contains.
select e.number::integer as number,
       (select p.id from outbox.pages p
         where p.id = any ($3::bigint[]) and outbox.page_sees(p.log_id, p.snapshot, e.log_id, e.transaction_id::xid8)
         order by p.place desc, p.id desc limit 1) as page_id
  from unnest($1::text[], $2::text[]) with ordinality e(log_id, transaction_id, number)

-- name: positions
-- Where the consumer stands in the topic. By primary key; rows: partitions.
select p.partition, p.next_offset, p.state from outbox.positions p where p.consumer = $1 and p.topic = $2

-- name: parked_offsets
-- Where the waiting events of a key came from, for one parker. By idx_parked_events_parker_topic_key. Rows: at most $4.
select e.partition, e."offset" from outbox.parked_events e
 where e.parker = $1 and e.topic = $2 and e.key = $3 and e.state = 'parked' and e."offset" is not null
 order by e.id limit $4
