-- The other side of remote steps: what a participant answered, and replies that fit nothing.
create table saga.commands (
    participant text not null,
    key uuid not null,
    instance_id uuid not null,
    path text not null,
    contract text not null,
    outcome text,
    output json,
    error text,
    is_undone boolean not null default false,
    attempts smallint not null default 0,
    taken_at timestamptz not null default clock_timestamp(),
    forget_at timestamptz not null,
    primary key (participant, key),
    constraint commands_outcome_check check (outcome in ('completed', 'rejected', 'unknown'))
) with (fillfactor = 70);
create index idx_commands_forget_at on saga.commands (forget_at);
comment on table saga.commands is 'Commands that a participant of this service had: one row for a do and its undo, whichever came first';
comment on column saga.commands.key is 'Names the do, for both; derived from the saga''s instance and path';
comment on column saga.commands.outcome is 'What was answered to the do, and is answered again; null: it has not come, or is tried again';
comment on column saga.commands.output is 'The reply, which its compensation is given';
comment on column saga.commands.is_undone is 'The undo was acknowledged; without an outcome it is a tombstone: a do that comes now is rejected';
comment on column saga.commands.attempts is 'Of the command that is tried at the moment';
comment on column saga.commands.forget_at is 'When the row may go; a do that old is refused before that';

create table saga.stray_replies (
    id bigint generated always as identity primary key,
    topic text not null,
    reason text not null,
    instance_id uuid,
    path text,
    headers jsonb not null,
    payload bytea,
    came_at timestamptz not null default clock_timestamp()
);
comment on table saga.stray_replies is 'Replies that belong to no saga of this database, or cannot be read: kept for people';
