-- Looking at the log. Takes no lock but those of a read, in a transaction that is rolled back.

-- name: prepare
-- Plans must not depend on statistics: the tables may have grown by millions of rows since the last ANALYZE.
-- Without sorts and bitmaps, "the newest one" is the first row of an index rather than the last of all that are sorted.
select set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('enable_sort', 'off', true), set_config('jit', 'off', true)

-- name: exists
-- Reads the catalogue only.
select to_regclass('outbox.logs') is not null

-- name: log
-- One row of logs. On a standby the identity cannot be asked for, so it is a statement of its own.
select current_database() as database, clock_timestamp() as at, pg_is_in_recovery() as standby,
       l.log_id, l.created_at as log_since, to_regclass('outbox.positions') is not null as has_positions
  from outbox.logs l where l.is_current

-- name: lives_here
-- Whether the log belongs to this server, database and timeline: the identity part of the restore guard. One row.
select (l.system_identifier, l.database_oid, l.timeline)
       is not distinct from (i.system_identifier, i.database_oid, i.timeline)
  from outbox.logs l cross join outbox.identity() i where l.is_current

-- name: shards
-- The shards of the current log, each with its newest done window of kind log: where the relay's cursor safely stands.
-- By primary keys; of windows only the newest done one, and release windows done after it, are touched. Rows: shard_count.
select s.shard, s.lease_owner, s.lease_epoch, s.done_through, s.start_snapshot,
       extract(epoch from s.lease_until - clock_timestamp())::float8 as lease_seconds,
       (select coalesce(max(w.window_no), 0) from outbox.windows w where w.shard = s.shard) as windows_logged,
       c.s1, c.s2, c.through_position
  from outbox.logs l
  join outbox.shards s on s.shard < l.shard_count
  left join lateral (select w.s1, w.s2, w.through_position from outbox.windows w
                      where w.shard = s.shard and w.window_no <= s.done_through
                        and w.kind = 'log' and w.log_id = l.log_id
                      order by w.window_no desc limit 1) c on true
 where l.is_current
 order by s.shard

-- name: backlog
-- Visible now and not published: nothing of what the snapshot before ($2 its xmax, $3 its list) saw, and, if that window
-- was one page of a backlog ($4 its s2, $5 its last position), nothing of that page and those before it.
-- Two ranges of idx_events_shard_transaction_id, as the relay reads. Rows touched: the backlog, at most $6 of it.
select count(*) as events, extract(epoch from clock_timestamp() - min(b.created_at))::float8 as seconds
  from (select r.created_at
          from (select e.position, e.transaction_id, e.created_at from outbox.events e
                 where e.shard = $1 and e.transaction_id >= $2
                union all
                select l.position, l.transaction_id, l.created_at from unnest($3::xid8[]) x(id)
                 cross join lateral (select * from outbox.events e
                                      where e.shard = $1 and e.transaction_id = x.id offset 0) l) r
         where $4::pg_snapshot is null or r.position > $5 or not pg_visible_in_snapshot(r.transaction_id, $4)
         limit $6) b

-- name: parked
-- Parked keys and their events by parker, through the primary key and idx_parked_events_parker_topic_key.
-- Rows touched: all parked keys and at most $1 of their events.
select k.parker, k.keys, k.since, coalesce(e.events, 0) as events
  from (select p.parker, count(*) as keys, min(p.parked_at) as since from outbox.parked_keys p group by p.parker) k
  left join (select x.parker, count(*) as events
               from (select p.parker from outbox.parked_keys p join outbox.parked_events v using (parker, topic, key)
                      where v.state = 'parked' limit $1) x
              group by x.parker) e using (parker)
 order by k.parker

-- name: positions
-- Where this database's consumers stand, partitions that stand still first. Reads outbox.positions; rows: at most $1.
select p.consumer, p.topic, p.partition, p.next_offset, p.epoch, p.owner::text as owner, p.state, p.updated_at
  from outbox.positions p order by p.state = 'running', p.consumer, p.topic, p.partition limit $1
