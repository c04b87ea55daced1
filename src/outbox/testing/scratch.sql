-- A cache's table for tests: made beside the cache's own, emptied for each plan, dropped at the end.
-- Templates, like the merge: {table} is the scratch table.

-- name: make
-- An empty table beside table $1, called $2. Locks: that table against changes of its columns.
select outbox.create_generation($1::oid::regclass, $2)::oid

-- name: rows
-- All of it. No lock; rows: at most the events of a test.
select {read_c} from {table} c

-- name: as_stored
-- Rows ($1: JSON, as the merge sends them) as the table's types have them, in order. Reads nothing.
select {read_c} from json_populate_recordset(null::{table}, $1::text::json) c

-- name: empty
-- Takes back what a plan left: of the scratch table, and beside it. $1 its identity, $2 the consumer, $3 the parker.
-- Rows: at most the events of a test.
with rows as (
    delete from {table}
), stones as (
    delete from outbox.tombstones t where t.cache = $1::oid
), pages as (
    delete from outbox.pages p where p.cache = $1::oid
), positions as (
    delete from outbox.positions p where p.consumer = $2
), events as (
    delete from outbox.parked_events e where e.parker = $3
)
delete from outbox.parked_keys k where k.parker = $3

-- name: parked
-- What was set aside, and why. By primary key; rows: at most the events of a test.
select k.key, k.reason, k.detail from outbox.parked_keys k where k.parker = $1 order by k.key

-- name: forget
-- That there was such a table. Rows: 1 of caches.
delete from outbox.caches c where c.cache = $1::oid

-- name: drop
-- The scratch table.
drop table {table}
