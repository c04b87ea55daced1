-- The engine's statements. What takes a lease or wakes somebody is a function of schema saga (migrations).

-- name: checkpoint
-- The checkpoints of many instances, one each. Locks: their rows, by primary key, skipping those that somebody else has
-- locked (answered `locked`, to be sent again alone by `checkpoint_waiting`). Rows: as many as sent. JSON comes as text: the
-- pool may have a codec of its own.
select * from saga.checkpoint($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20,
                              $21, $22, $23, $24, $25, $26, $27, $28, $29::text::json, $30::text::json, $31, $32, $33, $34,
                              $35, $36, $37, $38, $39, false)

-- name: checkpoint_waiting
-- The same, after it has waited for the rows: for a single instance, and for a transactional step.
select * from saga.checkpoint($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20,
                              $21, $22, $23, $24, $25, $26, $27, $28, $29::text::json, $30::text::json, $31, $32, $33, $34,
                              $35, $36, $37, $38, $39, true)

-- name: start
-- Instances with what their bodies ask for first. Locks: the unique keys inserted, in order; waits for a concurrent start
-- of the same key. Rows: one each. Messages go out for those that are new.
with s as materialized (
    select * from saga.start($1::uuid[], $2::uuid[], $3::text[], $4::int[], $5::text[], $6::bytea[], $7::text[], $8::text[],
                             $9::timestamptz[], $10::timestamptz[], $11::uuid)
), messages as (
    insert into outbox.events (shard, topic, key, event_id, event_type, schema_version, headers, payload)
    select outbox.shard_of(b.key, (select l.shard_count from outbox.logs l where l.is_current)),
           b.topic, b.key, b.event_id, b.event_type, b.schema_version, b.headers::jsonb,
           outbox.fits(b.payload, b.key, b.headers::jsonb, b.topic, t.max_message_bytes)
      from unnest($12::uuid[], $13::text[], $14::text[], $15::uuid[], $16::text[], $17::smallint[], $18::text[], $19::bytea[])
           with ordinality as b(instance_id, topic, key, event_id, event_type, schema_version, headers, payload, nth)
      join s on s.id = b.instance_id and s.answer = 'started'
      left join outbox.topics t on t.topic = b.topic
     order by b.nth
    returning shard
), woken as (
    select count(outbox.wake(m.shard)) as shards from (select distinct m.shard from messages m) m
)
select s.nth, s.id, s.answer from s cross join woken order by s.nth

-- name: claim
-- Locks: the rows it takes, skipping locked ones; index idx_workflow_instances_workflow_id_ready_at. Rows: at most $2.
select * from saga.claim($1, $2, $3)

-- name: look
-- One row by primary key, without a lock, and its mail: what a worker reads after news.
select * from saga.look($1)

-- name: take_over
-- Locks: instances of dead owners, skipping locked ones; index idx_workflow_instances_lease_owner. Rows: at most $1.
select * from saga.take_over($1)

-- name: hand_over
-- Locks: all rows of one owner, waiting; index idx_workflow_instances_lease_owner.
select saga.hand_over($1)

-- name: let_timers_go_off
-- Locks: due rows, skipping locked ones; index idx_workflow_instances_wake_at. Rows: at most $1.
select saga.let_timers_go_off($1)

-- name: sweep
-- Locks: what it repeats, one instance after the other; partial indexes. Rows: at most 2 * $1.
select saga.sweep($1)

-- name: record_late
-- Locks: one instance. One row.
select saga.record_late($1, $2, $3, $4::text::json)

-- name: acquire
-- Locks: the key's advisory lock, then the instance. One row.
select saga.acquire($1, $2, $3, $4)

-- name: release_locks
-- Locks: key after key, and who is next for it. As many rows as the instance has locks.
select saga.release_locks($1)

-- name: tell_parent
-- Locks: the child, then the parent. One row.
select saga.tell_parent($1)

-- name: undo_child
-- Locks: the child. One row.
select saga.undo_child($1)

-- name: tell
-- Locks: one instance. One row.
select saga.tell($1, $2, $3, $4, $5::text::json)

-- name: signal
-- Locks: one instance, found by its unique key. One row.
select saga.signal($1, $2, $3, $4, $5::text::json)

-- name: cancel
-- Locks: one instance, found by its unique key. One row.
select saga.cancel($1, $2, $3)

-- name: result
-- One row by the unique key, without a lock.
select * from saga.result($1, $2)

-- name: register
-- One row.
insert into saga.workers (id, name, alive_until, serves)
values ($1, $2, clock_timestamp() + make_interval(secs => $3), $4::text::jsonb)

-- name: beat
-- One row by primary key; false where it is past.
select saga.beat($1, $2)

-- name: deregister
-- One row by primary key.
delete from saga.workers where id = $1
