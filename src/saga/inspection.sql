-- What persons look at. Nothing here locks anything.

-- name: find
-- One row by its unique key.
select i.id from saga.workflow_instances i where i.workflow_name = $1 and i.key = $2

-- name: list
-- Newest first. Rows: at most $4. Paused, compensating, failed and cancelled ones by idx_workflow_instances_state; those of
-- other states, and of no particular one, by reading the table: for persons, not for loops.
select i.id, i.workflow_name as name, i.workflow_version as version, i.key, i.state, i.checkpoint_no as checkpoints,
       i.created_at, i.completed_at, i.paused_reason, i.error_message as error, i.cancel_reason, i.parent_id, clock_timestamp() as now
  from saga.workflow_instances i
 where ($1::text[] is null or i.state = any ($1)) and ($2::text is null or i.workflow_name = $2)
   and ($3::double precision is null or i.created_at <= clock_timestamp() - make_interval(secs => $3))
 order by i.created_at desc, i.id limit $4

-- name: instance
-- One row by primary key, with its worker and how many others serve its definition.
select i.id, i.workflow_name as name, i.workflow_version as version, i.key, i.state, i.ready_at, i.wake_at, i.deadline_at,
       i.lease_owner, i.lease_epoch as epoch, i.checkpoint_no as checkpoints, i.wakeups, i.crash_count, i.pivoted, i.ending,
       i.cancel_reason, i.pause_asked, i.paused_reason, i.waits_for, i.error_message as error, i.intents::text as intents,
       i.output::text as output, i.parent_id, i.parent_path, i.created_at, i.started_at, i.completed_at,
       w.name as worker, w.alive_until as worker_alive_until, clock_timestamp() as now,
       (select count(*) from saga.workers o
         where o.alive_until > clock_timestamp()
           and o.serves ? (i.workflow_name || '/' || i.workflow_version)) as servers
  from saga.workflow_instances i left join saga.workers w on w.id = i.lease_owner
 where i.id = $1

-- name: tasks
-- The journal of one instance, by primary key; 0 is the request.
select t.seq, t.path, t.step_id as name, t.step_type as kind, t.outcome, t.input::text as input, t.output::text as output,
       t.error_message as error, t.attempt_count as attempts, t.max_attempts, t.started_at, t.completed_at, t.duration_ms
  from saga.tasks t where t.instance_id = $1 order by t.seq

-- name: plan
-- The compensations of one instance, by primary key.
select c.position, c.path, c.step_id as name, c.step_type as kind, c.round, c.compensation_action as action, c.required,
       c.status, c.attempts, c.not_before, c.executed_at, c.error_message as error, c.resolution
  from saga.saga_compensations c where c.instance_id = $1 order by c.position, c.round

-- name: mail
-- The mailbox of one instance, by primary key.
select s.no, s.kind, s.name, s.payload::text as payload, s.created_at
  from saga.signals s where s.instance_id = $1 order by s.no

-- name: late
-- Late results of one instance; idx_late_results_instance_id.
select r.path, r.epoch, r.output::text as output, r.created_at
  from saga.late_results r where r.instance_id = $1 order by r.id

-- name: locks
-- Locks and places in queues of one instance (idx_locks_instance_id), and who has each (idx_locks_key).
select l.key, l.path, l.granted_at, h.instance_id as holder_id, i.workflow_name as holder_name, i.key as holder_key
  from saga.locks l
  left join saga.locks h on h.key = l.key and h.granted_at is not null
  left join saga.workflow_instances i on i.id = h.instance_id
 where l.instance_id = $1 order by l.queued_no

-- name: interventions
-- What persons did to one instance; idx_interventions_instance_id.
select v.action, v.path, v.reason, v.database_user, v.created_at
  from saga.interventions v where v.instance_id = $1 order by v.id

-- name: children
-- Sagas that are steps of this one, by primary key: their ids follow from its own.
select i.id, i.workflow_name as name, i.key, i.state, i.paused_reason
  from saga.workflow_instances i where i.id = any ($1)
