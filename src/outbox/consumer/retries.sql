-- Parked keys of caches and inboxes that are tried again. Their events change under the lock of the key's row in parked_keys.

-- name: due
-- Which of these partitions ($2 topics, $3 numbers) have keys of these parkers ($1) to be tried now. No lock. The first
-- entry of idx_parked_keys_parker_retry_at for each parker and partition; once a second a process.
select a.topic, a.partition from unnest($2::text[], $3::integer[]) a(topic, partition)
 where exists (select from unnest($1::text[]) p(parker)
                cross join lateral (select from outbox.parked_keys k
                                     where k.parker = p.parker and k.topic = a.topic and k.partition = a.partition
                                       and k.retry_at is not null and k.retry_at <= now() limit 1) d)

-- name: due_keys
-- The keys of a partition to be tried now, those first that have been waiting longest. Locks: their rows of parked_keys, in
-- the order in which batches take them. By idx_parked_keys_parker_retry_at; rows: $4.
with oldest as materialized (
    select d.key from outbox.parked_keys d
     where d.parker = $1 and d.topic = $2 and d.partition = $3 and d.retry_at is not null and d.retry_at <= now()
     order by d.retry_at limit $4
)
select w.key
  from (select o.key from oldest o order by o.key) x
 cross join lateral (select k.key from outbox.parked_keys k
                      where k.parker = $1 and k.topic = $2 and k.key = x.key and k.retry_at <= now() offset 0 for update) w

-- name: events
-- What waits for a key, in order, by idx_parked_events_parker_topic_key. Rows: $4.
select e.id, e."offset", (date_part('epoch', e.created_at) * 1000)::bigint as created_ms, e.headers::text as headers,
       e.payload
  from outbox.parked_events e
 where e.parker = $1 and e.topic = $2 and e.key = $3 and e.state = 'parked' order by e.id limit $4

-- name: applied
-- These events wait no more. By primary key.
delete from outbox.parked_events e where e.id = any ($1::bigint[])

-- name: free
-- The key is free if nothing waits for it any more; whether it is. By primary key and idx_parked_events_parker_topic_key.
with freed as (
    delete from outbox.parked_keys k
     where k.parker = $1 and k.topic = $2 and k.key = $3
       and not exists (select from outbox.parked_events e
                        where e.parker = $1 and e.topic = $2 and e.key = $3 and e.state = 'parked')
    returning 1
)
select exists (select from freed)

-- name: failed
-- The key goes on waiting: twice as long as the last time, from $6 seconds to $7, and after $8 attempts for a person. Where
-- another event is the first one now ($9), its attempts are counted anew.
update outbox.parked_keys k
   set reason = $4, detail = $5, attempts = n.attempts,
       retry_at = case when n.attempts < $8::integer
                       then clock_timestamp() + make_interval(secs => least($7::float8, $6::float8 * 2 ^ n.attempts)) end
  from (select case when $9 then 0 else o.attempts + 1 end as attempts
          from outbox.parked_keys o where o.parker = $1 and o.topic = $2 and o.key = $3) n
 where k.parker = $1 and k.topic = $2 and k.key = $3
