-- Looking at parked keys; nothing here writes or locks.

-- name: keys
-- Parked keys by primary key, with how many of their events wait ($4 at most counted a key, by
-- idx_parked_events_parker_topic_key). $1 parker and $2 topic narrow it where they are not null. Rows: $3.
select k.parker, k.topic, k.key, k.shard, k.partition, k.reason, k.detail, k.parked_at, c.events
  from outbox.parked_keys k
 cross join lateral (select count(*) as events
                       from (select from outbox.parked_events e
                              where e.parker = k.parker and e.topic = k.topic and e.key = k.key and e.state = 'parked'
                              limit $4) x) c
 where ($1::text is null or k.parker = $1) and ($2::text is null or k.topic = $2)
 order by k.parker, k.topic, k.key limit $3

-- name: named
-- The same for one key, in whatever topics and by whomever it is parked. Reads all parked keys. Rows: $5.
select k.parker, k.topic, k.key, k.shard, k.partition, k.reason, k.detail, k.parked_at, c.events
  from outbox.parked_keys k
 cross join lateral (select count(*) as events
                       from (select from outbox.parked_events e
                              where e.parker = k.parker and e.topic = k.topic and e.key = k.key and e.state = 'parked'
                              limit $4) x) c
 where k.key = $1 and ($2::text is null or k.parker = $2) and ($3::text is null or k.topic = $3)
 order by k.parker, k.topic limit $5

-- name: events
-- One key's waiting events in the order in which they will be released, by idx_parked_events_parker_topic_key.
-- Of each payload at most $5 bytes. Rows: $4.
select e.log_id, e.window_no, e.ordinal, e.position, e.partition, e."offset", e.event_id::text as event_id, e.event_type,
       e.schema_version, e.headers::text as headers, substring(e.payload from 1 for $5) as payload,
       octet_length(e.payload) as payload_bytes, e.created_at, e.parked_at
  from outbox.parked_events e
 where e.parker = $1 and e.topic = $2 and e.key = $3 and e.state = 'parked'
 order by e.id limit $4
