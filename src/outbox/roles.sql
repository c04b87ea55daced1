-- Three roles with as little as each needs; grant them to the logins of your services:
--
--     psql -1 -v ON_ERROR_STOP=1 -f roles.sql shop && psql -c 'grant outbox_writer to shop_service' shop
--
-- Run it as the owner of schema outbox (creating the roles takes CREATEROLE; create them yourself where it has not), after
-- each migration, and as often as you like. Roles belong to the whole cluster, grants to this database. An operator who
-- migrates needs none of them, but owns the tables.

do $$
declare
    wanted text;
begin
    foreach wanted in array array['outbox_writer', 'outbox_relay', 'outbox_reader'] loop
        if not exists (select from pg_roles where rolname = wanted) then
            execute format('create role %I nologin', wanted);
        end if;
    end loop;
end $$;

grant usage on schema outbox to outbox_writer, outbox_relay, outbox_reader;

-- Services that emit: they add events, and see no payload, not even their own.
grant insert on outbox.events to outbox_writer;
grant select (position, shard, topic, key) on outbox.events to outbox_writer;
grant usage on sequence outbox.events_position_seq to outbox_writer;
grant select on outbox.logs, outbox.topics to outbox_writer;

-- The relay, consumers, `outbox adopt`: everything but the tables themselves.
grant select, insert, update, delete, truncate on all tables in schema outbox to outbox_relay;
grant usage, select, update on all sequences in schema outbox to outbox_relay;

-- `outbox status`, `outbox parked`, dashboards: parked payloads included.
grant select on all tables in schema outbox to outbox_reader;
