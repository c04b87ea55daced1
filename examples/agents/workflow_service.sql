-- Database workflow_db, after `outbox migrate up` and `saga migrate up`.
create table workflow_agent_cache (
    agent_id uuid primary key,
    agent_name varchar(255) not null,
    last_synced_at timestamptz not null default now()
);
comment on table workflow_agent_cache is 'Agents as the workflow service knows them; follows the events of the LLM agent service';

select outbox.prepare_cache('workflow_agent_cache');

create table workflow_results (
    id uuid primary key default gen_random_uuid(),
    workflow_id uuid not null,
    agent_name varchar(255) not null,
    response text not null,
    status varchar(50) not null default 'recorded',
    recorded_at timestamptz not null default now(),
    constraint workflow_results_status_check check (status in ('recorded', 'withdrawn'))
);
create index idx_workflow_results_workflow_id on workflow_results (workflow_id);
comment on table workflow_results is 'What the agents answered';
