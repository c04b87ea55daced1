-- Database llm_agent_db, after `outbox migrate up`.
create table agents (
    id uuid primary key default gen_random_uuid(),
    name varchar(255) not null,
    model varchar(100) not null default 'gpt-4',
    status varchar(50) not null default 'active',
    version integer not null default 1,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    deleted_at timestamptz,
    constraint agents_name_min_length check (length(name) >= 3),
    constraint agents_status_check check (status in ('active', 'inactive', 'archived'))
);
create index idx_agents_status on agents (status) where deleted_at is null;
comment on table agents is 'LLM agents configured by users';
comment on column agents.version is 'Number of the newest change, counted under the row lock';

-- Agents are archived in plain SQL, by operators and nightly jobs. A trigger tells the others about it.
create function agents_emit_archived() returns trigger language plpgsql as $$
begin
    perform outbox.emit(type => 'agent.archived', topic => 'llm.agents', key => new.id::text,
                        payload => jsonb_build_object('agent_id', new.id));
    return null;
end $$;
create trigger agents_emit_archived after update of status on agents
    for each row when (new.status = 'archived' and old.status <> 'archived')
    execute function agents_emit_archived();

-- The audit trail: every change, in the transaction that makes it. It knows nothing of the outbox, so the demo's
-- verdict can hold the two against each other.
create table agent_changes (
    agent_id uuid not null references agents (id),
    version integer not null,
    action varchar(50) not null,
    agent_name varchar(255),
    transaction_id xid8 not null default pg_current_xact_id(),
    primary key (agent_id, version),
    constraint agent_changes_version_check check (version > 0)
);
comment on table agent_changes is 'What happened to each agent, as a chain of versions from 1 without gaps';

create function agents_count_version() returns trigger language plpgsql as $$
begin
    new.version := old.version + 1;
    new.updated_at := now();
    return new;
end $$;
create trigger agents_count_version before update on agents for each row execute function agents_count_version();

create function agents_audit() returns trigger language plpgsql as $$
declare
    action constant text := case when tg_op = 'INSERT' then 'agent.created'
                                 when new.deleted_at is not null then 'agent.deleted'
                                 when new.status = 'archived' then 'agent.archived'
                                 else 'agent.renamed' end;
begin
    insert into agent_changes (agent_id, version, action, agent_name)
    values (new.id, new.version, action, case when action in ('agent.created', 'agent.renamed') then new.name end);
    return null;
end $$;
create trigger agents_audit after insert or update on agents for each row execute function agents_audit();

-- Executions have ids of their callers' choosing: the same id twice is one execution, and one that was cancelled before
-- it began (no workflow, no response) never begins.
create table executions (
    id uuid primary key,
    workflow_id uuid,
    agent_id uuid references agents (id),
    prompt text,
    response text,
    status varchar(50) not null,
    executed_at timestamptz not null default now(),
    constraint executions_status_check check (status in ('completed', 'cancelled'))
);
create index idx_executions_workflow_id on executions (workflow_id);
comment on table executions is 'What agents were asked, and answered';
