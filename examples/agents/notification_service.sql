-- Database notification_db, after `saga migrate up`.
create table notification_preferences (
    recipient varchar(255) primary key,
    enabled boolean not null default true
);
comment on table notification_preferences is 'Who wants to be told; whoever is not here does';
insert into notification_preferences values ('nobody', false);

create table notifications (
    id uuid primary key default gen_random_uuid(),
    workflow_id uuid not null,
    recipient varchar(255) not null,
    body text not null,
    status varchar(50) not null default 'sent',
    created_at timestamptz not null default now(),
    constraint notifications_status_check check (status in ('sent', 'cancelled'))
);
create index idx_notifications_workflow_id on notifications (workflow_id);
comment on table notifications is 'What people were told, and whether it still holds';
