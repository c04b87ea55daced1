-- name: standby
select pg_is_in_recovery()

-- name: identity
-- The log as it was opened, and where this database lives now. Rows: 1.
select l.log_id, l.system_identifier = i.system_identifier as same_system, l.database_oid = i.database_oid as same_database,
       l.timeline = i.timeline as same_timeline
  from outbox.logs l cross join outbox.identity() i where l.is_current

-- name: last_windows
-- The newest window of each shard and log; Kafka must not be ahead of it. Rows: shards x logs.
select w.log_id, w.shard, max(w.window_no) as window_no from outbox.windows w group by 1, 2

-- name: next_offsets
select shard, next_offsets::text from outbox.shards order by shard

-- name: block_emits
-- Waits for writers that have emitted and not committed; later ones wait for the adoption.
lock table outbox.events, outbox.windows, outbox.shards in share row exclusive mode

-- name: leave_out
-- Events that Kafka has although no logged window names them: 3 is the oldest transaction, visible to every snapshot.
-- Rows: $1.
update outbox.events e set transaction_id = '3'
 where e.event_id = any ($1::uuid[])
returning e.event_id

-- name: leave_out_parked
-- Parked events that Kafka has: this copy of the database does not know that they were released. A key that nothing else
-- waits for is free. Rows: $1. Reads the relay's parked events and keys once.
with left_out as (
    update outbox.parked_events e set state = 'discarded'
     where e.parker = 'relay' and e.state = 'parked' and e.event_id = any ($1::uuid[])
    returning e.shard, e.topic, e.key
), counted as (
    update outbox.shards s set parked_events = greatest(s.parked_events - l.events, 0)
      from (select shard, count(*) as events from left_out group by shard) l where s.shard = l.shard
)
delete from outbox.parked_keys k using (select distinct topic, key from left_out) l
 where k.parker = 'relay' and k.topic = l.topic and k.key = l.key
   and not exists (select from outbox.parked_events e
                    where e.parker = 'relay' and e.topic = k.topic and e.key = k.key and e.state = 'parked'
                      and e.event_id <> all ($1::uuid[]))

-- name: restamp
-- Rows not yet logged get this transaction's id: after dump and restore their own may lie below s1. Not logged is what the
-- last window of the current log (or its start) does not show, and, whatever its id, what got its position later: the
-- services may have written to a restored database before it was adopted. Reads every retained row once.
with cursors as (
    select s.shard, coalesce(c.s1, s.start_snapshot) as s1, coalesce(c.s2, s.start_snapshot) as s2, c.through_position,
           coalesce(c.horizon, s.start_position) as horizon
      from outbox.shards s
      cross join outbox.logs l
      left join lateral (select w.s1, w.s2, w.through_position, w.horizon from outbox.windows w
                          where w.shard = s.shard and w.kind = 'log' and w.log_id = l.log_id
                          order by w.window_no desc limit 1) c on true
     where l.is_current
)
update outbox.events e set transaction_id = pg_current_xact_id()
  from cursors c
 where e.shard = c.shard and e.transaction_id <> '3'
   and (not pg_visible_in_snapshot(e.transaction_id, c.s2)
        or e.position > c.horizon
        or (c.through_position is not null and e.position > c.through_position
            and not pg_visible_in_snapshot(e.transaction_id, c.s1)))

-- name: settle_unfinished
-- Windows that are still to be replayed, where this cluster has not reached their transaction ids: the n-th gets the id
-- 3 + n, which no transaction of a user can have, for its rows and between its snapshots. Else what is written later
-- would fall into them. Rows: windows in flight.
with unfinished as (
    select w.shard, w.window_no, w.s1, w.s2, w.after_position, w.through_position,
           3 + row_number() over (partition by w.shard order by w.window_no) as id
      from outbox.windows w join outbox.shards s on s.shard = w.shard
     where w.window_no > s.done_through and pg_snapshot_xmax(w.s2) > pg_snapshot_xmax(pg_current_snapshot())
), rewritten as (
    update outbox.windows w
       set s1 = format('%s:%s:', u.id, u.id)::pg_snapshot, s2 = format('%s:%s:', u.id + 1, u.id + 1)::pg_snapshot
      from unfinished u where w.shard = u.shard and w.window_no = u.window_no
)
update outbox.events e set transaction_id = r.id::text::xid8
  from (select u.shard, u.id, x.position
          from unfinished u
         cross join lateral outbox.window_rows(u.shard, u.s1, u.s2, u.after_position, u.through_position) x
         where x.transaction_id <> pg_current_xact_id()) r
 where e.shard = r.shard and e.position = r.position

-- name: settle_finished
-- Rows that are published, with transaction ids that this cluster has not reached: the next windows would read them again.
update outbox.events e set transaction_id = '3'
 where e.transaction_id >= pg_snapshot_xmax(pg_current_snapshot()) and e.transaction_id <> pg_current_xact_id()

-- name: open_log
-- The new log, and s1 = this transaction's snapshot with itself counted as in progress. Rows: 1.
with retired as (
    update outbox.logs set is_current = false where is_current returning shard_count, ordinal
), moved as (
    select setval('outbox.events_position_seq', greatest((select last_value from outbox.events_position_seq), $1::bigint)) as at
)
select outbox.open_log(r.shard_count, greatest(r.ordinal + 1, (extract(epoch from clock_timestamp()) * 1000)::bigint)) as log_id,
       m.at
  from retired r cross join moved m

-- name: restart_shards
-- Rows: shards. Leases end, because whoever holds one works for the retired log. xmax stays as it is, though it may be below
-- this transaction's id: ids between the two belong to writers that are still open, and may emit once they are let in.
update outbox.shards s
   set lease_owner = null, lease_until = null, lease_epoch = s.lease_epoch + 1,
       next_offsets = s.next_offsets || $1::text::jsonb,
       start_position = (select q.last_value from outbox.events_position_seq q),
       start_snapshot = (
           select format('%s:%s:%s', least(pg_snapshot_xmin(n.snapshot), pg_current_xact_id()),
                         pg_snapshot_xmax(n.snapshot),
                         (select string_agg(x::text, ',' order by x)
                            from (select pg_snapshot_xip(n.snapshot) as x
                                  union select pg_current_xact_id() where pg_current_xact_id() < pg_snapshot_xmax(n.snapshot)) p)
                        )::pg_snapshot
             from (select pg_current_snapshot() as snapshot) n)
