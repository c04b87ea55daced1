-- Comparing a cache with its owner. Templates, like the merge; {digested} are columns that both have, quoted.

-- name: digests
-- The 1,024 buckets of the keys, each with the count and the combined digest of its rows; owner.sql computes the same of
-- the owner's. No lock; reads all rows, returns at most 1,024.
select d.bucket, count(*) as count, bit_xor(d.digest)::text as digest from (
    select ('x' || substr(md5(c.{key}::text), 1, 8))::bit(32)::int & 1023 as bucket,
           ('x' || substr(md5(to_jsonb(x)::text), 1, 16))::bit(64)::bigint as digest
      from {table} c cross join lateral (select {digested}) x) d
 group by d.bucket

-- name: bucket_keys
-- Keys and digests of the rows in the buckets $1, at most $2 of those whose key as text is after $3. No lock; reads all
-- rows, returns at most $2.
select c.{key}::text as key, ('x' || substr(md5(to_jsonb(x)::text), 1, 16))::bit(64)::bigint::text as digest
  from {table} c cross join lateral (select {digested}) x
 where ('x' || substr(md5(c.{key}::text), 1, 8))::bit(32)::int & 1023 = any ($1::int[])
   and c.{key}::text collate "C" > $3::text
 order by c.{key}::text collate "C" limit $2

-- name: compare
-- The rows of the keys $2 next to the owner's, $1, a JSON array sent as text and read into the table's types: which of the
-- columns $5 differ, what the row was like, and whether row or tombstone is of an event that the owner's snapshot $4 of
-- log $3 does not see. $6 the table, $7 by whom its keys are parked, $8 the topic. No lock; by the key's index and
-- primary keys; one row a key.
select k.key, x.{key} is not null as owned, c.{key} is not null as cached,
       md5(concat(to_jsonb(c)::text, to_jsonb(t)::text)) as print,
       array(select o.key from jsonb_each(to_jsonb(x)) o
              where o.key = any ($5::text[]) and o.value is distinct from to_jsonb(c) -> o.key order by o.key) as columns,
       coalesce(outbox.page_sees($3, $4::text::pg_snapshot, c.outbox_log, c.outbox_transaction_id) is false
                or outbox.page_sees($3, $4::text::pg_snapshot, t.log_id, t.transaction_id) is false, false) as newer,
       exists (select from outbox.parked_keys p where p.parker = $7 and p.topic = $8 and p.key = k.key) as parked
  from unnest($2::text[]) k(key)
  left join json_populate_recordset(null::{table}, $1::text::json) x on x.{key}::text = k.key
  left join {table} c on c.{key} = k.key::{key_type}
  left join outbox.tombstones t on t.cache = $6::oid and t.key = k.key
