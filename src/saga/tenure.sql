-- A worker's own statements; those that the journal's promises rest on stand in journal.sql.

-- name: next_timer
-- Seconds until the next timer goes off, null without any; the first row of idx_workflow_instances_wake_at.
select extract(epoch from min(wake_at) - clock_timestamp())::float8 from saga.workflow_instances where wake_at is not null

-- name: forget_workers
-- Rows of workers that have been dead for a day, in no order; none of their instances is theirs any more.
delete from saga.workers w
 where w.alive_until < clock_timestamp() - interval '1 day'
   and not exists (select from saga.workflow_instances i where i.lease_owner = w.id)
