-- Sagas: definitions, instances, their journal, the way back, and what wakes them. Needs schema outbox.
-- Payloads are json, not jsonb: what was written is what is read, to the letter, or a replay could see another value
-- than the first run did. There are no foreign keys on the hot path: each would lock a row of another table an insert.
create schema saga;
comment on schema saga is 'Sagabox: sagas, their journal and their workers';

-- ---------------------------------------------------------------------------------------------------------------
create table saga.workflows (
    id uuid primary key,
    name varchar(255) not null,
    description text,
    version integer not null default 1,
    status varchar(50) not null default 'active',
    definition jsonb not null default '{}',
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    created_by uuid,
    constraint workflows_status_check check (status in ('draft', 'active', 'deprecated')),
    constraint workflows_version_check check (version > 0),
    constraint workflows_name_version_key unique (name, version)
);
create index idx_workflows_status on saga.workflows (status);
comment on table saga.workflows is 'Definitions that were started or served: one row a name and version';
comment on column saga.workflows.id is 'Derived from name and version, so every process knows it without asking';
comment on column saga.workflows.definition is 'What the code said: steps, compensations; for people, never read by a worker';

-- ---------------------------------------------------------------------------------------------------------------
-- Fillfactor 50: a step updates the row in place, without touching an index.
create table saga.workflow_instances (
    id uuid primary key,
    workflow_id uuid not null,
    workflow_name varchar(255) not null,
    workflow_version integer not null,
    key text not null,
    state varchar(50) not null default 'pending',
    ready_at timestamptz,
    wake_at timestamptz,
    deadline_at timestamptz not null,
    lease_owner uuid,
    lease_epoch bigint not null default 0,
    checkpoint_no integer not null default 0,
    claimed_no integer not null default 0,
    news_no integer not null default 0,
    wakeups integer not null default 0,
    crash_count smallint not null default 0,
    pivoted boolean not null default false,
    ending text,
    cancel_reason text,
    pause_asked text,
    paused_reason text,
    waits_for text,
    error_message text,
    intents json,
    output json,
    input_digest bytea not null,
    parent_id uuid,
    parent_path text,
    parent_told boolean not null default false,
    current_step_index integer not null generated always as (checkpoint_no) stored,
    context jsonb not null default '{}',
    created_at timestamptz not null default clock_timestamp(),
    started_at timestamptz,
    completed_at timestamptz,
    created_by uuid,
    constraint workflow_instances_state_check check (
        state in ('pending', 'running', 'waiting', 'compensating', 'paused', 'completed', 'failed', 'cancelled')
    ),
    constraint workflow_instances_ending_check check (ending in ('failed', 'cancelled')),
    constraint workflow_instances_key_check check (octet_length(key) between 1 and 1024),
    constraint workflow_instances_parent_check check ((parent_id is null) = (parent_path is null)),
    constraint workflow_instances_workflow_name_key_key unique (workflow_name, key)
) with (fillfactor = 50);
create index idx_workflow_instances_workflow_id_ready_at on saga.workflow_instances (workflow_id, ready_at)
    where ready_at is not null;
create index idx_workflow_instances_wake_at on saga.workflow_instances (wake_at) where wake_at is not null;
create index idx_workflow_instances_lease_owner on saga.workflow_instances (lease_owner) where lease_owner is not null;
create index idx_workflow_instances_state on saga.workflow_instances (state, created_at)
    where state in ('paused', 'compensating', 'failed', 'cancelled');
create index idx_workflow_instances_parent_id on saga.workflow_instances (parent_id)
    where parent_id is not null and not parent_told;
comment on table saga.workflow_instances is 'Sagas: the row that a worker leases, and that every write of it is fenced by';
comment on column saga.workflow_instances.key is 'Chosen by the starter; another start of the name under the same key finds this one';
comment on column saga.workflow_instances.ready_at is 'Since when it wants a worker; null: it has one, or waits, or has ended';
comment on column saga.workflow_instances.wake_at is 'When its timer goes off';
comment on column saga.workflow_instances.lease_owner is 'The worker that has it; null while it waits, is paused or has ended';
comment on column saga.workflow_instances.lease_epoch is 'Counts claims and takeovers; 0: no worker ever had it, so its first intent cannot have happened';
comment on column saga.workflow_instances.checkpoint_no is 'Counts checkpoints; each names the one that it follows';
comment on column saga.workflow_instances.claimed_no is 'checkpoint_no at the last claim: tells whether a crash came after progress';
comment on column saga.workflow_instances.news_no is 'The last checkpoint of which only the results were written, because there was news';
comment on column saga.workflow_instances.wakeups is 'Counts what others told it; a checkpoint names the count that it knows';
comment on column saga.workflow_instances.crash_count is 'Crashes without progress in between; above 5 it is paused';
comment on column saga.workflow_instances.pivoted is 'Nothing is undone any more';
comment on column saga.workflow_instances.ending is 'How it will end; set when compensation begins';
comment on column saga.workflow_instances.pause_asked is 'A person wants it to pause while a worker has it: the worker lets the calls under way end, and then pauses it for this reason';
comment on column saga.workflow_instances.waits_for is 'The receive or sleep that its body waits for: kind and path; for people, never read by a worker';
comment on column saga.workflow_instances.intents is 'Calls that are about to happen or may be happening; without a task they are unknown';
comment on column saga.workflow_instances.input_digest is 'Of the request: the same key with another one is a conflict';
comment on column saga.workflow_instances.parent_told is 'Whether its parent knows that it has ended';
comment on column saga.workflow_instances.context is 'For people and traces; never read by a worker';

