-- Replies into mailboxes.

-- name: deliver
-- Tells the instances ($1), each in the order of the batch. Locks: the instances' rows, in the order of their ids; waits for
-- whoever has one. Rows: at most a batch. Index: the primary key.
select x.nth, saga.tell(x.id, x.kind, x.name, x.dedupe_key, x.payload::json) as answer
  from (select * from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[])
               with ordinality as u(id, kind, name, dedupe_key, payload, nth)
         order by u.id, u.nth offset 0) x

-- name: forget_strays
-- Rows older than $1 days, and those beyond the newest $2, oldest first, skipping locked ones. Index: the primary key, whose
-- order is about that of time; $2 entries of it are read, and once more. Rows: at most $3.
with old as (
    select s.id from saga.stray_replies s
     where s.came_at < clock_timestamp() - make_interval(days => $1)
        or s.id <= (select n.id from saga.stray_replies n order by n.id desc offset $2 limit 1)
     order by s.id limit $3 for update skip locked
), gone as (
    delete from saga.stray_replies s where s.id = any (array(select old.id from old)) returning 1
)
select count(*)::integer from gone

-- name: keep_strays
-- Replies that fit nothing, for people. Rows: as many as sent.
insert into saga.stray_replies (topic, reason, instance_id, path, headers, payload)
select $1, x.reason, x.instance_id, x.path, x.headers::jsonb, x.payload
  from unnest($2::text[], $3::uuid[], $4::text[], $5::text[], $6::bytea[])
       as x(reason, instance_id, path, headers, payload)
