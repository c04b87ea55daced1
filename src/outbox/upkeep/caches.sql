-- The caches of a database. Takes no lock but those of a read.

-- name: caches
-- One row a cache: its live table and what is known of it. By primary keys; rows: caches, counting their partitions and
-- parked keys. The number of rows is the planner's estimate, -1 where there is none.
select c.name, c.consumer, c.topic, c.complete_log, c.cache::regclass::text as live, l.reltuples::bigint as live_rows,
       s.cache::regclass::text as spare, r.reltuples::bigint as spare_rows, f.complete_as_of,
       extract(epoch from clock_timestamp() - f.complete_as_of)::float8 as lag_seconds,
       coalesce(p.partitions, 0) as partitions, coalesce(p.halted, '{}') as halted,
       (select count(*) from outbox.parked_keys k where k.parker = c.name and k.topic = c.topic) as parked
  from outbox.caches c
  join pg_class l on l.oid = c.cache
  left join outbox.caches s on s.name = c.name and s.role = 'spare'
  left join pg_class r on r.oid = s.cache
  left join outbox.freshness f on f.consumer = c.consumer and f.topic = c.topic
  left join lateral (select count(*) as partitions,
                            array_agg(q.partition || ': ' || q.state order by q.partition) filter (where q.state <> 'running') as halted
                       from outbox.positions q where q.consumer = c.consumer and q.topic = c.topic) p on true
 where c.role = 'live'
 order by c.name

-- name: rebuilds
-- How far rebuilds are. Rows: at most two a cache.
select c.name, c.role, b.pages, b.rows, b.changed, b.removed, b.worker, b.started_at, b.updated_at, b.finished_at,
       coalesce(b.lease_until >= clock_timestamp(), false) as working
  from outbox.rebuilds b join outbox.caches c on c.cache = b.cache
 order by c.name, c.role
