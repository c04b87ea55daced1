-- A worker's own statements; those that the journal's promises rest on stand in journal.sql.

-- name: next_timer
-- Seconds until the next timer goes off, null without any; the first row of idx_workflow_instances_wake_at.
select saga.next_timer()

-- name: forget_workers
-- Rows of workers that have been dead for a day, in no order; index idx_workflow_instances_lease_owner.
select saga.forget_workers()

-- name: leased
-- What is leased to one worker, without a lock; index idx_workflow_instances_lease_owner. Rows: what it may run at a time.
select * from saga.leased($1)
