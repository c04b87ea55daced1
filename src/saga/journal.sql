-- The engine's statements. What takes a lease or wakes somebody is a function of schema saga (migrations).

-- name: checkpoint
-- The checkpoints of many instances, one each. Locks: their rows, by primary key, skipping those that somebody else has
-- locked (answered `locked`, and sent again alone, without `skip locked`: see journal.py). Rows: as many as sent.
-- The lateral join is deliberate: a plain join that was planned on an empty table keeps its sequential scan. Everything
-- is compared on the locked rows, and each answer is read from them.
-- flags: 1 strict, 2 held, 4 passes the pivot. rest: ending, error, paused_reason, waits_for; null on the happy path.
with x as (
    select * from unnest($1::uuid[], $2::bigint[], $3::int[], $4::int[], $5::int[], $6::text[], $7::timestamptz[],
                         $8::text[], $9::text[], $10::text[], $11::text[], $12::timestamptz[])
        as x(id, epoch, no, seen, flags, state, wake_at, intents, open, output, rest, at)
), own as materialized (
    select x.*, i.lease_epoch as e, i.checkpoint_no as n, i.wakeups as w, i.news_no as news_no, i.cancel_reason as cancel
      from x cross join lateral (select * from saga.workflow_instances i where i.id = x.id for no key update skip locked) i
), ok as (
    select own.*, w <> seen as news from own where e = epoch and n = no and (w = seen or flags & 1 = 0)
), tasks as (
    insert into saga.tasks (id, instance_id, seq, path, step_id, step_type, status, outcome, digest, input, output,
                            error_message, attempt_count, max_attempts, started_at, completed_at, epoch)
    select t.id, t.instance_id, t.seq, t.path, t.name, t.kind, case t.outcome when 'completed' then 'completed' else 'failed' end,
           t.outcome, t.digest, t.input::json, t.output::json, t.error, t.attempts, t.max_attempts, t.started_at, t.completed_at,
           ok.epoch
      from unnest($13::uuid[], $14::uuid[], $15::int[], $16::text[], $17::text[], $18::text[], $19::text[], $20::bytea[],
                  $21::text[], $22::text[], $23::text[], $24::int[], $25::int[], $26::timestamptz[], $27::timestamptz[],
                  $28::bool[])
           as t(id, instance_id, seq, path, name, kind, outcome, digest, input, output, error, attempts, max_attempts,
                started_at, completed_at, is_next)
      join ok on ok.id = t.instance_id
     where not (t.is_next and ok.news)
), plan as (
    insert into saga.saga_compensations as c (id, instance_id, task_id, task_seq, path, step_id, step_type, round, position,
                                              compensation_action, compensation_data, required, status, attempts, not_before,
                                              late_seen, executed_at, error_message)
    -- A row may change and begin at once: what comes next counts then, unless there is news.
    select distinct on (p.instance_id, p.path, p.round)
           p.id, p.instance_id, p.task_id, p.task_seq, p.path, p.name, p.kind, p.round, p.position, p.action, p.data, p.required,
           p.status, p.attempts, p.not_before, p.late_seen, p.executed_at, p.error
      from json_to_recordset($29::json)
           as p(id uuid, instance_id uuid, task_id uuid, task_seq int, path text, name text, kind text, round int, position int,
                action text, data json, required bool, status text, attempts int, not_before timestamptz, late_seen int,
                executed_at timestamptz, error text, is_next bool)
      join ok on ok.id = p.instance_id
     where not (p.is_next and ok.news)
     order by p.instance_id, p.path, p.round, p.is_next desc
    on conflict (instance_id, path, round) do update
       set status = excluded.status, attempts = excluded.attempts, not_before = excluded.not_before,
           late_seen = excluded.late_seen, executed_at = excluded.executed_at, error_message = excluded.error_message
), children as (
    -- Their keys derive from parent and path, so nobody else can be inserting the same one.
    insert into saga.workflow_instances (id, workflow_id, workflow_name, workflow_version, key, input_digest, created_at,
                                         deadline_at, ready_at, parent_id, parent_path)
    select k.id, k.workflow_id, k.name, k.version, k.key, decode(k.digest, 'hex'), k.started_at, k.deadline_at, k.started_at,
           ok.id, k.parent_path
      from json_to_recordset($30::json)
           as k(id uuid, workflow_id uuid, name text, version int, key text, digest text, request json, started_at timestamptz,
                deadline_at timestamptz, parent_id uuid, parent_path text)
      join ok on ok.id = k.parent_id
     where not ok.news
    on conflict (workflow_name, key) do nothing
    returning id
), called as (
    select count(saga.call_worker()) from (select from children limit 1) c
), requests as (
    insert into saga.tasks (id, instance_id, seq, path, step_id, step_type, output, completed_at)
    select k.id, k.id, 0, '', 'request', 'request', k.request, k.started_at
      from json_to_recordset($30::json) as k(id uuid, request json, started_at timestamptz)
      join children on children.id = k.id
), messages as (
    insert into outbox.events (shard, topic, key, event_id, event_type, schema_version, headers, payload)
    select outbox.shard_of(b.key, (select l.shard_count from outbox.logs l where l.is_current)),
           b.topic, b.key, b.event_id, b.event_type, b.schema_version, b.headers::jsonb,
           outbox.fits(b.payload, b.key, b.headers::jsonb, b.topic, t.max_message_bytes)
      from unnest($31::uuid[], $32::text[], $33::text[], $34::uuid[], $35::text[], $36::smallint[], $37::text[], $38::bytea[],
                  $39::bool[])
           with ordinality as b(instance_id, topic, key, event_id, event_type, schema_version, headers, payload, is_next, nth)
      join ok on ok.id = b.instance_id
      left join outbox.topics t on t.topic = b.topic
     where not (b.is_next and ok.news)
     order by b.nth
    returning shard
), woken as (
    select count(outbox.wake(s.shard)) as shards from (select distinct m.shard from messages m) s
), changed as (
    update saga.workflow_instances i
       set checkpoint_no = i.checkpoint_no + 1,
           intents = (case when ok.news then ok.open else ok.intents end)::json,
           news_no = case when ok.news then i.checkpoint_no + 1 else i.news_no end,
           state = case when ok.news then i.state else ok.state end,
           lease_owner = case when ok.news or ok.flags & 2 = 2 then i.lease_owner end,
           wake_at = case when ok.news then i.wake_at else ok.wake_at end,
           pivoted = i.pivoted or (not ok.news and ok.flags & 4 = 4),
           output = case when ok.news then i.output else ok.output::json end,
           ending = case when ok.news then i.ending else coalesce(ok.rest::json ->> 'ending', i.ending) end,
           error_message = case when ok.news then i.error_message else coalesce(ok.rest::json ->> 'error', i.error_message) end,
           paused_reason = case when ok.news then i.paused_reason else ok.rest::json ->> 'paused_reason' end,
           pause_asked = case when ok.news or ok.flags & 2 = 2 then i.pause_asked end,
           waits_for = case when ok.news then i.waits_for else ok.rest::json ->> 'waits_for' end,
           completed_at = case when not ok.news and ok.state in ('completed', 'failed', 'cancelled') then ok.at end
      from ok where i.id = ok.id
)
select x.id, case when own.id is null then 'locked'
                  when own.e <> x.epoch then 'fenced'
                  when own.n = x.no + 1 then case when own.news_no = own.n then 'news' else 'applied' end
                  when own.n <> x.no then 'broken'
                  when ok.id is null then 'changed'
                  when ok.news then 'news' else 'applied' end as answer,
       own.w as wakeups, own.cancel, own.n = x.no + 1 as again
  from x left join own using (id) left join ok using (id) cross join woken cross join called

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
-- Locks: the rows it takes, skipping locked ones; index idx_workflow_instances_ready_at. Rows: at most $2.
select * from saga.claim($1, $2, $3)

-- name: look
-- One row by primary key, without a lock, and its mail: what a worker reads after news.
select i.wakeups, i.cancel_reason, i.pause_asked, m.*, l.*
  from saga.workflow_instances i
 cross join lateral (
       select array_agg(s.no order by s.no) as mail_nos, array_agg(s.kind order by s.no) as mail_kinds,
              array_agg(s.name order by s.no) as mail_names, array_agg(s.payload::text order by s.no) as mail_payloads,
              array_agg(s.created_at order by s.no) as mail_times
         from saga.signals s where s.instance_id = i.id) m
 cross join lateral (
       select array_agg(r.path order by r.id) as late_paths, array_agg(r.output::text order by r.id) as late_outputs
         from saga.late_results r where r.instance_id = i.id) l
 where i.id = $1

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
select i.id, i.state, i.output::text as output, i.error_message, i.paused_reason
  from saga.workflow_instances i where i.workflow_name = $1 and i.key = $2

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
