-- What the writer needs besides the checkpoint itself (journal.sql).

-- name: limit_lock_waits
-- For the open transaction only.
select set_config('lock_timeout', $1, true)

-- name: pause
-- One row by primary key, waiting for it; nothing where another epoch or checkpoint has come. The result that could not
-- be written is lost, and its intent stays open: the step counts as one that may have happened.
update saga.workflow_instances
   set state = 'paused', paused_reason = $4, lease_owner = null, ready_at = null, wake_at = null,
       checkpoint_no = checkpoint_no + 1
 where id = $1 and lease_epoch = $2 and checkpoint_no = $3
