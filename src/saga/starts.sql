-- Grouped starts; the start itself is in journal.sql.

-- name: limit_lock_waits
-- For the session, until its pool takes the connection back.
select set_config('lock_timeout', $1, false)
