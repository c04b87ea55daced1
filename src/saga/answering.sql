-- A participant's commands. A do and its undo share a row, which whoever comes first inserts before anything else: so they
-- take turns, also where a topic got more partitions in between and two processes have them.

-- name: take
-- The rows of a batch's commands ($2 distinct keys), inserted where they are new, and locked. Locks: the rows, in the order
-- of their keys; index: the primary key; waits for whoever has one. Rows: at most a batch. How long a row stays is said
-- here already, so that the answer touches no index.
insert into saga.commands as c (participant, key, instance_id, path, contract, forget_at)
select $1, x.key, x.instance_id, x.path, x.contract,
       greatest(clock_timestamp() + make_interval(days => $7), x.undoable_until + make_interval(days => $8))
  from unnest($2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::timestamptz[])
       as x(key, instance_id, path, contract, undoable_until) order by x.key
on conflict (participant, key) do update set contract = c.contract
returning c.key, c.outcome, c.output::text as output, c.error, c.is_undone, c.attempts, clock_timestamp() as now

-- name: answer
-- What became of commands, and the replies. Locks: rows held since `take`, and the rows inserted. Index: the primary key.
-- Rows: at most a batch, and a reply each.
with x as (
    select * from unnest($2::uuid[], $3::text[], $4::text[], $5::text[], $6::bool[], $7::smallint[])
        as x(key, outcome, output, error, is_undone, attempts)
), changed as (
    update saga.commands c
       set outcome = x.outcome, output = x.output::json, error = x.error, is_undone = x.is_undone, attempts = x.attempts
      from x where c.participant = $1 and c.key = x.key
), messages as (
    insert into outbox.events (shard, topic, key, event_id, event_type, schema_version, headers, payload)
    select outbox.shard_of(b.key, (select l.shard_count from outbox.logs l where l.is_current)),
           b.topic, b.key, b.event_id, b.event_type, 1, b.headers::jsonb,
           outbox.fits(b.payload, b.key, b.headers::jsonb, b.topic, t.max_message_bytes)
      from unnest($8::text[], $9::text[], $10::uuid[], $11::text[], $12::text[], $13::bytea[])
           with ordinality as b(topic, key, event_id, event_type, headers, payload, nth)
      left join outbox.topics t on t.topic = b.topic
     order by b.nth
    returning shard
)
select count(outbox.wake(s.shard)) from (select distinct m.shard from messages m) s

-- name: forget
-- Rows whose time has come, oldest first, skipping locked ones; index idx_commands_forget_at. Rows: at most $1.
with old as (
    select c.participant, c.key from saga.commands c
     where c.forget_at <= clock_timestamp() order by c.forget_at limit $1 for update skip locked
), gone as (
    delete from saga.commands c using old where c.participant = old.participant and c.key = old.key returning 1
)
select count(*)::integer from gone
