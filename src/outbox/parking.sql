-- Parked keys: looking at them, and what people decide about them.

-- name: keys
-- Parked keys by primary key, with how many of their events wait ($4 at most counted a key, by
-- idx_parked_events_parker_topic_key). $1 parker and $2 topic narrow it where they are not null. Rows: $3.
select k.parker, k.topic, k.key, k.shard, k.partition, k.reason, k.detail, k.parked_at,
       k.attempts, k.retry_at, c.events
  from outbox.parked_keys k
 cross join lateral (select count(*) as events
                       from (select from outbox.parked_events e
                              where e.parker = k.parker and e.topic = k.topic and e.key = k.key and e.state = 'parked'
                              limit $4) x) c
 where ($1::text is null or k.parker = $1) and ($2::text is null or k.topic = $2)
 order by k.parker, k.topic, k.key limit $3

-- name: named
-- The same for one key, in whatever topics and by whomever it is parked. Reads all parked keys. Rows: $5.
select k.parker, k.topic, k.key, k.shard, k.partition, k.reason, k.detail, k.parked_at,
       k.attempts, k.retry_at, c.events
  from outbox.parked_keys k
 cross join lateral (select count(*) as events
                       from (select from outbox.parked_events e
                              where e.parker = k.parker and e.topic = k.topic and e.key = k.key and e.state = 'parked'
                              limit $4) x) c
 where k.key = $1 and ($2::text is null or k.parker = $2) and ($3::text is null or k.topic = $3)
 order by k.parker, k.topic limit $5

-- name: events
-- One key's waiting events in the order in which they will be released, by idx_parked_events_parker_topic_key. What the relay
-- parked for a second time stands behind what it is to precede, but for its position.
-- Of each payload at most $5 bytes. Rows: $4.
select e.log_id, e.window_no, e.ordinal, e.position, e.partition, e."offset", e.event_id::text as event_id, e.event_type,
       e.schema_version, e.headers::text as headers, substring(e.payload from 1 for $5) as payload,
       octet_length(e.payload) as payload_bytes, e.created_at, e.parked_at
  from outbox.parked_events e
 where e.parker = $1 and e.topic = $2 and e.key = $3 and e.state = 'parked'
 order by case when e.parker = 'relay' then e.position end, e.id limit $4

-- name: retry
-- Flags parked keys, named by parker, topic and key, and wakes the relays concerned. How many there were comes back.
-- Locks: the keys' rows, by primary key, in order; a batch that has one may take a while.
with flagged as (
    update outbox.parked_keys k set retry_at = now()
      from (select p.parker, p.topic, p.key from outbox.parked_keys p
             where (p.parker, p.topic, p.key) in (select * from unnest($1::text[], $2::text[], $3::text[]))
             order by 1, 2, 3 for update) w
     where k.parker = w.parker and k.topic = w.topic and k.key = w.key
    returning k.parker, k.shard
), woken as materialized (
    select pg_notify('outbox_wake', s.shard || ' parked')
      from (select distinct f.shard from flagged f where f.parker = 'relay' and f.shard is not null) s
)
select (select count(*) from flagged) as flagged, (select count(*) from woken) as woken

-- name: retry_page
-- The same for the next $7 keys behind ($1, $2, $3), narrowed to a parker ($4), topic ($5) and reason ($6) where not null.
-- The last of them comes back with their number. By primary key.
with page as (
    select p.parker, p.topic, p.key from outbox.parked_keys p
     where (p.parker, p.topic, p.key) > ($1, $2, $3)
       and ($4::text is null or p.parker = $4) and ($5::text is null or p.topic = $5) and ($6::text is null or p.reason = $6)
     order by p.parker, p.topic, p.key limit $7 for update
), flagged as (
    update outbox.parked_keys k set retry_at = now() from page w
     where k.parker = w.parker and k.topic = w.topic and k.key = w.key
    returning k.parker, k.topic, k.key, k.shard
), woken as materialized (
    select pg_notify('outbox_wake', s.shard || ' parked')
      from (select distinct f.shard from flagged f where f.parker = 'relay' and f.shard is not null) s
)
select f.parker, f.topic, f.key, count(*) over () as flagged, (select count(*) from woken) as woken
  from flagged f order by f.parker desc, f.topic desc, f.key desc limit 1

-- name: discard_relayed
-- A key of the relay's; see outbox.discard_parked, which locks the shard row. Rows: the key's waiting events.
select outbox.discard_parked($1, $2)

-- name: hold
-- A key of a cache, before a statement of its own deletes what waits: a batch that had the key may have queued something,
-- which only a later snapshot shows. Lock: the row, by primary key.
select from outbox.parked_keys k where k.parker = $1 and k.topic = $2 and k.key = $3 for update

-- name: discard
-- The key and its events, by idx_parked_events_parker_topic_key; how many events they were. Locked by `hold`.
with closed as (
    delete from outbox.parked_keys k where k.parker = $1 and k.topic = $2 and k.key = $3
), gone as (
    delete from outbox.parked_events e where e.parker = $1 and e.topic = $2 and e.key = $3 and e.state = 'parked' returning 1
)
select count(*) from gone
