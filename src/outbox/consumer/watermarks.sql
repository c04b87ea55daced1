-- What relays said about how far they got, what of it a consumer has applied, and what may be forgotten then.

-- name: take_turn
-- The processes of a consumer group do the same work; one at a time does not deadlock. 1868724275 is 'obx3'.
-- Until the transaction ends.
select pg_advisory_xact_lock(1868724275, hashtext($1))

-- name: store
-- Watermarks ($2, a JSON array as text) that name one of the consumer's topics ($3), or come from a log that does: a shard
-- that has never published to a topic says so by not naming it. One that is ahead of this database's clock by more than
-- $4 seconds is not believed; one older than all that is kept was superseded. No wait but for the turn; by primary key.
insert into outbox.watermarks (consumer, log_id, shard, as_of, shard_count, oldest_xid, next_offsets, parked)
select $1, x.log_id, x.shard, x.as_of, x.shard_count, x.oldest_xid::text::xid8, x.next_offsets, x.parked
  from jsonb_to_recordset($2::text::jsonb)
       x(log_id text, shard smallint, as_of timestamptz, shard_count smallint, oldest_xid bigint, next_offsets jsonb,
         parked bigint[])
 where (x.next_offsets ?| $3::text[]
        or exists (select from outbox.watermarks w where w.consumer = $1 and w.log_id = x.log_id))
   and x.as_of <= clock_timestamp() + make_interval(secs => $4)
   and not exists (select from outbox.watermarks w where w.consumer = $1 and w.log_id = x.log_id and w.shard = x.shard
                   having min(w.as_of) > x.as_of)
 order by x.log_id, x.shard, x.as_of
on conflict (consumer, log_id, shard, as_of) do nothing

-- name: thin
-- Every other one of a shard that has more than $2, but the newest and the oldest. By primary key; rows: the consumer's.
with numbered as (
    select w.log_id, w.shard, w.as_of, row_number() over shard as number, count(*) over (partition by w.log_id, w.shard) as total
      from outbox.watermarks w where w.consumer = $1
    window shard as (partition by w.log_id, w.shard order by w.as_of)
)
delete from outbox.watermarks w using numbered n
 where w.consumer = $1 and w.log_id = n.log_id and w.shard = n.shard and w.as_of = n.as_of
   and n.total > $2 and n.number % 2 = 0 and n.number < n.total

