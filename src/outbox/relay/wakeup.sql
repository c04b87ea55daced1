-- The relay's half of the wake-up; the writers' half is outbox.wake, which uses the same advisory lock (1868724273, shard).

-- name: go_idle
-- Session lock, free only while no writer of this shard has a transaction open that has emitted. Never waits.
select pg_try_advisory_lock(1868724273, $1)

-- name: stop_idling
select pg_advisory_unlock(1868724273, $1)
