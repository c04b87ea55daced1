-- Pages of an owner. Templates: {query} is the service's own query, a constant of its program, always inside of a
-- sub-select; {shown}, {key}, {order} and {compared} are columns of it that PostgreSQL described, quoted; {state} is the
-- statement of that name. All of it, rows, snapshot and log, is one statement, so it sees one snapshot.

-- name: session
-- Values look the same from every session, and nothing is written, until the transaction or savepoint is rolled back.
select set_config('timezone', 'UTC', true), set_config('datestyle', 'ISO, YMD', true),
       set_config('intervalstyle', 'iso_8601', true), set_config('bytea_output', 'hex', true),
       set_config('extra_float_digits', '1', true), set_config('transaction_read_only', 'on', true)

-- name: describe
-- Only prepared, for the names and types of its columns.
select q.* from (
{query}
) q

-- name: state
-- What a page is worth: from a standby (its snapshot lists nothing in progress), after a write of the same transaction
-- (it would see rows that nobody else does) or from a copy of the log's database it would be worth nothing.
-- Lock: none. Rows: one of logs. The identity cannot be asked for on a standby.
select pg_is_in_recovery() as standby, pg_current_xact_id_if_assigned() is not null as writing,
       current_setting('transaction_isolation') <> 'read committed' as keeps_snapshot,
       pg_current_snapshot()::text as snapshot, (select l.log_id from outbox.logs l where l.is_current) as log,
       case when not pg_is_in_recovery() then
           (select (l.system_identifier, l.database_oid, l.timeline)
                   is not distinct from (i.system_identifier, i.database_oid, i.timeline)
              from outbox.logs l cross join outbox.identity() i where l.is_current)
       end as lives_here

-- name: first
-- The first $1 rows by key; null instead of rows if they are more than $2 bytes. Lock: none. Index: the key's; text keys
-- need one in collate "C". Rows: $1.
select s.*, r.count, case when octet_length(r.rows) <= $2 then r.rows end as rows
  from ({state}) s
 cross join (select count(*) as count, json_agg(p)::text as rows
               from (select {shown} from (
{query}
                    ) q order by {order} limit $1) p) r

-- name: next
-- The same, of the keys after $3.
select s.*, r.count, case when octet_length(r.rows) <= $2 then r.rows end as rows
  from ({state}) s
 cross join (select count(*) as count, json_agg(p)::text as rows
               from (select {shown} from (
{query}
                    ) q where {order} > $3::{compared} order by {order} limit $1) p) r

-- name: some
-- The rows of the keys $1 that exist; null instead of rows if they are more than $2 bytes. Lock: none. Index: the key's.
-- Rows: one a key.
select s.*, r.count, case when octet_length(r.rows) <= $2 then r.rows end as rows
  from ({state}) s
 cross join (select count(*) as count, json_agg(p)::text as rows
               from (select {shown} from (
{query}
                    ) q where {key} = any ($1::{compared}[])) p) r

-- name: digests
-- The 1,024 buckets of the keys, each with the count and the combined digest of its rows. reconcile.sql computes the same
-- of the cache's table. Lock: none. Rows: reads all, returns at most 1,024.
select s.*, r.count, r.rows
  from ({state}) s
 cross join (
    select count(*) as count, json_agg(b)::text as rows from (
        select d.bucket, count(*) as count, bit_xor(d.digest)::text as digest from (
            select ('x' || substr(md5({key}::text), 1, 8))::bit(32)::int & 1023 as bucket,
                   ('x' || substr(md5(to_jsonb(x)::text), 1, 16))::bit(64)::bigint as digest
              from (
{query}
                   ) q cross join lateral (select {digested}) x) d
         group by d.bucket) b) r

-- name: bucket_keys
-- Keys and digests of the rows in the buckets $1, at most $2 of those whose key as text is after $3. Lock: none.
-- Rows: reads all, returns $2.
select s.*, r.count, r.rows
  from ({state}) s
 cross join (
    select count(*) as count, json_agg(b)::text as rows from (
        select {key}::text as key, ('x' || substr(md5(to_jsonb(x)::text), 1, 16))::bit(64)::bigint::text as digest
          from (
{query}
               ) q cross join lateral (select {digested}) x
         where ('x' || substr(md5({key}::text), 1, 8))::bit(32)::int & 1023 = any ($1::int[])
           and {key}::text collate "C" > $3::text
         order by {key}::text collate "C" limit $2) b) r
