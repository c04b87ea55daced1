-- Keys of a cache that wait. Whoever changes the events of a parked key locks its row in parked_keys first, so a batch
-- that queues behind a key and a person who discards it take turns.

-- name: waiting
-- Which of these keys wait ($3), locked until the batch ends, and whether they are to be tried now.
-- Locks: their rows of parked_keys, by primary key, in order.
-- The list is walked because PostgreSQL may read all keys of the cache instead.
select w.key, w.due
  from (select u.key from unnest($3::text[]) u(key) order by u.key) x
 cross join lateral (select k.key, k.retry_at is not null and k.retry_at <= now() as due from outbox.parked_keys k
                      where k.parker = $1 and k.topic = $2 and k.key = x.key offset 0 for update) w

-- name: resolve
-- Full rows or deletions of these keys ($3) from these logs ($4) took effect: what waited is history. Events of a newer
-- log keep waiting. Locks: held since `waiting`. Index: idx_parked_events_parker_topic_key. Rows: the keys' events.
with resolved as (
    select x.key, x.log_id from unnest($3::text[], $4::text[]) x(key, log_id)
), freed as (
    delete from outbox.parked_events e using resolved r
     where e.parker = $1 and e.topic = $2 and e.key = r.key and e.state = 'parked'
       and outbox.supersedes(r.log_id, e.log_id)
    returning e.key
), closed as (
    delete from outbox.parked_keys k using resolved r
     where k.parker = $1 and k.topic = $2 and k.key = r.key
       and not exists (select from outbox.parked_events e
                        where e.parker = $1 and e.topic = $2 and e.key = k.key and e.state = 'parked'
                          and not outbox.supersedes(r.log_id, e.log_id))
)
select count(*) from freed

-- name: room
-- How many events wait for a cache, counted up to $2. Index: idx_parked_events_parker_topic_key. Rows: at most $2.
select count(*) from (select from outbox.parked_events e where e.parker = $1 and e.state = 'parked' limit $2) e

-- name: open_keys
-- Parks keys ($3) with the reason of their first event, to be tried in $7 seconds; a key that waits already keeps its own,
-- but is locked, so that nobody frees it before what is about to be queued is there. One row a key.
insert into outbox.parked_keys (parker, topic, partition, key, reason, detail, retry_at)
select $1, $2, $4, x.key, x.reason, x.detail, clock_timestamp() + make_interval(secs => $7)
  from unnest($3::text[], $5::text[], $6::text[]) x(key, reason, detail) order by x.key
on conflict (parker, topic, key) do update set key = excluded.key where false

-- name: queue
-- Events behind their parked keys, in order. One row an event.
insert into outbox.parked_events (parker, topic, partition, key, "offset", log_id, shard, window_no, ordinal, position,
                                  transaction_id, event_id, event_type, schema_version, headers, payload, created_at)
select $1, $2, $3, x.key, x."offset", x.log_id, x.shard, x.window_no, x.ordinal, x.position, x.transaction_id::xid8,
       x.event_id, x.event_type, x.schema_version, x.headers::jsonb, x.payload, to_timestamp(x.created_ms / 1000.0)
  from unnest($4::text[], $5::bigint[], $6::text[], $7::smallint[], $8::bigint[], $9::integer[], $10::bigint[],
              $11::text[], $12::uuid[], $13::text[], $14::smallint[], $15::text[], $16::bytea[], $17::bigint[])
       with ordinality as x(key, "offset", log_id, shard, window_no, ordinal, position, transaction_id, event_id,
                            event_type, schema_version, headers, payload, created_ms, place)
 order by x.place