-- ---------------------------------------------------------------------------------------------------------------
create table saga.tasks (
    id uuid not null,
    instance_id uuid not null,
    seq integer not null,
    path text not null,
    step_id varchar(255) not null,
    step_type varchar(50) not null,
    status varchar(50) not null default 'completed',
    outcome text not null default 'completed',
    digest bytea,
    input json,
    output json,
    error_message text,
    attempt_count integer not null default 1,
    max_attempts integer not null default 1,
    epoch bigint not null default 0,
    started_at timestamptz,
    completed_at timestamptz not null default clock_timestamp(),
    duration_ms integer generated always as (
        case when started_at is not null
             then least(extract(epoch from completed_at - started_at) * 1000, 2147483647)::integer end) stored,
    primary key (instance_id, seq),
    constraint tasks_status_check check (status in ('pending', 'running', 'completed', 'failed', 'skipped')),
    constraint tasks_outcome_check check (outcome in ('completed', 'rejected', 'unknown')),
    constraint tasks_step_type_check check (
        step_type in ('request', 'step', 'transactional', 'remote', 'child', 'receive', 'sleep', 'lock', 'pivot')
    )
);
comment on table saga.tasks is 'The journal: one row each thing that a body has got an answer to, inserted once; 0 is the request';
comment on column saga.tasks.id is 'The idempotency key of the step: derived from instance and path, hence unique without an index';
comment on column saga.tasks.path is 'Branch, name and occurrence: what a replay recognises it by, together with the digest';
comment on column saga.tasks.outcome is 'completed; rejected: nothing happened; unknown: it may have';
comment on column saga.tasks.epoch is 'Of the claim under which it was written';

-- ---------------------------------------------------------------------------------------------------------------
create table saga.saga_compensations (
    id uuid not null,
    instance_id uuid not null,
    task_id uuid not null,
    task_seq integer not null,
    path text not null,
    step_id varchar(255) not null,
    step_type varchar(50) not null,
    round integer not null default 0,
    position integer not null,
    compensation_action text not null,
    compensation_data json,
    required boolean not null default true,
    status varchar(50) not null default 'pending',
    attempts integer not null default 0,
    not_before timestamptz,
    late_seen integer not null default 0,
    executed_at timestamptz,
    error_message text,
    resolution text,
    created_at timestamptz not null default clock_timestamp(),
    primary key (instance_id, path, round),
    constraint saga_compensations_status_check check (status in ('pending', 'executing', 'completed', 'failed'))
);
create index idx_saga_compensations_status on saga.saga_compensations (status, created_at) where status = 'failed';
comment on table saga.saga_compensations is 'The way back: made when compensation begins, worked off in order of position';
comment on column saga.saga_compensations.id is 'The idempotency key of the compensation';
comment on column saga.saga_compensations.task_id is 'The step that is undone';
comment on column saga.saga_compensations.position is '0: a person took it for done before there was a plan; the plan gives it its place';
comment on column saga.saga_compensations.round is 'Counts how often a late result of the step opened it again';
comment on column saga.saga_compensations.compensation_data is 'The result that is undone; null where nobody saw one';
comment on column saga.saga_compensations.not_before is 'When the effect of an unknown step can no longer appear, a backoff ends, or a reply is no longer waited for';
comment on column saga.saga_compensations.late_seen is 'Late results of the step when it began: one more means that it has to act again';
comment on column saga.saga_compensations.resolution is 'Why a person took it for done';

-- ---------------------------------------------------------------------------------------------------------------
create table saga.signals (
    instance_id uuid not null,
    no integer not null,
    kind text not null default 'signal',
    name text not null,
    dedupe_key text,
    payload json not null,
    created_at timestamptz not null default clock_timestamp(),
    primary key (instance_id, no),
    constraint signals_kind_check check (kind in ('signal', 'reply', 'undone', 'child', 'lock'))
);
create unique index idx_signals_dedupe on saga.signals (instance_id, kind, name, dedupe_key) where dedupe_key is not null;
comment on table saga.signals is 'The mailbox: what others told an instance, in order, never changed; the number is the wake-up that it caused';
comment on column saga.signals.name is 'Of the signal''s class; for other kinds, the path of the step that it is about';

create table saga.late_results (
    id bigint generated always as identity primary key,
    instance_id uuid not null,
    path text not null,
    epoch bigint not null,
    output json,
    created_at timestamptz not null default clock_timestamp()
);
create index idx_late_results_instance_id on saga.late_results (instance_id);
comment on table saga.late_results is 'Results of calls whose worker had lost the instance by the time they came; append-only';

create table saga.locks (
    key text not null,
    instance_id uuid not null,
    path text not null,
    queued_no bigint generated always as identity,
    granted_at timestamptz,
    primary key (key, instance_id)
);
create unique index idx_locks_key on saga.locks (key) where granted_at is not null;
create index idx_locks_instance_id on saga.locks (instance_id);
comment on table saga.locks is 'Semantic locks and their queues, oldest first; held until the saga has ended';

create table saga.interventions (
    id bigint generated always as identity primary key,
    instance_id uuid not null,
    action text not null,
    path text,
    reason text not null,
    database_user text not null default session_user,
    created_at timestamptz not null default clock_timestamp(),
    constraint interventions_action_check check (action in ('cancel', 'pause', 'resume', 'skip', 'result'))
);
create index idx_interventions_instance_id on saga.interventions (instance_id);
comment on table saga.interventions is 'What persons did to instances, and why; append-only';
comment on column saga.interventions.path is 'The step that was skipped, or given a result';

create table saga.workers (
    id uuid primary key,
    name text not null,
    alive_until timestamptz not null,
    started_at timestamptz not null default clock_timestamp(),
    serves jsonb not null default '[]'
);
comment on table saga.workers is 'One row a process; a worker past alive_until never comes back to life, it starts again under another id';

-- ---------------------------------------------------------------------------------------------------------------
-- Calling. Whoever makes an instance ready calls; the worker's half is in wakeup.sql, with the same lock.
create function saga.call_worker() returns void language plpgsql volatile as $$
begin
    if not pg_try_advisory_xact_lock_shared(1936287842, 0) then
        perform pg_notify('saga_ready', '');
    end if;
