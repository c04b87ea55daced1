-- One row a shard, primary key look-ups. The database's clock decides who may hold a lease.

-- name: shards
-- The shards of the current log. Rows: shard_count.
select s.shard from outbox.shards s, outbox.logs l where l.is_current and s.shard < l.shard_count order by s.shard

-- name: take
-- Locks the row; nothing comes back while somebody else's lease runs. One's own, left by a tenure that broke off, does
-- not count. Granted implies durable: an epoch that a crash of the server took back would be granted twice. Rows: 1.
with durable as materialized (select set_config('synchronous_commit', 'on', true))
update outbox.shards
   set lease_owner = $2, lease_epoch = lease_epoch + 1, lease_until = clock_timestamp() + make_interval(secs => $3)
  from durable
 where shard = $1 and (lease_until is null or lease_until < clock_timestamp() or lease_owner = $2)
returning lease_epoch

-- name: renew
-- Nothing comes back when a successor has raised the epoch. Durable, as the grant is. Rows: 1.
with durable as materialized (select set_config('synchronous_commit', 'on', true))
update outbox.shards set lease_until = clock_timestamp() + make_interval(secs => $3)
  from durable
 where shard = $1 and lease_epoch = $2
returning lease_epoch

-- name: release
-- Hands the shard over at once. Rows: 1.
update outbox.shards set lease_owner = null, lease_until = null where shard = $1 and lease_epoch = $2
