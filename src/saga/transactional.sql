-- A transactional step's own statement; its checkpoint is that of everybody (journal.sql).

-- name: fate
-- What became of a checkpoint whose COMMIT was not answered. One row by primary key; waits for the lock, which the
-- server process of the lost connection has until it is through.
select lease_epoch, checkpoint_no, news_no, wakeups, cancel_reason
  from saga.workflow_instances where id = $1 for no key update
