-- Parked keys that are to be tried again, and parked events that nobody needs any more.

-- name: look
-- Whether keys of the shard are to be released, and whether parked events are over and done with. One row of shards; the
-- first entry of idx_parked_keys_shard_retry_at and of idx_parked_events_over.
select exists (select from outbox.parked_keys k
                where k.parker = 'relay' and k.shard = s.shard and k.retry_at is not null and k.retry_at <= now()) as due,
       exists (select from outbox.parked_events e
                where e.parker = 'relay' and e.shard = s.shard and e.state <> 'parked'
                  and coalesce(e.release_window_no, e.window_no) <= s.done_through) as over
  from outbox.shards s where s.shard = $1

-- name: log
-- Locks the shard row; see outbox.log_release. Rows: window_max_events.
select outbox.log_release($1, $2, $3, $4::text::jsonb, $5, $6, $7)

-- name: forget
-- Released and discarded events that no window to be replayed leaves out or publishes; by idx_parked_events_over. Rows: $2.
delete from outbox.parked_events d
 where d.id = any (array(
       select e.id from outbox.parked_events e
        where e.parker = 'relay' and e.shard = $1 and e.state <> 'parked'
          and coalesce(e.release_window_no, e.window_no) <= (select s.done_through from outbox.shards s where s.shard = $1)
        order by coalesce(e.release_window_no, e.window_no) limit $2))
