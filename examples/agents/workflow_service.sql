-- Database workflow_db, after `outbox migrate up`.
create table workflow_agent_cache (
    agent_id uuid primary key,
    agent_name varchar(255) not null,
    last_synced_at timestamptz not null default now()
);
comment on table workflow_agent_cache is 'Agents as the workflow service knows them; follows the events of the LLM agent service';

select outbox.prepare_cache('workflow_agent_cache');
