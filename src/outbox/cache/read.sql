-- Reading a cache. Templates, like the merge.

-- name: one
-- The row of a key. No lock; by the key's index; at most one row.
select {read_c} from {table} c where c.{key} = $1

-- name: many
-- The rows of some keys. No lock; by the key's index; at most one row a key.
select {read_c} from {table} c where c.{key} = any ($1)

-- name: seen
-- The row of a key ($1, as text $2), and whether row or tombstone shows the event at position $5 of log $4 or a later one.
-- $3 cache. No lock; by the key's index and the primary key of tombstones; one row.
select {read_c}, c.{key} is not null as outbox_found,
       coalesce(c.outbox_log = $4 and c.outbox_position >= $5
                or c.outbox_log <> $4 and outbox.log_ordinal(c.outbox_log) > outbox.log_ordinal($4), false)
    or coalesce(t.log_id = $4 and t.position >= $5
                or t.log_id <> $4 and outbox.log_ordinal(t.log_id) > outbox.log_ordinal($4), false) as outbox_seen
  from (select) one
  left join {table} c on c.{key} = $1
  left join outbox.tombstones t on t.cache = $3 and t.key = $2