end $$;
comment on function saga.call_worker is 'Notifies workers, but only if one is idle: it has the lock then';

-- ---------------------------------------------------------------------------------------------------------------
-- Starting.
create function saga.start(
    p_id uuid[], p_workflow_id uuid[], p_name text[], p_version integer[], p_key text[], p_digest bytea[],
    p_request text[], p_intents text[], p_started_at timestamptz[], p_deadline_at timestamptz[], p_owner uuid
) returns table (nth bigint, id uuid, answer text) language plpgsql volatile set enable_seqscan = off as $$
#variable_conflict use_column
declare
    mine uuid[];
begin
    -- Whoever is about to register the same definition, in a transaction of any length, is not waited for.
    insert into saga.workflows (id, name, version)
    select x.workflow_id, x.name, x.version
      from (select distinct u.workflow_id, u.name, u.version
              from unnest(p_workflow_id, p_name, p_version) as u(workflow_id, name, version)) x
     where not exists (select from saga.workflows w where w.id = x.workflow_id)
       and pg_try_advisory_xact_lock(1936287842, hashtext(x.workflow_id::text))
    on conflict do nothing;
    -- In order of the unique key, so that two groups never wait for each other in a circle.
    with inserted as (
        insert into saga.workflow_instances as i (id, workflow_id, workflow_name, workflow_version, key, input_digest, intents,
                                                  created_at, deadline_at, ready_at, state, lease_owner, lease_epoch, started_at)
        select x.id, x.workflow_id, x.name, x.version, x.key, x.digest, x.intents::json, x.started_at, x.deadline_at,
               case when p_owner is null then clock_timestamp() end, case when p_owner is null then 'pending' else 'running' end,
               p_owner, case when p_owner is null then 0 else 1 end, case when p_owner is not null then clock_timestamp() end
          from unnest(p_id, p_workflow_id, p_name, p_version, p_key, p_digest, p_intents, p_started_at, p_deadline_at)
               as x(id, workflow_id, name, version, key, digest, intents, started_at, deadline_at)
         order by x.name, x.key
        on conflict (workflow_name, key) do nothing
        returning i.id)
    select coalesce(array_agg(i.id), '{}') into mine from inserted i;
    if p_owner is null and mine <> '{}' then
        perform saga.call_worker();
    end if;
    insert into saga.tasks (id, instance_id, seq, path, step_id, step_type, output, completed_at)
    select x.id, x.id, 0, '', 'request', 'request', x.request::json, x.started_at
      from unnest(p_id, p_request, p_started_at) as x(id, request, started_at) where x.id = any (mine);
    -- Who lost looks in a later statement, which sees what it lost against.
    return query
        select x.nth, coalesce(i.id, x.id),
               case when x.id = any (mine) then 'started' when i.id is null then 'unseen'
                    when i.input_digest = x.digest then 'exists' else 'conflict' end
          from unnest(p_id, p_name, p_key, p_digest) with ordinality as x(id, name, key, digest, nth)
          left join lateral (select * from saga.workflow_instances f
                              where f.workflow_name = x.name and f.key = x.key limit 1) i on true;
end $$;
comment on function saga.start is 'Starts instances, or finds the ones there are: started, exists, conflict (another request); unseen: the caller''s snapshot is too old to see whom it lost against. With an owner they are leased to it at once';

-- ---------------------------------------------------------------------------------------------------------------
-- Checkpoints.
create type saga.answer as (id uuid, answer text, wakeups integer, cancel text, again boolean);

