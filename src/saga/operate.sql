-- What persons do to instances. Each locks the instance's row first and counts a wake-up, so a worker that has it learns of
-- it at its next checkpoint, and nothing that was decided before stands against it.

-- name: lock
-- One row by primary key, waiting for whoever has it. Everything that follows in the transaction is decided on it.
select i.id, i.workflow_name, i.workflow_version, i.key, i.state, i.ending, i.pivoted, i.paused_reason, i.pause_asked,
       i.lease_owner is not null as has_worker, i.intents::text as intents,
       i.ending is not null
         or (not i.pivoted and (i.cancel_reason is not null or i.deadline_at <= clock_timestamp())) as goes_back
  from saga.workflow_instances i where i.id = $1 for no key update

-- name: pause
-- The locked row. Only where no worker has it: nothing of it is under way.
update saga.workflow_instances
   set state = 'paused', paused_reason = $2, pause_asked = null, ready_at = null, wake_at = null, wakeups = wakeups + 1
 where id = $1 and lease_owner is null

-- name: ask_to_pause
-- The locked row, where a worker has it: its next checkpoint writes results only, and the one after that pauses it.
update saga.workflow_instances set pause_asked = $2, wakeups = wakeups + 1 where id = $1

-- name: resume
-- The locked row. It wants a worker from now on; one that only was asked to pause is not asked any more.
with u as (
    update saga.workflow_instances
       set state = case when lease_owner is not null then state when ending is null then 'waiting' else 'compensating' end,
           paused_reason = null, pause_asked = null, crash_count = 0, wakeups = wakeups + 1,
           ready_at = case when lease_owner is null then clock_timestamp() end
     where id = $1 returning 1)
select count(saga.call_worker()) from u

-- name: plan
-- Rows of one instance, by primary key, in the order of execution.
select c.path, c.step_id as name, c.round, c.status
  from saga.saga_compensations c where c.instance_id = $1 and c.position > 0 order by c.position, c.round

-- name: calls
-- What a plan of one instance may come to hold: rows of its journal by primary key, and open calls of its row.
select t.path, t.step_id as name, t.step_type as kind, t.seq from saga.tasks t
 where t.instance_id = $1 and t.step_type in ('step', 'transactional', 'remote', 'child') and t.outcome <> 'rejected'
union all
select c ->> 'path', c ->> 'name', c ->> 'kind', null
  from saga.workflow_instances i cross join json_array_elements(i.intents) c where i.id = $1
 order by seq nulls last

-- name: skip
-- One row by primary key. A later late result opens it again, one that is known does not.
update saga.saga_compensations c
   set status = 'completed', resolution = $4, executed_at = clock_timestamp(),
       late_seen = (select count(*) from saga.late_results r where r.instance_id = $1 and r.path = $2)
 where c.instance_id = $1 and c.path = $2 and c.round = $3

-- name: skip_ahead
-- One row, before there is a plan; the instance's row is locked. The plan gives it its place.
insert into saga.saga_compensations as c (id, instance_id, task_id, task_seq, path, step_id, step_type, position,
                                          compensation_action, status, resolution, executed_at, late_seen)
select $2, $1, $3, 0, $4, $5, $6, 0, 'skipped', 'completed', $7, clock_timestamp(), count(*)
  from saga.late_results r where r.instance_id = $1 and r.path = $4
on conflict (instance_id, path, round) do update set resolution = excluded.resolution

-- name: settle
-- One row into the journal, after its last; the instance's row is locked, so nobody else writes it.
insert into saga.tasks (id, instance_id, seq, path, step_id, step_type, outcome, digest, input, output, attempt_count, epoch,
                        started_at)
select $2, i.id, (select max(t.seq) + 1 from saga.tasks t where t.instance_id = i.id), $3, $4, $5, 'completed', $6,
       $7::text::json, $8::text::json, $9, i.lease_epoch, $10
  from saga.workflow_instances i where i.id = $1

-- name: keep_intents
-- The locked row.
update saga.workflow_instances set intents = $2::text::json where id = $1

-- name: record
-- One row: who did what, and why.
insert into saga.interventions (instance_id, action, path, reason) values ($1, $2, $3, $4)
