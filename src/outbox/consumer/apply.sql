-- How far a partition was applied.

-- name: claim
-- A partition for this process: the epoch grows, so that whoever had it is fenced. Waits for the row lock of a batch
-- that the former owner has open, and then sees what that committed. $4 where a partition never read before begins; if
-- Kafka has deleted what was before it, the caches lack events.
-- Locks: one row of positions, by primary key, and at most once the consumer's rows of rebuilds and caches.
with claimed as (
    insert into outbox.positions as p (consumer, topic, partition, next_offset, owner)
    values ($1, $2, $3, $4, $5)
    on conflict (consumer, topic, partition) do update
       set epoch = p.epoch + 1, owner = excluded.owner, updated_at = clock_timestamp()
    returning next_offset, epoch, last_event_id, state
)
select n.next_offset, n.epoch, n.last_event_id, n.state,
       case when n.epoch = 1 and n.next_offset > 0 then array(select outbox.lose_events($1, $2)) end as incomplete
  from claimed n

-- name: stored_state
-- What a partition that stands still is to do now. No lock; by primary key.
select p.state from outbox.positions p where p.consumer = $1 and p.topic = $2 and p.partition = $3

-- name: set_state
-- Whether a partition stands still, and why; only its present owner says so. Lock: one row of positions, by primary key.
update outbox.positions p set state = $5, updated_at = clock_timestamp()
 where p.consumer = $1 and p.topic = $2 and p.partition = $3 and p.epoch = $4 and p.state <> $5

-- name: restart
-- A partition that `outbox cache rebuild` set free goes on at the first record ($5) that Kafka has. What was applied
-- keeps its marks, so that no record of it counts twice. Freshness begins anew: offsets of the topic before it was
-- re-created say nothing about this one, and what Kafka had deleted is missing.
-- Locks: one row of positions, by primary key, and the consumer's rows of caches.
with restarted as (
    update outbox.positions p
       set next_offset = $5, last_event_id = null, state = 'running', updated_at = clock_timestamp()
     where p.consumer = $1 and p.topic = $2 and p.partition = $3 and p.epoch = $4 and p.state = 'restarting'
    returning p.consumer, p.topic
), gapped as (
    update outbox.caches c set has_gap = true from restarted r where c.consumer = r.consumer and c.topic = r.topic
), unsaid as (
    delete from outbox.watermarks w using restarted r where w.consumer = r.consumer
)
delete from outbox.freshness f using restarted r where f.consumer = r.consumer and f.topic = r.topic

-- name: applied
-- The marks of a partition; a statement after the claim, or it would not see what the claim waited for.
-- No lock; by primary key; rows: logs and shards that wrote to the partition.
select a.log_id, a.shard, a.window_no, a.ordinal
  from outbox.applied a where a.consumer = $1 and a.topic = $2 and a.partition = $3

-- name: advance
-- First statement of a batch: the compare-and-swap that locks the partition's row, and the marks of what the batch
-- applies. No row comes back if the epoch or the offset is another one: then nothing was changed.
-- Returns the parkers of $12 that have parked keys in the topic, and the tables of the caches $14, which stay the same
-- until the batch ends: their lock is shared by batches, and held alone by whoever merges a page. And whether the consumer
-- has other caches of the topic, which this process does not feed, and which count as complete or are being completed.
-- A process that is frozen from here on loses the batch.
-- A plan kept from when the cache was empty reads all of it later, so the batch's statements are planned each time; but
-- where all of them are right under any plan that uses indexes ($15), theirs are kept.
-- Locks: one row of positions, at most one row of applied a log and shard; by primary keys.
with moved as (
    update outbox.positions p set next_offset = $6, last_event_id = $7, updated_at = clock_timestamp()
     where p.consumer = $1 and p.topic = $2 and p.partition = $3 and p.epoch = $4 and p.next_offset = $5
    returning p.consumer, p.topic, p.partition
), marked as (
    insert into outbox.applied (consumer, topic, partition, log_id, shard, window_no, ordinal)
    select m.consumer, m.topic, m.partition, x.log_id, x.shard, x.window_no, x.ordinal
      from moved m
     cross join unnest($8::text[], $9::smallint[], $10::bigint[], $11::bigint[]) x(log_id, shard, window_no, ordinal)
     order by x.log_id, x.shard
    on conflict (consumer, topic, partition, log_id, shard) do update
       set window_no = excluded.window_no, ordinal = excluded.ordinal
)
select outbox.waiting_parkers($12, $2) as parkers,
       outbox.hold_caches($14, $1) as tables,
       exists (select from outbox.caches c left join outbox.rebuilds r on r.cache = c.cache and r.finished_at is null
                where c.consumer = $1 and c.topic = $2 and c.name <> all ($14)
                  and (c.complete_log is not null or not c.has_gap or r.pages > 0 or r.worker is not null)) as passes_by,
       set_config('idle_in_transaction_session_timeout', $13, true) as idle_timeout,
       set_config('plan_cache_mode', case when $15::boolean then 'force_generic_plan' else 'force_custom_plan' end, true) as planning,
       case when $15 then set_config('enable_seqscan', 'off', true) end as scanning
  from moved