-- Everything is compared on the locked rows, and each answer is read from them. The plan is kept, so it must not be one
-- that was right on an empty table only: hence no sequential scans, here and in every function that looks something up.
-- Instances: $1 id, $2 epoch, $3 checkpoint that it follows, $4 wake-ups seen, $5 flags (1 strict, 2 held, 4 passes the
-- pivot), $6 state, $7 wake_at, $8 intents, $9 those of them that stay beside news, $10 output, $11 rest (ending, error,
-- paused_reason, waits_for; null on the happy path), $12 at. Tasks: $13 to $28, the last says what belongs to what comes next.
-- $29 plan, $30 children, as JSON. Messages: $31 to $39 likewise. $40: whether to wait for locked rows.
create function saga.checkpoint(
    uuid[], bigint[], int[], int[], int[], text[], timestamptz[], text[], text[], text[], text[], timestamptz[],
    uuid[], uuid[], int[], text[], text[], text[], text[], bytea[], text[], text[], text[], int[], int[], timestamptz[],
    timestamptz[], bool[], json, json, uuid[], text[], text[], uuid[], text[], smallint[], text[], bytea[], bool[], boolean
) returns setof saga.answer language plpgsql volatile set enable_seqscan = off as $$
begin
    if $40 then
        -- In a statement of its own: what the next one reads is then what whoever was waited for has left.
        perform from unnest($1) x(id)
          cross join lateral (select from saga.workflow_instances i where i.id = x.id for no key update) i;
    end if;
    return query
    with x as (
        select * from unnest($1::uuid[], $2::bigint[], $3::int[], $4::int[], $5::int[], $6::text[], $7::timestamptz[],
                             $8::text[], $9::text[], $10::text[], $11::text[], $12::timestamptz[])
            as x(id, epoch, no, seen, flags, state, wake_at, intents, open, output, rest, at)
    ), own as materialized (
        select x.*, i.lease_epoch as e, i.checkpoint_no as n, i.wakeups as w, i.news_no, i.cancel_reason as cancel,
               i.workflow_id, i.workflow_name, i.workflow_version, i.key, i.deadline_at, i.input_digest, i.state as old_state,
               i.lease_owner, i.wake_at as old_wake_at, i.pivoted, i.output as old_output, i.ending, i.error_message,
               i.paused_reason, i.pause_asked, i.waits_for
          from x cross join lateral (select * from saga.workflow_instances i where i.id = x.id for no key update skip locked) i
    ), ok as (
        select own.*, w <> seen as news from own where e = epoch and n = no and (w = seen or flags & 1 = 0)
    ), tasks as (
        insert into saga.tasks (id, instance_id, seq, path, step_id, step_type, status, outcome, digest, input, output,
                                error_message, attempt_count, max_attempts, started_at, completed_at, epoch)
        select t.id, t.instance_id, t.seq, t.path, t.name, t.kind, case t.outcome when 'completed' then 'completed' else 'failed' end,
               t.outcome, t.digest, t.input::json, t.output::json, t.error, t.attempts, t.max_attempts, t.started_at, t.completed_at,
               ok.epoch
          from unnest($13::uuid[], $14::uuid[], $15::int[], $16::text[], $17::text[], $18::text[], $19::text[], $20::bytea[],
                      $21::text[], $22::text[], $23::text[], $24::int[], $25::int[], $26::timestamptz[], $27::timestamptz[],
                      $28::bool[])
               as t(id, instance_id, seq, path, name, kind, outcome, digest, input, output, error, attempts, max_attempts,
                    started_at, completed_at, is_next)
          join ok on ok.id = t.instance_id
         where not (t.is_next and ok.news)
    ), plan as (
        insert into saga.saga_compensations as c (id, instance_id, task_id, task_seq, path, step_id, step_type, round, position,
                                                  compensation_action, compensation_data, required, status, attempts, not_before,
                                                  late_seen, executed_at, error_message)
        -- A row may change and begin at once: what comes next counts then, unless there is news.
        select distinct on (p.instance_id, p.path, p.round)
               p.id, p.instance_id, p.task_id, p.task_seq, p.path, p.name, p.kind, p.round, p.position, p.action, p.data, p.required,
               p.status, p.attempts, p.not_before, p.late_seen, p.executed_at, p.error
          from json_to_recordset($29::json)
               as p(id uuid, instance_id uuid, task_id uuid, task_seq int, path text, name text, kind text, round int, position int,
                    action text, data json, required bool, status text, attempts int, not_before timestamptz, late_seen int,
                    executed_at timestamptz, error text, is_next bool)
          join ok on ok.id = p.instance_id
         where not (p.is_next and ok.news)
         order by p.instance_id, p.path, p.round, p.is_next desc
        on conflict (instance_id, path, round) do update
           set status = excluded.status, attempts = excluded.attempts, not_before = excluded.not_before,
               late_seen = excluded.late_seen, executed_at = excluded.executed_at, error_message = excluded.error_message,
               position = excluded.position
    ), children as (
        -- Their keys derive from parent and path, so nobody else can be inserting the same one.
        insert into saga.workflow_instances (id, workflow_id, workflow_name, workflow_version, key, input_digest, created_at,
                                             deadline_at, ready_at, parent_id, parent_path)
        select k.id, k.workflow_id, k.name, k.version, k.key, decode(k.digest, 'hex'), k.started_at, k.deadline_at, k.started_at,
               ok.id, k.parent_path
          from json_to_recordset($30::json)
               as k(id uuid, workflow_id uuid, name text, version int, key text, digest text, request json, started_at timestamptz,
                    deadline_at timestamptz, parent_id uuid, parent_path text)
          join ok on ok.id = k.parent_id
         where not ok.news
        on conflict (workflow_name, key) do nothing
        returning id
    ), called as (
        select count(saga.call_worker()) from (select from children limit 1) c
    ), requests as (
        insert into saga.tasks (id, instance_id, seq, path, step_id, step_type, output, completed_at)
        select k.id, k.id, 0, '', 'request', 'request', k.request, k.started_at
          from json_to_recordset($30::json) as k(id uuid, request json, started_at timestamptz)
          join children on children.id = k.id
    ), messages as (
        insert into outbox.events (shard, topic, key, event_id, event_type, schema_version, headers, payload)
        select outbox.shard_of(b.key, (select l.shard_count from outbox.logs l where l.is_current)),
               b.topic, b.key, b.event_id, b.event_type, b.schema_version, b.headers::jsonb,
               outbox.fits(b.payload, b.key, b.headers::jsonb, b.topic, t.max_message_bytes)
          from unnest($31::uuid[], $32::text[], $33::text[], $34::uuid[], $35::text[], $36::smallint[], $37::text[], $38::bytea[],
                      $39::bool[])
               with ordinality as b(instance_id, topic, key, event_id, event_type, schema_version, headers, payload, is_next, nth)
          join ok on ok.id = b.instance_id
          left join outbox.topics t on t.topic = b.topic
         where not (b.is_next and ok.news)
         order by b.nth
        returning shard
    ), woken as (
        select count(outbox.wake(s.shard)) as shards from (select distinct m.shard from messages m) s
    ), changed as (
        -- An update by way of the primary key's conflict: it looks the row up whatever the planner thinks of the table. A
        -- join would be planned, and one that was planned on an empty table reads all of it later.
        insert into saga.workflow_instances as i (id, workflow_id, workflow_name, workflow_version, key, deadline_at,
                                                  input_digest, checkpoint_no, intents, news_no, state, lease_owner, wake_at,
                                                  pivoted, output, ending, error_message, paused_reason, pause_asked,
                                                  waits_for, completed_at)
        select ok.id, ok.workflow_id, ok.workflow_name, ok.workflow_version, ok.key, ok.deadline_at, ok.input_digest, ok.n + 1,
               (case when ok.news then ok.open else ok.intents end)::json,
               case when ok.news then ok.n + 1 else ok.news_no end,
               case when ok.news then ok.old_state else ok.state end,
               case when ok.news or ok.flags & 2 = 2 then ok.lease_owner end,
               -- As long from now as it is from what the worker takes for now: were its clock behind ours, it would find
               -- itself woken too soon, and again, and again.
               case when ok.news then ok.old_wake_at
                    else clock_timestamp() + make_interval(secs => extract(epoch from ok.wake_at - ok.at)::float8) end,
               ok.pivoted or (not ok.news and ok.flags & 4 = 4),
               case when ok.news then ok.old_output else ok.output::json end,
               case when ok.news then ok.ending else coalesce(ok.rest::json ->> 'ending', ok.ending) end,
               case when ok.news then ok.error_message else coalesce(ok.rest::json ->> 'error', ok.error_message) end,
               case when ok.news then ok.paused_reason else ok.rest::json ->> 'paused_reason' end,
               case when ok.news or ok.flags & 2 = 2 then ok.pause_asked end,
               case when ok.news then ok.waits_for else ok.rest::json ->> 'waits_for' end,
               case when not ok.news and ok.state in ('completed', 'failed', 'cancelled') then ok.at end
          from ok
        on conflict (id) do update
           set checkpoint_no = excluded.checkpoint_no, intents = excluded.intents, news_no = excluded.news_no,
               state = excluded.state, lease_owner = excluded.lease_owner, wake_at = excluded.wake_at,
               pivoted = excluded.pivoted, output = excluded.output, ending = excluded.ending,
               error_message = excluded.error_message, paused_reason = excluded.paused_reason,
               pause_asked = excluded.pause_asked, waits_for = excluded.waits_for, completed_at = excluded.completed_at
    )
    select x.id, case when own.id is null then 'locked'
                      when own.e <> x.epoch then 'fenced'
                      when own.n = x.no + 1 then case when own.news_no = own.n then 'news' else 'applied' end
                      when own.n <> x.no then 'broken'
                      when ok.id is null then 'changed'
                      when ok.news then 'news' else 'applied' end as answer,
           own.w as wakeups, own.cancel, own.n = x.no + 1 as again
      from x left join own using (id) left join ok using (id) cross join woken cross join called;
