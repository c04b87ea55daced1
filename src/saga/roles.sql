-- Three roles for sagas, with as little as each needs; grant them to the logins of your services:
--
--     psql -1 -v ON_ERROR_STOP=1 -f roles.sql shop && psql -c 'grant saga_client, outbox_writer to shop_service' shop
--
-- Run it as the owner of schema saga, after each migration, and as often as you like, as `roles.sql` of package outbox, whose
-- roles go along: who starts sagas with remote steps emits commands (outbox_writer); a worker emits, and consumes commands
-- and replies (outbox_relay).

do $$
declare
    wanted text;
begin
    foreach wanted in array array['saga_client', 'saga_worker', 'saga_reader'] loop
        if not exists (select from pg_roles where rolname = wanted) then
            execute format('create role %I nologin', wanted);
        end if;
    end loop;
end $$;

grant usage on schema saga to saga_client, saga_worker, saga_reader;

-- Services and persons: start, signal, cancel, pause, resume, skip, say a result. They change no journal that is written.
grant select on all tables in schema saga to saga_client;
grant insert on saga.workflows, saga.workflow_instances, saga.tasks, saga.signals, saga.saga_compensations, saga.interventions
   to saga_client;
grant update on saga.workflow_instances, saga.saga_compensations to saga_client;
grant usage on all sequences in schema saga to saga_client;

-- `saga worker`: everything but the tables themselves.
grant select, insert, update, delete on all tables in schema saga to saga_worker;
grant usage, select, update on all sequences in schema saga to saga_worker;

-- `saga list`, `show`, `why`, `plan`, `check --live`, dashboards: payloads included.
grant select on all tables in schema saga to saga_reader;
