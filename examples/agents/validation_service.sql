-- Database validation_db, after `saga migrate up`.
create table validation_results (
    id uuid primary key default gen_random_uuid(),
    workflow_id uuid not null,
    content text not null,
    status varchar(50) not null default 'passed',
    validated_at timestamptz not null default now(),
    constraint validation_results_status_check check (status in ('passed', 'withdrawn'))
);
create index idx_validation_results_workflow_id on validation_results (workflow_id);
comment on table validation_results is 'Texts that were found to be good enough, and whether somebody still relies on it';
