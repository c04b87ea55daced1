-- The relay's watermarks: a moment before a read, and what was parked when that read was published.

-- name: moment
-- A moment, and the transactions that are over by then, taken before the read that it speaks for: whatever had committed
-- by as_of is in the snapshot of a *later* statement, and clock_timestamp() of the same one would be too late. Nothing
-- comes back once a successor has raised the epoch, or the log is another one. No lock; by primary key; rows: 1.
select transaction_timestamp() as as_of, pg_snapshot_xmin(pg_current_snapshot())::text::bigint as oldest_xid, l.shard_count
  from outbox.shards s cross join outbox.logs l
 where s.shard = $1 and s.lease_epoch = $2 and l.is_current and l.log_id = $3

-- name: parked
-- The keys that wait, as hashes, and the newest window that released some since window $2: both of one snapshot, because a
-- key that is not parked any more waits for that window. No lock; by the primary keys of parked_keys and windows; rows: 1,
-- with at most $3 + 1 hashes.
select array(select outbox.key_hash(k.topic, k.key) from outbox.parked_keys k
              where k.parker = 'relay' and k.shard = $1 limit $3 + 1) as hashes,
       (select max(w.window_no) from outbox.windows w
         where w.shard = $1 and w.window_no > $2 and w.kind = 'release') as released