end $$;
comment on function saga.checkpoint is 'Writes checkpoints of many instances: applied; news: without what comes next; changed: not at all, as it was strict; fenced, locked, broken';

-- ---------------------------------------------------------------------------------------------------------------
-- Claiming.
create type saga.claimed as (
    id uuid, workflow_id uuid, epoch bigint, checkpoint_no integer, wakeups integer, fresh boolean, state text, ending text,
    error text, pivoted boolean, cancel_reason text, pause_asked text, crash_count smallint, started_at timestamptz, deadline_at timestamptz,
    parent_id uuid, parent_path text, has_locks boolean, request text, intents text,
    seqs integer[], paths text[], names text[], kinds text[], outcomes text[], digests bytea[], inputs text[], outputs text[],
    errors text[], attempts integer[], starts timestamptz[], ends timestamptz[],
    mail_nos integer[], mail_kinds text[], mail_names text[], mail_payloads text[], mail_times timestamptz[],
    late_paths text[], late_outputs text[], plan text
);

create function saga.read_claimed(p_ids uuid[], p_fresh uuid[]) returns setof saga.claimed language sql stable as $$
    select i.id, i.workflow_id, i.lease_epoch, i.checkpoint_no, i.wakeups, i.id = any (p_fresh), i.state, i.ending,
           i.error_message, i.pivoted, i.cancel_reason, i.pause_asked, i.crash_count, i.created_at, i.deadline_at, i.parent_id, i.parent_path,
           exists (select from saga.locks l where l.instance_id = i.id),
           (select t.output::text from saga.tasks t where t.instance_id = i.id and t.seq = 0), i.intents::text,
           t.*, m.*, l.*, p.plan
      from saga.workflow_instances i
     cross join lateral (
           select array_agg(t.seq order by t.seq), array_agg(t.path order by t.seq), array_agg(t.step_id::text order by t.seq),
                  array_agg(t.step_type::text order by t.seq), array_agg(t.outcome order by t.seq),
                  array_agg(t.digest order by t.seq), array_agg(t.input::text order by t.seq),
                  array_agg(t.output::text order by t.seq), array_agg(t.error_message order by t.seq),
                  array_agg(t.attempt_count order by t.seq), array_agg(t.started_at order by t.seq),
                  array_agg(t.completed_at order by t.seq)
             from saga.tasks t where t.instance_id = i.id and t.seq > 0) t
     cross join lateral (
           select array_agg(s.no order by s.no), array_agg(s.kind order by s.no), array_agg(s.name order by s.no),
                  array_agg(s.payload::text order by s.no), array_agg(s.created_at order by s.no)
             from saga.signals s where s.instance_id = i.id) m
     cross join lateral (
           select array_agg(r.path order by r.id), array_agg(r.output::text order by r.id)
             from saga.late_results r where r.instance_id = i.id) l
     cross join lateral (
           select json_agg(json_build_object(
                      'position', c.position, 'task_seq', c.task_seq, 'path', c.path, 'name', c.step_id, 'kind', c.step_type,
                      'round', c.round, 'required', c.required, 'status', c.status, 'attempts', c.attempts,
                      'not_before', c.not_before, 'late_seen', c.late_seen, 'error', c.error_message,
                      'executed_at', c.executed_at, 'action', c.compensation_action) order by c.position, c.round)::text as plan
             from saga.saga_compensations c where c.instance_id = i.id) p
     where i.id = any (p_ids)
$$;
comment on function saga.read_claimed is 'Instances with their journals, by primary key; call it in a statement after the one that took the lease';

create type saga.mailbox as (
    wakeups integer, cancel_reason text, pause_asked text, mail_nos integer[], mail_kinds text[], mail_names text[], mail_payloads text[],
    mail_times timestamptz[], late_paths text[], late_outputs text[]
);

