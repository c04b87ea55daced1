-- Replies into mailboxes.

-- name: deliver
-- Tells the instances ($1), each in the order of the batch. Locks: the instances' rows, in the order of their ids; waits for
-- whoever has one. Rows: at most a batch. Index: the primary key.
select x.nth, saga.tell(x.id, x.kind, x.name, x.dedupe_key, x.payload::json) as answer
  from (select * from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::text[])
               with ordinality as u(id, kind, name, dedupe_key, payload, nth)
         order by u.id, u.nth offset 0) x

-- name: keep_strays
-- Replies that fit nothing, for people. Rows: as many as sent.
insert into saga.stray_replies (topic, reason, instance_id, path, headers, payload)
select $1, x.reason, x.instance_id, x.path, x.headers::jsonb, x.payload
  from unnest($2::text[], $3::uuid[], $4::text[], $5::text[], $6::bytea[])
       as x(reason, instance_id, path, headers, payload)