-- name: advance
-- Moves outbox.freshness of the consumer's topics ($2) to the newest watermarks that are applied; $3 is the allowed clock
-- skew in seconds. For a topic count: the newest log that names it; of that log the shards below its present number, each
-- with at least one; of a shard the newest watermark whose every offset the partition's position has reached while it
-- runs. One that lists less than an earlier one of its shard is from after the topic was re-created, when positions from
-- before prove nothing. Watermarks that nobody needs any more go. Returns whether any waits to be applied.
-- By primary keys; rows: the consumer's watermarks, at most $2 x shards x 64, its positions and marks of the topics.
with said as materialized (
    select w.*, outbox.log_ordinal(w.log_id) as ordinal from outbox.watermarks w where w.consumer = $1
), logs as materialized (
    select distinct on (t.topic) t.topic, s.log_id,
           (select n.shard_count from said n where n.log_id = s.log_id order by n.as_of desc limit 1) as shard_count
      from unnest($2::text[]) t(topic) join said s on s.next_offsets ? t.topic
     order by t.topic, s.ordinal desc, s.log_id
), listed as (
    select l.topic, s.log_id, s.shard, s.as_of,
           p.partition is null or coalesce(o.next_offset >= p.next_offset and o.state = 'running', false) as is_reached,
           p.next_offset < max(p.next_offset) over (partition by l.topic, s.shard, p.partition order by s.as_of) as is_lower
      from logs l
      join said s on s.log_id = l.log_id and s.shard < l.shard_count
      left join lateral (select e.key::integer as partition, e.value::bigint as next_offset
                           from jsonb_each_text(s.next_offsets -> l.topic) e) p on true
      left join outbox.positions o on o.consumer = $1 and o.topic = l.topic and o.partition = p.partition
), applied as materialized (
    select distinct on (x.topic, x.shard) x.topic, x.log_id, x.shard, x.as_of
      from (select i.topic, i.log_id, i.shard, i.as_of from listed i
             group by 1, 2, 3, 4 having bool_and(i.is_reached and i.is_lower is not true)) x
     order by x.topic, x.shard, x.as_of desc
), fresh as (
    select l.topic, l.log_id,
           not exists (select from outbox.applied m
                        where m.consumer = $1 and m.topic = l.topic and m.log_id <> l.log_id) as is_only_log,
           min(s.as_of) - make_interval(secs => $3) as complete_as_of,
           min(s.oldest_xid::text::bigint)::text::xid8 as oldest_xid,
           array(select distinct h from applied b join said c on c.log_id = b.log_id and c.shard = b.shard and c.as_of = b.as_of,
                        unnest(c.parked) h where b.topic = l.topic order by h) as parked
      from logs l
      join applied a on a.topic = l.topic
      join said s on s.log_id = a.log_id and s.shard = a.shard and s.as_of = a.as_of
     group by l.topic, l.log_id, l.shard_count
    having count(*) = l.shard_count
), moved as (
    insert into outbox.freshness as f (consumer, topic, log_id, complete_as_of, oldest_xid, parked, is_only_log)
    select $1, x.topic, x.log_id, x.complete_as_of, x.oldest_xid, x.parked, x.is_only_log from fresh x order by x.topic
    on conflict (consumer, topic) do update
       set log_id = excluded.log_id, complete_as_of = excluded.complete_as_of, oldest_xid = excluded.oldest_xid,
           parked = excluded.parked, is_only_log = excluded.is_only_log, updated_at = clock_timestamp()
     where outbox.log_ordinal(excluded.log_id) > outbox.log_ordinal(f.log_id)
        or excluded.log_id = f.log_id and excluded.complete_as_of >= f.complete_as_of
           and (excluded.complete_as_of, excluded.parked, excluded.is_only_log)
               is distinct from (f.complete_as_of, f.parked, f.is_only_log)
), needed as (
    select l.log_id, n.shard, min(coalesce(a.as_of, '-infinity')) as since
      from logs l
     cross join generate_series(0, l.shard_count - 1) n(shard)
      left join applied a on a.topic = l.topic and a.shard = n.shard
     group by l.log_id, n.shard
), superseded as (
    delete from outbox.watermarks w
     where w.consumer = $1
       and not exists (select from needed n where n.log_id = w.log_id and n.shard = w.shard and w.as_of >= n.since)
)
select exists (select from said s join needed n on n.log_id = s.log_id and n.shard = s.shard and s.as_of > n.since)

-- name: forgettable
-- Caches of a consumer that remember pages or deletions which everything applied has outgrown; $2 seconds they are kept
-- for readers who wait. See forget. No lock; by consumer, then until the first find of each cache.
select distinct c.name
  from outbox.caches c
  join outbox.freshness f on f.consumer = c.consumer and f.topic = c.topic
 where c.consumer = $1 and f.parked = '{}'
   and (exists (select from outbox.pages p
                 where p.cache = c.cache and p.merged_at < clock_timestamp() - make_interval(secs => $2)
                   and (p.log_id = f.log_id and pg_snapshot_xmax(p.snapshot) <= f.oldest_xid
                        or outbox.log_ordinal(p.log_id) < outbox.log_ordinal(f.log_id)))
     or exists (select from outbox.tombstones t
                 where t.cache = c.cache and t.deleted_at < clock_timestamp() - make_interval(secs => $2)
                   and (t.log_id = f.log_id and t.transaction_id < f.oldest_xid
                        or outbox.log_ordinal(t.log_id) < outbox.log_ordinal(f.log_id)
                        or t.transaction_id is null and t.page_id is not null
                            and not exists (select from outbox.pages p where p.id = t.page_id))))
 order by c.name