create function saga.look(p_id uuid) returns setof saga.mailbox language plpgsql stable set enable_seqscan = off as $$
begin
    return query
    select i.wakeups, i.cancel_reason, i.pause_asked, m.*, l.*
      from saga.workflow_instances i
     cross join lateral (
           select array_agg(s.no order by s.no), array_agg(s.kind order by s.no), array_agg(s.name order by s.no),
                  array_agg(s.payload::text order by s.no), array_agg(s.created_at order by s.no)
             from saga.signals s where s.instance_id = i.id) m
     cross join lateral (
           select array_agg(r.path order by r.id), array_agg(r.output::text order by r.id)
             from saga.late_results r where r.instance_id = i.id) l
     where i.id = p_id;
end $$;
comment on function saga.look is 'What others told an instance, all of it';

create function saga.result(p_workflow text, p_key text, out id uuid, out state text, out output text, out error_message text,
                            out paused_reason text)
returns setof record language plpgsql stable set enable_seqscan = off as $$
#variable_conflict use_column
begin
    return query
    select i.id, i.state::text, i.output::text, i.error_message, i.paused_reason
      from saga.workflow_instances i where i.workflow_name = p_workflow and i.key = p_key;
end $$;
comment on function saga.result is 'How the saga under a key stands, and what it returned';

create function saga.standings(p_names text[], p_keys text[]) returns table (
    id uuid, state text, output text, error_message text, paused_reason text
) language plpgsql stable set enable_seqscan = off as $$
#variable_conflict use_column
begin
    -- The limit keeps it from becoming a merge join, which would read the whole index.
    return query
    select i.id, i.state::text, i.output::text, i.error_message, i.paused_reason
      from unnest(p_names, p_keys) with ordinality as x(name, key, nth)
      left join lateral (select * from saga.workflow_instances f
                          where f.workflow_name = x.name and f.key = x.key limit 1) i on true
     order by x.nth;
end $$;
comment on function saga.standings is 'saga.result for many, in the order asked for; nulls where there is none';

create function saga.claim(p_owner uuid, p_limit integer, p_workflows uuid[]) returns setof saga.claimed
language plpgsql volatile set enable_seqscan = off as $$
declare
    w uuid;
    taken uuid[] := '{}';
    unused uuid[];
begin
    -- One definition after the other, so that those that nobody serves are not read; first the one whose turn is longest due.
    for w in
        select x.id from unnest(p_workflows) x(id)
         cross join lateral (select i.ready_at from saga.workflow_instances i
                              where i.workflow_id = x.id and i.ready_at is not null order by i.ready_at limit 1) h
         order by h.ready_at
    loop
        taken := taken || array(
            select i.id from saga.workflow_instances i
             where i.workflow_id = w and i.ready_at is not null
             order by i.ready_at limit p_limit - cardinality(taken) for no key update skip locked);
        exit when cardinality(taken) >= p_limit;
    end loop;
    if taken = '{}' then
        return;
    end if;
    -- Rows are looked up by their ids, and not joined: see saga.checkpoint.
    with u as (
        update saga.workflow_instances i
           set lease_owner = p_owner, lease_epoch = i.lease_epoch + 1, claimed_no = i.checkpoint_no, ready_at = null,
               wake_at = null, started_at = coalesce(i.started_at, clock_timestamp()), completed_at = null,
               state = case when i.ending is not null then 'compensating' else 'running' end
         where i.id = any (taken)
        returning i.id, i.lease_epoch)
    select array_agg(u.id) filter (where u.lease_epoch = 1) into unused from u;
    -- The journal in a later statement than the one that took the epoch: one that waited for a zombie's checkpoint would
    -- not show it.
    return query select * from saga.read_claimed(taken, coalesce(unused, '{}'));
end $$;
comment on function saga.claim is 'Leases ready instances of these definitions, longest ready first within each, and hands them over with their journals';

create function saga.take_over(p_limit integer) returns setof uuid language plpgsql volatile
set enable_seqscan = off as $$
declare
    lost uuid[];
begin
    -- Distinct owners by skipping through the index: with many instances of living workers they are not read.
    with recursive owners(owner) as (
        (select i.lease_owner from saga.workflow_instances i where i.lease_owner is not null order by i.lease_owner limit 1)
        union all
        select (select i.lease_owner from saga.workflow_instances i where i.lease_owner > o.owner order by i.lease_owner limit 1)
          from owners o where o.owner is not null
    ), dead as (
        select o.owner from owners o
         where o.owner is not null
           and not exists (select from saga.workers w where w.id = o.owner and w.alive_until > clock_timestamp())
    )
    select array_agg(l.id) into lost
      from (select i.id from dead d
             cross join lateral (select * from saga.workflow_instances i where i.lease_owner = d.owner
                                  limit p_limit for no key update skip locked) i
             limit p_limit) l;
    if lost is null then
        return;
    end if;
    return query
    update saga.workflow_instances i
       set lease_owner = null, lease_epoch = i.lease_epoch + 1,
           crash_count = case when i.checkpoint_no > i.claimed_no then 0 else i.crash_count + 1 end,
           state = case when i.checkpoint_no <= i.claimed_no and i.crash_count >= 5 then 'paused' else i.state end,
           paused_reason = case when i.checkpoint_no <= i.claimed_no and i.crash_count >= 5
                                then 'crash loop: its worker was lost ' || i.crash_count + 1 || ' times without any progress' end,
           ready_at = case when i.checkpoint_no <= i.claimed_no and i.crash_count >= 5 then null else clock_timestamp() end
     where i.id = any (lost)
    returning i.id;
    perform saga.call_worker();  -- whoever takes over may serve other definitions only
end $$;
comment on function saga.take_over is 'Takes instances away from workers that are dead or absent; at most that many a call';

create function saga.hand_over(p_owner uuid) returns integer language sql volatile set enable_seqscan = off as $$
    with u as (
        update saga.workflow_instances i
           set lease_owner = null, lease_epoch = i.lease_epoch + 1, crash_count = 0, ready_at = clock_timestamp()
         where i.lease_owner = p_owner returning 1)
    select n from (select count(*)::integer as n from u) u cross join saga.call_worker()
