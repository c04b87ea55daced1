-- What one instance needs besides its journal (journal.sql).

-- name: give_back
-- One instance that a living worker cannot go on with: as if the worker had been lost. One that is let go already, and
-- whose end could not be told, stays as it is. By primary key.
update saga.workflow_instances i
   set lease_owner = null, lease_epoch = i.lease_epoch + 1,
       crash_count = case when i.checkpoint_no > i.claimed_no then 0 else i.crash_count + 1 end,
       state = case when i.checkpoint_no <= i.claimed_no and i.crash_count >= 5 then 'paused' else i.state end,
       paused_reason = case when i.checkpoint_no <= i.claimed_no and i.crash_count >= 5 then $3 end,
       ready_at = case when i.checkpoint_no <= i.claimed_no and i.crash_count >= 5 then null else clock_timestamp() end
 where i.id = $1 and i.lease_epoch = $2 and i.lease_owner is not null