-- name: impatient
-- Whoever holds the cache's lock is not waited for longer than $1 milliseconds; there is always a next time.
select set_config('lock_timeout', $1, true)

-- name: forget
-- Of the tables of a cache ($1), at most $3 pages and $3 deletions that can never decide anything again: every transaction
-- that a page does not see, or that was open when something was deleted, is below oldest_xid, so it is over and applied,
-- but for parked events, below which the line is drawn. Pages of older logs go once all pages of the newer one are merged.
-- In the same transaction the floor rises to what was dropped: a page that could not be compared with it is refused.
-- The caller holds the cache's lock alone since an earlier statement (pages.lock_alone). Rows: 2 x $3, and the page's range.
with known as materialized (
    select c.cache, f.log_id, outbox.log_ordinal(f.log_id) as ordinal,
           c.complete_log is null or c.complete_log = f.log_id as is_complete,
           least(f.oldest_xid::text::bigint,
                 (select min(e.transaction_id::text::bigint) from outbox.parked_events e
                   where e.parker = case c.role when 'live' then c.name else r.relname end
                     and e.topic = c.topic and e.state = 'parked' and e.log_id = f.log_id)
                )::text::xid8 as line
      from outbox.caches c
      join pg_class r on r.oid = c.cache
      join outbox.freshness f on f.consumer = c.consumer and f.topic = c.topic
     where c.name = $1 and f.parked = '{}'
), dropped_pages as (
    delete from outbox.pages p
     using known k
     where p.id in (select o.id from known n join outbox.pages o on o.cache = n.cache
                     where o.merged_at < clock_timestamp() - make_interval(secs => $2)
                       and (o.log_id = n.log_id and pg_snapshot_xmax(o.snapshot) <= n.line
                            or n.is_complete and outbox.log_ordinal(o.log_id) < n.ordinal)
                     order by o.id limit $3)
       and k.cache = p.cache
    returning p.id, p.cache, p.log_id = k.log_id as is_current, pg_snapshot_xmax(p.snapshot) as next_xid
), dropped_tombstones as (
    delete from outbox.tombstones t
     using known k
     where (t.cache, t.key) in (
               select o.cache, o.key from known n join outbox.tombstones o on o.cache = n.cache
                where o.deleted_at < clock_timestamp() - make_interval(secs => $2)
                  and (o.page_id is null or o.page_id in (select d.id from dropped_pages d)
                       or not exists (select from outbox.pages p where p.id = o.page_id))
                  and (o.log_id = n.log_id and o.transaction_id < n.line
                       or n.is_complete and outbox.log_ordinal(o.log_id) < n.ordinal
                       or o.transaction_id is null and o.page_id is not null)
                limit $3)
       and k.cache = t.cache
    returning t.cache, t.log_id = k.log_id as is_current, (t.transaction_id::text::bigint + 1)::text::xid8 as next_xid
), raised as (
    update outbox.caches c
       set floor_log = k.log_id, floor_xid = x.floor::text::xid8, updated_at = clock_timestamp()
      from known k
     cross join lateral (
           select greatest(max(d.next_xid::text::bigint),
                           (select o.floor_xid::text::bigint from outbox.caches o
                             where o.cache = k.cache and o.floor_log = k.log_id), 0) as floor
             from (select p.cache, p.next_xid from dropped_pages p where p.is_current
                   union all select t.cache, t.next_xid from dropped_tombstones t where t.is_current) d
            where d.cache = k.cache) x
     where c.cache = k.cache
       and (exists (select from dropped_pages p where p.cache = c.cache)
            or exists (select from dropped_tombstones t where t.cache = c.cache))
)
select (select count(*) from dropped_pages) as pages, (select count(*) from dropped_tombstones) as tombstones