$$;
comment on function saga.hand_over is 'A worker that stops gives all of its instances back; what it still writes is fenced off';

create function saga.let_timers_go_off(p_limit integer) returns integer language plpgsql volatile
set enable_seqscan = off as $$
declare
    due uuid[];
begin
    select array_agg(d.id) into due
      from (select i.id from saga.workflow_instances i
             where i.wake_at <= clock_timestamp() order by i.wake_at limit p_limit for no key update skip locked) d;
    if due is null then
        return 0;
    end if;
    update saga.workflow_instances i set wake_at = null, ready_at = clock_timestamp(), wakeups = i.wakeups + 1
     where i.id = any (due);
    perform saga.call_worker();  -- whoever looks at timers may serve other definitions only
    return cardinality(due);
end $$;
comment on function saga.let_timers_go_off is 'Makes instances ready whose time has come; at most that many a call';

create function saga.next_timer() returns float8 language plpgsql volatile set enable_seqscan = off as $$
begin
    return (select extract(epoch from min(i.wake_at) - clock_timestamp())::float8
              from saga.workflow_instances i where i.wake_at is not null);
end $$;
comment on function saga.next_timer is 'Seconds until the next timer goes off; null without any';

create function saga.leased(p_owner uuid, out id uuid, out lease_epoch bigint) returns setof record
language plpgsql stable set enable_seqscan = off as $$
begin
    return query select i.id, i.lease_epoch from saga.workflow_instances i where i.lease_owner = p_owner;
end $$;
comment on function saga.leased is 'What is leased to a worker';

create function saga.forget_workers() returns void language plpgsql volatile set enable_seqscan = off as $$
begin
    delete from saga.workers w
     where w.alive_until < clock_timestamp() - interval '1 day'
       and not exists (select from saga.workflow_instances i where i.lease_owner = w.id);
end $$;
comment on function saga.forget_workers is 'Rows of workers that have been dead for a day, once none of the instances is theirs';

-- ---------------------------------------------------------------------------------------------------------------
-- Waking. The row lock orders each with the instance's checkpoints; nothing is decided by looking at another table.
create function saga.wake(p_id uuid) returns void language plpgsql volatile set enable_seqscan = off as $$
declare
    is_ready boolean;
begin
    update saga.workflow_instances i
       set wakeups = i.wakeups + 1,
           ready_at = case when i.lease_owner is null and i.state in ('waiting', 'compensating')
                           then coalesce(i.ready_at, clock_timestamp()) else i.ready_at end,
           wake_at = case when i.lease_owner is null and i.state in ('waiting', 'compensating') then null else i.wake_at end
     where i.id = p_id
    returning i.ready_at is not null into is_ready;
    if is_ready then
        perform saga.call_worker();
    end if;
end $$;
comment on function saga.wake is 'Counts a wake-up; an instance that waits is ready from now on';

create function saga.tell(
    p_id uuid, p_kind text, p_name text, p_dedupe_key text, p_payload json
) returns text language plpgsql volatile set enable_seqscan = off as $$
declare
    i record;
begin
    select w.state, w.wakeups into i from saga.workflow_instances w where w.id = p_id for no key update;
    if not found then
        return 'unknown';
    end if;
    if p_kind = 'signal' and i.state in ('completed', 'failed', 'cancelled') then
        return 'ended';
    end if;
    insert into saga.signals (instance_id, no, kind, name, dedupe_key, payload)
    values (p_id, i.wakeups + 1, p_kind, p_name, p_dedupe_key, p_payload)
    on conflict (instance_id, kind, name, dedupe_key) where dedupe_key is not null do nothing;
    if not found then
        return 'duplicate';
    end if;
    perform saga.wake(p_id);
    return 'accepted';
end $$;
comment on function saga.tell is 'Puts one thing into the mailbox: accepted, duplicate, ended (signals only), unknown';

create function saga.signal(p_workflow text, p_key text, p_name text, p_dedupe_key text, p_payload json) returns text
language sql volatile set enable_seqscan = off as $$
    select coalesce((select saga.tell(i.id, 'signal', p_name, p_dedupe_key, p_payload)
                       from saga.workflow_instances i where i.workflow_name = p_workflow and i.key = p_key), 'unknown')
$$;
comment on function saga.signal is 'Sends a signal to the saga under a key';

create function saga.cancel(p_workflow text, p_key text, p_reason text) returns text language plpgsql volatile set enable_seqscan = off as $$
declare
    i record;
begin
    select w.id, w.state, w.pivoted, w.ending into i
      from saga.workflow_instances w where w.workflow_name = p_workflow and w.key = p_key for no key update;
    if not found then
        return 'unknown';
    end if;
    if i.state in ('completed', 'failed', 'cancelled') then
        return 'ended';
    end if;
    update saga.workflow_instances w set cancel_reason = coalesce(w.cancel_reason, p_reason) where w.id = i.id;
    perform saga.wake(i.id);
    return case when i.pivoted or i.ending is not null then 'recorded' else 'requested' end;
end $$;
comment on function saga.cancel is 'Asks for a cancel: requested; recorded, where nothing follows from it any more; ended; unknown';

create function saga.record_late(p_id uuid, p_path text, p_epoch bigint, p_output json) returns text
language plpgsql volatile set enable_seqscan = off as $$
begin
    perform from saga.workflow_instances w where w.id = p_id for no key update;
    -- Journalled by another claim, it is that claim's: this run's call may have landed later, after the compensation.
    if exists (select from saga.tasks t where t.instance_id = p_id and t.path = p_path and t.outcome = 'completed'
                                          and t.epoch = p_epoch) then
        return 'known';
    end if;
    if exists (select from saga.late_results r where r.instance_id = p_id and r.path = p_path and r.epoch = p_epoch) then
        return 'duplicate';
    end if;
    insert into saga.late_results (instance_id, path, epoch, output) values (p_id, p_path, p_epoch, p_output);
    update saga.workflow_instances w
       set state = 'compensating'
     where w.id = p_id and w.state in ('failed', 'cancelled')
       and exists (select from saga.saga_compensations c where c.instance_id = p_id and c.path = p_path);
    perform saga.wake(p_id);
    return 'recorded';
