-- The relay's reading and logging. The hot reads touch idx_events_shard_transaction_id only: two index ranges instead of an
-- OR, so that rows touched are the rows returned, however old the statistics and whatever is still in progress elsewhere.
-- The list is walked (`offset 0` keeps it so) because PostgreSQL before 17 may filter a whole shard by `= any` instead.
-- JSON travels as text: a service may have taught its connections another way. read, read_backlog and replay return the same first ten columns, in the order in which publishing unpacks them.

-- name: prepare_session
-- Plans must not depend on statistics: a table that was empty at the last ANALYZE may hold millions of relayed rows.
select set_config('enable_seqscan', 'off', false), set_config('plan_cache_mode', 'force_generic_plan', false),
       set_config('synchronous_commit', 'on', false), set_config('jit', 'off', false)

-- name: load
-- Where to go on: one row of shards, one of logs, the newest windows by primary key.
select s.done_through, s.start_snapshot, s.next_offsets::text, l.log_id, l.ordinal as log_ordinal, current_database() as source,
       (select coalesce(max(w.window_no), 0) from outbox.windows w where w.shard = s.shard) as last_window_no,
       c.s1, c.s2, c.through_position
  from outbox.shards s
  cross join outbox.logs l
  left join lateral (select w.s1, w.s2, w.through_position from outbox.windows w
                      where w.shard = s.shard and w.kind = 'log' and w.log_id = l.log_id
                      order by w.window_no desc limit 1) c on true
 where s.shard = $1 and l.is_current

-- name: unfinished
-- Windows to publish again. Rows: windows in flight at the crash, by primary key.
select window_no, kind, log_id, s1, s2, after_position, through_position
  from outbox.windows where shard = $1 and window_no > $2 order by window_no

-- name: read
-- What has become visible since s1 ($2 its xmax, $3 its list); the snapshot, s2, comes with the first row. Where that is
-- $4 events or more, or more than $5 bytes, one row comes back, without s2. Rows touched: $4.
with found as materialized (
    select * from outbox.events e where e.shard = $1 and e.transaction_id >= $2
    union all
    select l.* from unnest($3::xid8[]) x(id)
     cross join lateral (select * from outbox.events e where e.shard = $1 and e.transaction_id = x.id offset 0) l
    limit $4
), size as (
    select count(*) < $4 and sum(octet_length(f.payload)) <= $5 as fits, min(f.position) as first from found f
)
select r.position, r.transaction_id, r.topic, r.key, r.event_id::text, r.event_type, r.schema_version, r.headers::text, r.payload,
       (date_part('epoch', r.created_at) * 1000)::bigint as created_at,
       case when size.fits and r.position = size.first then pg_current_snapshot() end as s2
  from found r cross join size
 where size.fits or r.position = size.first
 order by r.position

-- name: begin_backlog
-- The snapshot of the whole backlog, and memory to sort it in: the first statement of its transaction.
select pg_current_snapshot() as s2, set_config('work_mem', '64MB', true)

-- name: read_backlog
-- All of (s1, s2] after a position, for a cursor: $2 xmax(s1), $3 its list, $4 s2, $5 after. Rows: the backlog, sorted once.
select r.position, r.transaction_id, r.topic, r.key, r.event_id::text, r.event_type, r.schema_version, r.headers::text, r.payload,
       (date_part('epoch', r.created_at) * 1000)::bigint as created_at, null::pg_snapshot as s2
  from (select * from outbox.events e where e.shard = $1 and e.transaction_id >= $2
        union all
        select l.* from unnest($3::xid8[]) x(id)
         cross join lateral (select * from outbox.events e where e.shard = $1 and e.transaction_id = x.id offset 0) l) r
 where r.position > $5 and pg_visible_in_snapshot(r.transaction_id, $4)
 order by r.position

-- name: replay
-- A logged window's rows but those that parking took over; ordinals count all. Rows: window_max_events.
select r.position, r.transaction_id, r.topic, r.key, r.event_id::text, r.event_type, r.schema_version, r.headers::text,
       r.payload, (date_part('epoch', r.created_at) * 1000)::bigint as created_at, r.ordinal
  from outbox.window_rows($1, $3, $4, $5, $6) r
 where not exists (select from outbox.parked_events p
                    where p.parker = 'relay' and p.shard = $1 and p.window_no = $2 and p.ordinal = r.ordinal)
 order by r.ordinal

-- name: released
-- The rows of a logged window of kind release but those that parking took back. Rows: window_max_events, by
-- idx_parked_events_release and idx_parked_events_origin.
select r.position, r.transaction_id, r.topic, r.key, r.event_id::text, r.event_type, r.schema_version, r.headers::text,
       r.payload, (date_part('epoch', r.created_at) * 1000)::bigint as created_at, r.ordinal
  from outbox.release_rows($1, $2) r
 where not exists (select from outbox.parked_events p
                    where p.parker = 'relay' and p.shard = $1 and p.window_no = $2 and p.ordinal = r.ordinal)
 order by r.ordinal

-- name: log
-- Locks the shard row; see outbox.log_window. Rows: 1.
select outbox.log_window($1, $2, $3, $4::text::jsonb, $5, $6, $7, $8, $9, $10)

-- name: done
-- Locks the shard row; see outbox.log_done. Rows: 1.
select outbox.log_done($1, $2, $3, $4::text::jsonb)

-- name: forget
-- Done windows more than $2 behind; the newest complete one stays, because retention decides by it. By primary key.
delete from outbox.windows w using outbox.shards s
 where w.shard = $1 and s.shard = w.shard and w.window_no <= s.done_through - $2
   and w.window_no < (select c.window_no from outbox.windows c
                       where c.shard = $1 and c.kind = 'log' and c.through_position is null and c.window_no <= s.done_through
                       order by c.window_no desc limit 1)

-- name: park
-- Locks the shard row; see outbox.park. Rows: one key's rows of the windows in flight.
select outbox.park($1, $2, $3, $4, $5, $6, $7, $8, $9)
