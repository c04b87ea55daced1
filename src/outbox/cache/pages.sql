-- Pages of the owner: what goes around merge_page in merge.sql.

-- name: cache_name
-- The name by which a table's cache is locked, and whether its readers are told of changes. No lock; by primary key.
select c.name, c.notifies and c.role = 'live' as notifies from outbox.caches c where c.cache = $1::oid

-- name: lock_alone
-- Waits for the open batches of the cache, while later ones wait; until the transaction ends. See outbox.hold_caches.
-- What follows is planned each time: a plan kept from when the cache was empty reads all of it for each page.
select pg_advisory_xact_lock(1868724274, hashtext($1)), set_config('plan_cache_mode', 'force_custom_plan', true)

-- name: open
-- Records a page, and the range of keys that it speaks for; nothing comes back where the page is older than what was
-- forgotten of its log, or its log is older than that, or where the table is not called $7 any more, because generations
-- were swapped. Rows: 1 of pages, 1 of page_ranges.
with recorded as (
    insert into outbox.pages (cache, log_id, snapshot)
    select c.cache, $2, $3::text::pg_snapshot from outbox.caches c
     where c.cache = $1::oid and c.cache = to_regclass($7)
       and (c.floor_log is null or outbox.log_ordinal($2) > outbox.log_ordinal(c.floor_log)
            or $2 = c.floor_log and pg_snapshot_xmin($3::text::pg_snapshot) >= c.floor_xid)
    returning id, cache
), ranged as (
    insert into outbox.page_ranges (page_id, cache, after_key, through_key)
    select r.id, r.cache, $5, $6 from recorded r where $4::boolean
)
select id from recorded

-- name: parked
-- The parked keys of a table, locked until the transaction ends. By primary key, in order; rows: at most $3.
select k.key from outbox.parked_keys k where k.parker = $1 and k.topic = $2 order by k.key limit $3 for update

-- name: void
-- Waiting events of these keys ($3) that a page of log $4 with snapshot $5 contains are history; where others wait behind
-- them, they are tried again now. Locks: held since `parked`. Index: idx_parked_events_parker_topic_key.
with voided as (
    delete from outbox.parked_events e
     where e.parker = $1 and e.topic = $2 and e.key = any ($3::text[]) and e.state = 'parked'
       and outbox.page_sees($4, $5::text::pg_snapshot, e.log_id, e.transaction_id)
    returning e.id
), left_over as (
    select distinct e.key from outbox.parked_events e
     where e.parker = $1 and e.topic = $2 and e.key = any ($3::text[]) and e.state = 'parked'
       and e.id not in (select v.id from voided v)
), closed as (
    delete from outbox.parked_keys k
     where k.parker = $1 and k.topic = $2 and k.key = any ($3::text[]) and k.key not in (select l.key from left_over l)
)
update outbox.parked_keys k set retry_at = clock_timestamp(), attempts = 0
 where k.parker = $1 and k.topic = $2 and k.key in (select l.key from left_over l)
