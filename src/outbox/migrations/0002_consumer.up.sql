-- The consumer's side: how far each partition was applied, and what caches remember beside their rows.
create table outbox.positions (
    consumer text not null,
    topic text not null,
    partition integer not null,
    next_offset bigint not null,
    epoch bigint not null default 1,
    owner text not null,
    last_event_id text,
    updated_at timestamptz not null default clock_timestamp(),
    primary key (consumer, topic, partition),
    constraint positions_consumer_check check (octet_length(consumer) between 1 and 255),
    constraint positions_partition_check check (partition >= 0),
    constraint positions_next_offset_check check (next_offset >= 0),
    constraint positions_epoch_check check (epoch > 0),
    constraint positions_last_event_id_check check (octet_length(last_event_id) <= 255)
) with (fillfactor = 50);
comment on table outbox.positions is 'Where each consumer stands in Kafka; moved by the transaction that applies the batch, so Kafka''s own committed offset only informs';
comment on column outbox.positions.consumer is 'The consumer group';
comment on column outbox.positions.next_offset is 'The first offset that is not applied; a batch moves it by compare-and-swap';
comment on column outbox.positions.epoch is 'Grows with every claim; a batch of an older epoch changes nothing';
comment on column outbox.positions.owner is 'Host and process of the last claim, for people';
comment on column outbox.positions.last_event_id is 'ce_id of the record before next_offset; another one there means that the topic was re-created';

create table outbox.applied (
    consumer text not null,
    topic text not null,
    partition integer not null,
    log_id text not null,
    shard smallint not null,
    window_no bigint not null,
    ordinal bigint not null,
    primary key (consumer, topic, partition, log_id, shard),
    foreign key (consumer, topic, partition) references outbox.positions on delete cascade,
    constraint applied_log_id_check check (log_id ~ '^[0-9a-f]{1,15}-[0-9a-f]{4}$'),
    constraint applied_mark_check check (shard >= 0 and window_no >= 0 and ordinal >= 0)
) with (fillfactor = 50);
comment on table outbox.applied is 'How far each relay''s log was applied: records at or below (window_no, ordinal) are duplicates';
comment on column outbox.applied.window_no is 'With ordinal, the highest ob-pos applied of this log and shard; never decreases';

create table outbox.tombstones (
    cache text not null,
    key text not null,
    log_id text,
    position bigint,
    transaction_id xid8,
    deleted_at timestamptz not null default clock_timestamp(),
    primary key (cache, key),
    constraint tombstones_cache_check check (octet_length(cache) between 1 and 255),
    constraint tombstones_log_id_check check (log_id ~ '^[0-9a-f]{1,15}-[0-9a-f]{4}$')
);
comment on table outbox.tombstones is 'Rows that a cache deleted, by what; the cache''s own table keeps no deleted rows, plain SQL would see them';
comment on column outbox.tombstones.cache is 'The cache''s table, as declared';
comment on column outbox.tombstones.log_id is 'With position and transaction_id the deleting event; null from producers without ob-pos';

create function outbox.supersedes(p_log_id text, p_other_log_id text) returns boolean
language sql immutable parallel safe as $$
    select p_log_id is null or p_other_log_id is null or p_log_id = p_other_log_id
        or outbox.log_ordinal(p_log_id) >= outbox.log_ordinal(p_other_log_id)
$$;
comment on function outbox.supersedes is 'Whether an event of the first log may replace what the second wrote: the higher ordinal wins, arrival decides within one log';

create function outbox.prepare_cache(cache_table regclass) returns void language plpgsql volatile as $$
begin
    -- regclass prints itself quoted and qualified; no text of the caller reaches the statement.
    execute format('alter table %s
        add column if not exists outbox_log text,
        add column if not exists outbox_position bigint,
        add column if not exists outbox_transaction_id xid8,
        add column if not exists last_synced_at timestamptz not null default now(),
        alter column last_synced_at set default now()', cache_table);
    execute format('comment on column %s.outbox_log is %L', cache_table, 'Log of the last event applied to this row');
    execute format('comment on column %s.outbox_position is %L', cache_table, 'Position of that event in its log');
    execute format('comment on column %s.outbox_transaction_id is %L', cache_table, 'Transaction that wrote that event');
    execute format('comment on column %s.last_synced_at is %L', cache_table, 'When an event was last applied to this row');
end $$;
comment on function outbox.prepare_cache is 'Adds the columns that a cache needs; call it in the migration that creates the table';

create function outbox.unprepare_cache(cache_table regclass) returns void language plpgsql volatile as $$
begin
    execute format('alter table %s drop column if exists outbox_log, drop column if exists outbox_position,
        drop column if exists outbox_transaction_id', cache_table);
end $$;
comment on function outbox.unprepare_cache is 'Takes back what prepare_cache added, but for last_synced_at; for the down migration of a table that stays';
