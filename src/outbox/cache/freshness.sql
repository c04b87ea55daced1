-- Reading a cache together with how fresh it is, in one snapshot. Templates, like the merge.

-- name: one
-- The row of a key ($1, as text $2) of cache $3, with the age of what the cache is known to have, whether the key waits in
-- parking, the owner's or this cache's, and whether the cache is known to be whole: with an owner ($4), all of its pages
-- are of the log that is followed; without one, no other log was ever applied and no event is missing.
-- No lock; by primary keys; one row.
select {read_c}, c.{key} is not null as outbox_found,
       date_part('epoch', clock_timestamp() - f.complete_as_of) as outbox_lag_seconds,
       coalesce(outbox.key_hash(h.topic, $2) = any (f.parked), false)
    or (select true from outbox.parked_keys k where k.parker = $3 and k.topic = h.topic and k.key = $2) is true as outbox_parked,
       case when $4::boolean then h.complete_log = f.log_id else f.is_only_log and not h.has_gap end is true as outbox_complete
  from (select) one
  left join {table} c on c.{key} = $1
  left join outbox.caches h on h.name = $3 and h.role = 'live'
  left join outbox.freshness f on f.consumer = h.consumer and f.topic = h.topic

-- name: many
-- The same for some keys ($1, as text $2); one row a key, the freshness of the cache in each. (An `exists` in the list of
-- columns could be answered by reading all parked keys of the cache.)
select k.key as outbox_key, {read_c}, c.{key} is not null as outbox_found, known.lag_seconds as outbox_lag_seconds,
       coalesce(outbox.key_hash(known.topic, k.key) = any (known.parked), false)
    or (select true from outbox.parked_keys p where p.parker = $3 and p.topic = known.topic and p.key = k.key) is true as outbox_parked,
       known.complete as outbox_complete
  from (select h.topic, f.parked, date_part('epoch', clock_timestamp() - f.complete_as_of) as lag_seconds,
               case when $4::boolean then h.complete_log = f.log_id else f.is_only_log and not h.has_gap end is true as complete
          from (select) one
          left join outbox.caches h on h.name = $3 and h.role = 'live'
          left join outbox.freshness f on f.consumer = h.consumer and f.topic = h.topic) known
 cross join unnest($2::text[]) k(key)
  left join (select c.* from {table} c where c.{key} = any ($1)) c on c.{key}::text = k.key
