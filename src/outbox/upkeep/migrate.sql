-- The migrations' bookkeeping. The statements without parameters, and `record` and `forget` with theirs filled in, are
-- also what `outbox migrate sql` prints, so both ways leave the same database.

-- name: lock
-- Waits for any other migrator of any package; held to the end of the transaction. 32476718965092216 is 'sagabox'.
select pg_advisory_xact_lock(32476718965092216)

-- name: session
-- What `configure` is about to change. No table.
select current_setting('lock_timeout') as lock_timeout, current_setting('statement_timeout') as statement_timeout,
       current_setting('search_path') as search_path

-- name: configure
-- To the end of the transaction. An empty search_path makes an unqualified name in a migration fail at once.
select set_config('lock_timeout', $1, true), set_config('statement_timeout', $2, true), set_config('search_path', $3, true)

-- name: exists
-- Reads the catalogue only, so it cannot fail in the caller's transaction.
select to_regclass('sagabox.migrations') is not null

-- name: history
-- By primary key; as many rows as the package has migrations.
select m.number, m.name, m.checksum, m.applied_at
  from sagabox.migrations m where m.package = $1 order by m.number

-- name: create_schema
create schema if not exists sagabox

-- name: create_table
-- Outside schema outbox, because it must survive `down` of the migration that drops that schema.
create table if not exists sagabox.migrations (
    package text not null,
    number integer not null,
    name text not null,
    checksum text not null,
    applied_at timestamptz not null default clock_timestamp(),
    primary key (package, number),
    constraint migrations_number_check check (number > 0),
    constraint migrations_checksum_check check (checksum ~ '^[0-9a-f]{64}$')
)

-- name: comment_schema
comment on schema sagabox is 'Sagabox: which of its migrations this database has'

-- name: comment_table
comment on table sagabox.migrations is 'Applied migrations; written by the migration''s own transaction'

-- name: comment_checksum
comment on column sagabox.migrations.checksum is 'SHA-256 of the up file as it was applied'

-- name: grant_schema
-- Services that may not migrate still check at start-up that the database has what they need.
grant usage on schema sagabox to public

-- name: grant_table
grant select on sagabox.migrations to public

-- name: record
-- One row.
insert into sagabox.migrations (package, number, name, checksum) values ($1, $2, $3, $4)

-- name: forget
-- One row, by primary key.
delete from sagabox.migrations where package = $1 and number = $2

-- name: tidy
-- With the last migration of the last package the bookkeeping goes too; a schema that holds anything else stays.
do $$
begin
    if exists (select from sagabox.migrations) then
        return;
    end if;
    drop table sagabox.migrations;
    begin
        drop schema sagabox restrict;
    exception when dependent_objects_still_exist then
        raise notice 'schema sagabox holds objects of others and stays';
    end;
end $$
