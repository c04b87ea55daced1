-- Which messages an inbox has had.

-- name: receive
-- Keeps the ids of a batch ($2) for an inbox ($1), on day $3; comes back: today, and the ids that were known.
-- Where today is another day nothing is kept, and the caller asks again. $4 are the slots of the last days but not the
-- next one, so that emptying it waits for nobody; as a parameter, because only then the others are not even locked.
-- The day's own slot is looked at twice: its unique index also holds what a batch of another partition keeps right now.
-- For $5 seconds after midnight, as long as a batch that began before it may be open, ids go into yesterday's slot too: only
-- one unique index can make the two take turns. The list is walked, or the planner may read a whole slot.
-- Locks: the rows inserted, in the order of their ids. Index: the primary key of each slot. Rows: at most a batch.
with asked as (
    select x.message_id from unnest($2::text[]::uuid[]) x(message_id) where outbox.inbox_day() = $3
), news as materialized (
    select a.message_id, outbox.inbox_day(now() - make_interval(secs => $5::float8)) < $3 as is_early
      from asked a
      left join lateral (select m.message_id from outbox.inbox_messages m
                          where m.inbox = $1 and m.message_id = a.message_id and m.slot = any ($4::smallint[])
                          limit 1) known on true
     where known.message_id is null
), first as (
    insert into outbox.inbox_messages (slot, inbox, message_id)
    select ($3 + 8) % 9, $1, n.message_id from news n where n.is_early order by n.message_id
    on conflict do nothing
    returning message_id
), added as (
    insert into outbox.inbox_messages (slot, inbox, message_id)
    select $3 % 9, $1, n.message_id from news n
     where not n.is_early or n.message_id in (select f.message_id from first f)
     order by n.message_id
    on conflict do nothing
    returning message_id
)
select outbox.inbox_day() as today,
       array(select a.message_id::text from asked a except select d.message_id::text from added d) as known

-- name: rotate
-- Empties the slot of tomorrow, unless somebody uses it at the moment. Lock: that slot, exclusively, never waited for.
select outbox.rotate_inbox()
