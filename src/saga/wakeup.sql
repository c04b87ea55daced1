-- The worker's half of the wake-up; the other half is saga.call_worker, with the same advisory lock.

-- name: go_idle
-- Session lock, free only while no transaction is open that has made an instance ready, and no other worker is idle.
-- Never waits.
select pg_try_advisory_lock(1936287842, 0)

-- name: stop_idling
select pg_advisory_unlock(1936287842, 0)
