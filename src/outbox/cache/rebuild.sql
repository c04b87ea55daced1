-- A rebuild's progress and lease. One row a table, which each page moves in its own transaction.

-- name: take
-- The rebuild of table $1 for worker $2, for $3 seconds: begun, gone on with, or, if $4, begun anew. A finished one begins
-- anew. Nothing comes back while another worker's lease runs, nor where the table holds all of log $5 already.
-- Lock: one row of rebuilds, by primary key.
insert into outbox.rebuilds as r (cache, worker, lease_until)
select c.cache, $2, clock_timestamp() + make_interval(secs => $3)
  from outbox.caches c where c.cache = $1::oid and ($5::text is null or c.complete_log is distinct from $5)
on conflict (cache) do update
   set worker = excluded.worker, lease_until = excluded.lease_until, updated_at = clock_timestamp(), finished_at = null,
       log_id = case when not ($4 or r.finished_at is not null) then r.log_id end,
       after_key = case when not ($4 or r.finished_at is not null) then r.after_key end,
       pages = case when $4 or r.finished_at is not null then 0 else r.pages end,
       rows = case when $4 or r.finished_at is not null then 0 else r.rows end,
       changed = case when $4 or r.finished_at is not null then 0 else r.changed end,
       removed = case when $4 or r.finished_at is not null then 0 else r.removed end,
       started_at = case when $4 or r.finished_at is not null then clock_timestamp() else r.started_at end
 where r.worker = excluded.worker or r.lease_until is null or r.lease_until < clock_timestamp()
returning log_id, after_key, pages, rows, changed, removed

-- name: holder
-- Who rebuilds table $1, until when, and whether a consumer feeds the table at all. By primary keys; one row.
select c.cache is not null as fed, c.complete_log, r.worker, r.lease_until, r.lease_until >= clock_timestamp() as held
  from (select) one
  left join outbox.caches c on c.cache = $1::oid
  left join outbox.rebuilds r on r.cache = c.cache

-- name: parker
-- By which name the keys of table $1 are parked: the cache's, while it is the live one. By primary key; one row.
select case c.role when 'live' then c.name else r.relname end
  from outbox.caches c join pg_class r on r.oid = c.cache where c.cache = $1::oid

-- name: renew
-- The worker lives. Lock: one row of rebuilds, by primary key.
update outbox.rebuilds r set lease_until = clock_timestamp() + make_interval(secs => $3)
 where r.cache = $1::oid and r.worker = $2 and r.finished_at is null

-- name: release
-- The worker ends; another one may go on at once. Lock: one row of rebuilds, by primary key.
update outbox.rebuilds r set lease_until = null where r.cache = $1::oid and r.worker = $2

-- name: moved
-- In the page's own transaction: a page of log $3 up to key $4 was merged; $8: the last one. No row comes back if the
-- rebuild belongs to another worker by now: then the page is rolled back. Lock: one row of rebuilds, by primary key.
update outbox.rebuilds r
   set log_id = $3, after_key = $4, pages = r.pages + 1, rows = r.rows + $5, changed = r.changed + $6,
       removed = r.removed + $7, updated_at = clock_timestamp(),
       finished_at = case when $8 then clock_timestamp() end,
       lease_until = case when not $8 then greatest(r.lease_until, clock_timestamp()) end
 where r.cache = $1::oid and r.worker = $2 and r.finished_at is null
returning pages, rows, changed, removed

-- name: done
-- What this worker's rebuild came to, if it has ended. By primary key; at most one row.
select r.pages, r.rows, r.changed, r.removed
  from outbox.rebuilds r where r.cache = $1::oid and r.worker = $2 and r.finished_at is not null

-- name: complete
-- All pages of log $2 are in table $1. Lock: one row of caches, by primary key.
update outbox.caches c set complete_log = $2, updated_at = clock_timestamp() where c.cache = $1::oid

-- name: halted
-- Whether partitions of the cache's topic stand still. By primary keys; one row.
select exists (select from outbox.caches c
                 join outbox.positions p on p.consumer = c.consumer and p.topic = c.topic
                where c.cache = $1::oid and p.state in ('recreated', 'needs_rebuild'))

-- name: free
-- Partitions of the cache's topic that stand still may go on with what Kafka has. What they lost is missing in every table
-- that the consumer feeds from the topic, so all of those are incomplete until their own rebuild has ended, and what was
-- merged by rebuilds under way does not count: they begin again.
-- Locks: those rows of positions, rebuilds and caches. Returns the caches, if any partition was freed.
with freed as (
    update outbox.positions p set state = 'restarting', updated_at = clock_timestamp()
      from outbox.caches c
     where c.cache = $1::oid and p.consumer = c.consumer and p.topic = c.topic
       and p.state in ('recreated', 'needs_rebuild')
    returning p.consumer, p.topic
)
select i.name from (select distinct f.consumer, f.topic from freed f) f cross join lateral outbox.lose_events(f.consumer, f.topic) i(name)

-- name: estimate
-- About how many rows a table has, by the planner's statistics; -1 where there are none. Reads the catalogue.
select c.reltuples::bigint from pg_class c where c.oid = $1::oid