end $$;
comment on function saga.record_late is 'Keeps the result of a fenced run unless that run has journalled it, and opens its compensation again, also on an instance that has ended';

-- ---------------------------------------------------------------------------------------------------------------
-- Locks. 1936287841 is 'sga!'. The advisory lock comes first, the instance's row second, everywhere.
create function saga.acquire(p_id uuid, p_epoch bigint, p_key text, p_path text) returns text
language plpgsql volatile set enable_seqscan = off as $$
begin
    perform pg_advisory_xact_lock(1936287841, hashtext(p_key));
    perform from saga.workflow_instances i where i.id = p_id and i.lease_epoch = p_epoch for no key update;
    if not found then
        return 'fenced';
    end if;
    insert into saga.locks (key, instance_id, path, granted_at)
    select p_key, p_id, p_path,
           case when not exists (select from saga.locks l where l.key = p_key) then clock_timestamp() end
    on conflict (key, instance_id) do nothing;
    return case when exists (select from saga.locks l
                              where l.key = p_key and l.instance_id = p_id and l.granted_at is not null)
                then 'granted' else 'queued' end;
end $$;
comment on function saga.acquire is 'Takes a lock or queues up for it; asking again changes nothing';

create function saga.release_locks(p_id uuid) returns void language plpgsql volatile set enable_seqscan = off as $$
declare
    held record;
    next record;
begin
    for held in select l.key from saga.locks l where l.instance_id = p_id order by l.key loop
        perform pg_advisory_xact_lock(1936287841, hashtext(held.key));
        delete from saga.locks l where l.key = held.key and l.instance_id = p_id;
        if exists (select from saga.locks l where l.key = held.key and l.granted_at is not null) then
            continue;
        end if;
        update saga.locks l set granted_at = clock_timestamp()
         where l.key = held.key
           and l.instance_id = (select q.instance_id from saga.locks q where q.key = held.key order by q.queued_no limit 1)
        returning l.instance_id, l.path, l.queued_no into next;
        if found then
            perform saga.tell(next.instance_id, 'lock', next.path, next.queued_no::text, 'null');
        end if;
    end loop;
end $$;
comment on function saga.release_locks is 'Gives back the locks of an instance that has ended, and its places in queues; who is next is told';

-- ---------------------------------------------------------------------------------------------------------------
-- Children.
create function saga.tell_parent(p_id uuid) returns void language plpgsql volatile set enable_seqscan = off as $$
declare
    c saga.workflow_instances;
begin
    select * into c from saga.workflow_instances i where i.id = p_id for no key update;
    if c.parent_id is null or c.state not in ('completed', 'failed', 'cancelled') or c.parent_told then
        return;
    end if;
    update saga.workflow_instances i set parent_told = true where i.id = p_id;
    perform saga.tell(c.parent_id, 'child', c.parent_path, c.checkpoint_no::text,
        case when c.state = 'completed'
             then json_build_object('outcome', 'completed', 'state', c.state, 'output', c.output)
             else json_build_object('outcome', 'rejected', 'state', c.state, 'error', c.error_message) end);
end $$;
comment on function saga.tell_parent is 'Tells the parent that its child has ended; once for each end';

create function saga.undo_child(p_id uuid) returns text language plpgsql volatile set enable_seqscan = off as $$
declare
    c record;
begin
    select i.state, i.ending into c from saga.workflow_instances i where i.id = p_id for no key update;
    if not found or c.state in ('failed', 'cancelled') then
        return 'undone';
    end if;
    if c.state = 'completed' then
        update saga.workflow_instances i
           set state = 'compensating', ending = 'cancelled', error_message = 'its parent is undone', parent_told = false
         where i.id = p_id;
    else
        update saga.workflow_instances i
           set cancel_reason = coalesce(i.cancel_reason, 'its parent is undone'), parent_told = false
         where i.id = p_id;
    end if;
    perform saga.wake(p_id);
    return 'asked';
end $$;
comment on function saga.undo_child is 'Asks a child to undo itself: opens it again where it has completed, else cancels it; undone: there is nothing left';

create function saga.sweep(p_limit integer) returns integer language plpgsql volatile set enable_seqscan = off as $$
declare
    found_id uuid;
    done integer := 0;
begin
    for found_id in
        select i.id from saga.workflow_instances i
         where i.parent_id is not null and not i.parent_told and i.state in ('completed', 'failed', 'cancelled')
         limit p_limit
    loop
        perform saga.tell_parent(found_id);
        done := done + 1;
    end loop;
    for found_id in
        select distinct l.instance_id from saga.locks l
         where exists (select from saga.workflow_instances i
                        where i.id = l.instance_id and i.state in ('completed', 'failed', 'cancelled'))
         limit p_limit
    loop
        perform saga.release_locks(found_id);
        done := done + 1;
    end loop;
    return done;
end $$;
comment on function saga.sweep is 'Does for instances that have ended what their worker did not come to do: tells parents, gives locks back';

-- ---------------------------------------------------------------------------------------------------------------
-- Workers.
create function saga.beat(p_id uuid, p_seconds double precision) returns boolean language sql volatile set enable_seqscan = off as $$
    with u as (
        update saga.workers w set alive_until = clock_timestamp() + make_interval(secs => p_seconds)
         where w.id = p_id and w.alive_until > clock_timestamp() returning 1)
    select exists (select from u)
$$;
comment on function saga.beat is 'Renews a worker''s lease; false: it is past, and all of its instances may be somebody else''s';
