-- What the memory of a process needs of the database: one connection that listens, and one notification a batch.

-- name: notify
-- At the commit of this transaction, processes that remember rows hear $1. No lock until then; PostgreSQL lets
-- transactions that notify commit one after another, which is why only caches with memory send any. One row.
select pg_notify('outbox_cache', $1)

-- name: look
-- Which table the quoted name $1 is now, with $2 its key; whether this connection hears of it, and whether its consumers
-- say anything. Proves besides that the connection lives. No lock; reads the catalogue, by primary keys; one row.
select n.oid, pg_backend_pid() as pid,
       exists (select from pg_listening_channels() l(channel) where l.channel = 'outbox_cache') as hears,
       coalesce((select c.notifies from outbox.caches c where c.cache = n.oid), false) as notifies,
       exists (select from pg_attribute a
                 join pg_type t on t.oid = a.atttypid
                 left join pg_type b on b.oid = t.typbasetype
                 left join pg_collation l on l.oid = a.attcollation
                where a.attrelid = n.oid and a.attname = $2 and not a.attisdropped
                  and coalesce(b.typname, t.typname) in ('uuid', 'int2', 'int4', 'int8', 'text', 'varchar')
                  and coalesce(l.collisdeterministic, true)) as key_is_exact
  from (select to_regclass($1)::oid as oid) n
