-- Waiting for ends.

-- name: standing
-- Many rows by their unique key, without a lock, in the order asked for; nulls where there is none.
select i.id, i.state, i.output::text as output, i.error_message, i.paused_reason
  from unnest($1::text[], $2::text[]) with ordinality as x(name, key, nth)
  left join lateral (select * from saga.workflow_instances f where f.workflow_name = x.name and f.key = x.key) i on true
 order by x.nth
