-- The writer's side. Takes no lock but those of an insert and, per shard, the shared advisory lock of outbox.wake.

-- name: flush
-- All events of a unit of work in one insert, and the wake-up of idle relays. Rows: as many as events.
-- The ordinality makes positions follow the order emitted: a join may hand rows on in any order, a hash join does so
-- backwards. The outer select is what forces the wake-up to run.
with emitted as (
    insert into outbox.events (shard, topic, key, event_id, event_type, schema_version, headers, payload)
    select outbox.shard_of(x.key, (select l.shard_count from outbox.logs l where l.is_current)),
           x.topic, x.key, x.event_id, x.event_type, x.schema_version, x.headers::jsonb,
           outbox.fits(x.payload, x.key, x.headers::jsonb, x.topic, t.max_message_bytes)
      from unnest($1::text[], $2::text[], $3::uuid[], $4::text[], $5::smallint[], $6::text[], $7::bytea[])
           with ordinality as x(topic, key, event_id, event_type, schema_version, headers, payload, nth)
      left join outbox.topics t on t.topic = x.topic
     order by x.nth
    returning position, shard, topic, key
), woken as (
    select count(outbox.wake(s.shard)) as shards from (select distinct e.shard from emitted e) s
)
select e.topic, e.key, max(e.position) as position,
       (select l.log_id from outbox.logs l where l.is_current) as log_id,
       pg_current_xact_id()::text as transaction_id
  from emitted e cross join woken
 group by e.topic, e.key