-- name: lose_events
-- The batch at hand reaches only the caches $3 of the consumer. Locks: the others' rows of rebuilds and caches.
select outbox.lose_events($1, $2, $3)

-- name: forget_dropped
-- Tables that are gone take along what was known of them. Rows: caches of the database.
with dropped as (
    delete from outbox.caches c where not exists (select from pg_class r where r.oid = c.cache) returning c.cache
)
delete from outbox.tombstones t using dropped d where t.cache = d.cache

-- name: forget_renamed
-- Where table $1 has taken the name $2 of another one, which is not called that (quoted: $3) any more, the other one is
-- no cache's. By caches_name_role_key; rows: at most one of caches, and what is known of it.
with renamed as (
    delete from outbox.caches c
     where c.name = $2 and c.role = 'live' and c.cache::oid is distinct from to_regclass($3)::oid
       and not exists (select from outbox.caches s where s.cache = $1::oid and s.name = $2)
    returning c.cache
)
delete from outbox.tombstones t using renamed r where t.cache = r.cache

-- name: fed_by
-- Which consumer feeds a table; null where none ever did. By primary key; at most one row.
select c.consumer from outbox.caches c where c.cache = $1::oid

-- name: register
-- A consumer feeds this table for the cache of this name. The table may have been dropped and made anew, or join a
-- consumer that has begun: then events are missing that were applied before. Where another consumer fed it, or another
-- topic did, it is incomplete until the owner's pages have been merged from now on, and so is its spare table.
-- A table that has lost its name ($6, quoted) since it was found is not registered: its batches find out.
-- Rows: 1 of caches, 2 and as many of rebuilds where it moves.
with moved as (
    select c.cache from outbox.caches c
     where c.name = $2 and (c.consumer, c.topic) is distinct from ($3, $4)
), begun_again as (
    update outbox.rebuilds r
       set worker = null, lease_until = null, log_id = null, after_key = null, pages = 0, rows = 0, changed = 0, removed = 0
      from moved m where r.cache = m.cache and r.finished_at is null
), spare as (
    update outbox.caches c set consumer = $3, topic = $4, complete_log = null, updated_at = clock_timestamp()
      from moved m where c.cache = m.cache and c.role = 'spare'
)
insert into outbox.caches as c (cache, name, consumer, topic, notifies, has_gap)
select $1::oid, $2, $3, $4, $5, exists (select from outbox.positions p where p.consumer = $3 and p.topic = $4)
 where to_regclass($6)::oid = $1::oid
on conflict (cache) do update
   set consumer = excluded.consumer, topic = excluded.topic, name = excluded.name, notifies = excluded.notifies,
       complete_log = case when (c.consumer, c.topic) = (excluded.consumer, excluded.topic) then c.complete_log end,
       has_gap = c.has_gap or c.topic <> excluded.topic or c.consumer <> excluded.consumer and excluded.has_gap,
       updated_at = clock_timestamp()
 where (c.consumer, c.topic, c.name, c.notifies)
       is distinct from (excluded.consumer, excluded.topic, excluded.name, excluded.notifies)

-- name: spare
-- The table that is to take the place of a cache's, if it is being rebuilt. By caches_name_role_key; at most one row.
select c.cache::oid as oid, r.relname as name
  from outbox.caches c join pg_class r on r.oid = c.cache where c.name = $1 and c.role = 'spare'

-- name: database
-- Tells services apart that call their consumers the same. Reads nothing.
select current_database()

-- name: immediate
-- Lets deferred constraints of the user's table speak within the savepoint of the key that violates them.
set constraints all immediate
