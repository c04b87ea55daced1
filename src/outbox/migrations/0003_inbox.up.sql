-- Inboxes: which messages had their effect, so that they have it once although they are delivered again at another place.
create table outbox.inbox_messages (
    slot smallint not null,
    inbox text not null,
    message_id uuid not null,
    primary key (inbox, message_id, slot),
    constraint inbox_messages_inbox_check check (octet_length(inbox) between 1 and 127)
) partition by list (slot);

create table outbox.inbox_messages_slot_0 partition of outbox.inbox_messages for values in (0);
create table outbox.inbox_messages_slot_1 partition of outbox.inbox_messages for values in (1);
create table outbox.inbox_messages_slot_2 partition of outbox.inbox_messages for values in (2);
create table outbox.inbox_messages_slot_3 partition of outbox.inbox_messages for values in (3);
create table outbox.inbox_messages_slot_4 partition of outbox.inbox_messages for values in (4);
create table outbox.inbox_messages_slot_5 partition of outbox.inbox_messages for values in (5);
create table outbox.inbox_messages_slot_6 partition of outbox.inbox_messages for values in (6);
create table outbox.inbox_messages_slot_7 partition of outbox.inbox_messages for values in (7);
create table outbox.inbox_messages_slot_8 partition of outbox.inbox_messages for values in (8);

comment on table outbox.inbox_messages is 'Ids of the messages that inboxes handled or parked; each is kept for at least seven whole days';
comment on column outbox.inbox_messages.slot is 'Storage rotation, a day a slot; nine, because one is being filled and the next one emptied';
comment on column outbox.inbox_messages.message_id is 'The event id; of other producers a hash of what CloudEvents calls the identity of an event, its source and id';

create function outbox.inbox_day(p_at timestamptz default now()) returns integer
language sql stable parallel safe as $$
    select floor(extract(epoch from p_at) / 86400)::integer
$$;
comment on function outbox.inbox_day is 'Days since the epoch, UTC; modulo nine the slot that is being filled';

create function outbox.rotate_inbox() returns boolean language plpgsql volatile as $$
declare
    today integer := outbox.inbox_day(clock_timestamp());
    due regclass := format('outbox.inbox_messages_slot_%s', (today + 1) % 9)::regclass;
begin
    -- 1868724275 is 'obx3': consumers that look at the same moment would be in each other's way.
    if not pg_try_advisory_xact_lock(1868724275, 0)
       or not exists (select from outbox.inbox_messages m where m.slot = (today + 1) % 9) then
        return false;
    end if;
    -- No batch looks into this slot before tomorrow, so the lock is free; whoever holds it is not waited for.
    execute format('lock table %s in access exclusive mode nowait', due);
    -- The slot is filled from midnight on: under the lock nobody begins to, and the clock says whether somebody has.
    if outbox.inbox_day(clock_timestamp()) <> today then
        return false;
    end if;
    execute format('truncate %s', due);
    return true;
end $$;
comment on function outbox.rotate_inbox is 'Empties tomorrow''s slot, whose newest ids are eight days old; 55P03 where somebody uses it';
