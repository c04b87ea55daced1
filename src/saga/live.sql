-- What `saga check --live` reads, in read-only transactions. Nothing here locks a row.

-- name: count
-- Instances that have not ended, of one saga or of all. Reads the table once: for persons and deployments, not for loops.
select count(*) from saga.workflow_instances i
 where i.state not in ('completed', 'failed', 'cancelled') and ($1::text is null or i.workflow_name = $1)

-- name: page
-- The next of them in order of their ids. Rows: at most $3; passes by those that have ended. `fresh`: no worker ever had it.
select i.id, i.workflow_id, i.workflow_name as name, i.workflow_version as version, i.key, i.state, i.lease_epoch = 0 as fresh,
       clock_timestamp() as now
  from saga.workflow_instances i
 where i.id > $1 and i.state not in ('completed', 'failed', 'cancelled') and ($2::text is null or i.workflow_name = $2)
 order by i.id limit $3

-- name: journals
-- These instances as a claim would hand them over, by primary key, without claiming them. $2: the fresh ones among them.
select * from saga.read_claimed($1, $2)
