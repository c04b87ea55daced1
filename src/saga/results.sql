-- Waiting for ends.

-- name: standing
-- Many rows by their unique key, without a lock, in the order asked for; nulls where there is none.
select * from saga.standings($1, $2)
