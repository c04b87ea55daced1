-- The consumer's side: how far each partition was applied, and what caches remember beside their rows.
create table outbox.positions (
    consumer text not null,
    topic text not null,
    partition integer not null,
    next_offset bigint not null,
    epoch bigint not null default 1,
    owner text not null,
    state text not null default 'running',
    last_event_id text,
    updated_at timestamptz not null default clock_timestamp(),
    primary key (consumer, topic, partition),
    constraint positions_consumer_check check (octet_length(consumer) between 1 and 255),
    constraint positions_partition_check check (partition >= 0),
    constraint positions_next_offset_check check (next_offset >= 0),
    constraint positions_epoch_check check (epoch > 0),
    constraint positions_state_check check (state in ('running', 'recreated', 'needs_rebuild', 'restarting')),
    constraint positions_last_event_id_check check (octet_length(last_event_id) <= 255)
) with (fillfactor = 50);
comment on table outbox.positions is 'Where each consumer stands in Kafka; moved by the transaction that applies the batch, so Kafka''s own committed offset only informs';
comment on column outbox.positions.consumer is 'The consumer group';
comment on column outbox.positions.next_offset is 'The first offset that is not applied; a batch moves it by compare-and-swap';
comment on column outbox.positions.epoch is 'Grows with every claim; a batch of an older epoch changes nothing';
comment on column outbox.positions.owner is 'Host and process of the last claim, for people';
comment on column outbox.positions.state is 'recreated and needs_rebuild stand still until `outbox cache rebuild`, which sets restarting; then the partition is read from its first record on';
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

-- Caches: one row for each table that is fed, and what is known beside its rows. They are named by the table itself, so that
-- two generations of a cache can swap their names and take along what belongs to them.
create table outbox.caches (
    cache regclass primary key,
    name text not null,
    role text not null default 'live',
    consumer text not null,
    topic text not null,
    notifies boolean not null default false,
    complete_log text,
    has_gap boolean not null default false,
    floor_log text,
    floor_xid xid8,
    updated_at timestamptz not null default clock_timestamp(),
    constraint caches_name_role_key unique (name, role) deferrable,
    constraint caches_name_check check (octet_length(name) between 1 and 127),
    constraint caches_role_check check (role in ('live', 'spare')),
    constraint caches_complete_log_check check (complete_log ~ '^[0-9a-f]{1,15}-[0-9a-f]{4}$'),
    constraint caches_floor_check check ((floor_log is null) = (floor_xid is null))
);
comment on table outbox.caches is 'Tables that consumers feed: the live one of each cache, and while it is rebuilt into a new generation a spare one';
comment on column outbox.caches.name is 'The table as the cache is declared; the parker of its parked keys';
comment on column outbox.caches.notifies is 'Whether batches and pages that change rows say so on channel outbox_cache, for processes that remember rows';
comment on column outbox.caches.complete_log is 'The log of which the owner''s pages have been merged from the first key to the last; null where there was no owner';
comment on column outbox.caches.has_gap is 'Events that came before it was fed, or that Kafka had deleted, are missing; only the owner''s pages make up for them';
comment on column outbox.caches.floor_xid is 'Pages whose snapshot has a lower xmin cannot be compared any more with what was forgotten, and are read again';

create function outbox.tell_of_swap() returns trigger language plpgsql volatile as $$
begin
    perform pg_notify('outbox_cache', json_build_object('table', new.cache::oid, 'role', new.role)::text);
    return null;
end $$;
comment on function outbox.tell_of_swap is 'Processes that remember rows forget them when a cache''s table becomes another one';
create trigger caches_tell_of_swap after update of role on outbox.caches
    for each row when (old.role <> new.role) execute function outbox.tell_of_swap();

create function outbox.page_order(p_log_id text, p_snapshot pg_snapshot) returns bigint[]
language sql immutable strict parallel safe as $$
    select array[outbox.log_ordinal(p_log_id), pg_snapshot_xmax(p_snapshot)::text::bigint,
                 -(select count(*) from pg_snapshot_xip(p_snapshot))]
$$;
comment on function outbox.page_order is 'Orders pages: what an earlier one sees, a later one sees too';

create table outbox.pages (
    id bigint generated always as identity primary key,
    cache regclass not null references outbox.caches on delete cascade,
    log_id text not null,
    snapshot pg_snapshot not null,
    place bigint[] not null generated always as (outbox.page_order(log_id, snapshot)) stored,
    merged_at timestamptz not null default clock_timestamp(),
    constraint pages_log_id_check check (log_id ~ '^[0-9a-f]{1,15}-[0-9a-f]{4}$')
);
create index idx_pages_cache_place on outbox.pages (cache, place);
comment on table outbox.pages is 'Pages of the owner that were merged: what their snapshot sees is older than the rows that they wrote';
comment on column outbox.pages.place is 'Among the pages of a cache; see outbox.page_order';

create table outbox.page_ranges (
    page_id bigint primary key references outbox.pages on delete cascade,
    cache regclass not null references outbox.caches on delete cascade,
    after_key text,
    through_key text
);
create index idx_page_ranges_cache on outbox.page_ranges (cache);
comment on table outbox.page_ranges is 'Keys that a page speaks for: one in the range and not in the page did not exist in its snapshot';
comment on column outbox.page_ranges.after_key is 'Exclusive, as text of the key; null from the first key on';
comment on column outbox.page_ranges.through_key is 'Inclusive; null to the last key';

create table outbox.tombstones (
    cache regclass not null,
    key text not null,
    log_id text,
    position bigint,
    transaction_id xid8,
    page_id bigint,
    deleted_at timestamptz not null default clock_timestamp(),
    primary key (cache, key),
    constraint tombstones_log_id_check check (log_id ~ '^[0-9a-f]{1,15}-[0-9a-f]{4}$')
);
comment on table outbox.tombstones is 'Rows that a cache deleted, by what; the cache''s own table keeps no deleted rows, plain SQL would see them';
comment on column outbox.tombstones.log_id is 'With position and transaction_id the deleting event; null from producers without ob-pos, or where a page said so';
comment on column outbox.tombstones.page_id is 'The page of the owner that did not have the key';

create table outbox.rebuilds (
    cache regclass primary key references outbox.caches on delete cascade,
    log_id text,
    after_key text,
    pages bigint not null default 0,
    rows bigint not null default 0,
    changed bigint not null default 0,
    removed bigint not null default 0,
    worker text,
    lease_until timestamptz,
    started_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    finished_at timestamptz
);
comment on table outbox.rebuilds is 'How far the owner''s pages were merged into a table; each page moves it in its own transaction, so that a rebuild can be resumed';
comment on column outbox.rebuilds.after_key is 'The last key of the last page, as text';

-- ---------------------------------------------------------------------------------------------------------------
-- Freshness: the owner's relay says how far it got; a cache is as complete as the oldest of what it has applied.
create table outbox.watermarks (
    consumer text not null,
    log_id text not null,
    shard smallint not null,
    as_of timestamptz not null,
    shard_count smallint not null,
    oldest_xid xid8 not null,
    next_offsets jsonb not null,
    parked bigint[] not null default '{}',
    primary key (consumer, log_id, shard, as_of),
    constraint watermarks_log_id_check check (log_id ~ '^[0-9a-f]{1,15}-[0-9a-f]{4}$'),
    constraint watermarks_shard_check check (shard >= 0 and shard < shard_count)
);
comment on table outbox.watermarks is 'Watermarks received and not applied yet, and the newest applied one of each shard; thinned';
comment on column outbox.watermarks.next_offsets is 'Topic to partition to the offset after all that had committed by as_of';
comment on column outbox.watermarks.parked is 'outbox.key_hash of the keys that the relay has parked';

create table outbox.freshness (
    consumer text not null,
    topic text not null,
    log_id text not null,
    complete_as_of timestamptz not null,
    oldest_xid xid8 not null,
    parked bigint[] not null default '{}',
    is_only_log boolean not null default true,
    updated_at timestamptz not null default clock_timestamp(),
    primary key (consumer, topic)
) with (fillfactor = 50);
comment on table outbox.freshness is 'What a consumer has applied of a topic: everything that had committed by complete_as_of';
comment on column outbox.freshness.complete_as_of is 'Of the owner''s clock, less the allowed clock skew';
comment on column outbox.freshness.is_only_log is 'No event of another log was ever applied, so nothing is there that an adopted database may have lost';
comment on column outbox.freshness.oldest_xid is 'All transactions of the log below it are over and applied';

create function outbox.key_hash(topic text, key text) returns bigint
language sql immutable strict parallel safe as $$
    select ('x' || substr(md5(topic || '/' || key), 1, 16))::bit(64)::bigint
$$;
comment on function outbox.key_hash is 'A key in a list of parked keys; a topic''s name has no slash';

-- ---------------------------------------------------------------------------------------------------------------
create function outbox.supersedes(p_log_id text, p_other_log_id text) returns boolean
language sql immutable parallel safe as $$
    select p_log_id is null or p_other_log_id is null or p_log_id = p_other_log_id
        or outbox.log_ordinal(p_log_id) >= outbox.log_ordinal(p_other_log_id)
$$;
comment on function outbox.supersedes is 'Whether an event of the first log may replace what the second wrote: the higher ordinal wins, arrival decides within one log';

create function outbox.page_sees(p_log_id text, p_snapshot pg_snapshot, p_event_log text, p_transaction_id xid8) returns boolean
language sql immutable parallel safe as $$
    select case when p_event_log = p_log_id then pg_visible_in_snapshot(p_transaction_id, p_snapshot)
                else outbox.log_ordinal(p_log_id) > outbox.log_ordinal(p_event_log) end
$$;
comment on function outbox.page_sees is 'Whether a page of the owner already contains what an event reports; null where the event has no place in a log';

create function outbox.hold_caches(p_names text[], p_consumer text) returns oid[] language plpgsql volatile as $$
begin
    -- 1868724274 is 'obx2'. Batches of a cache share the lock, whoever merges a page or swaps generations has it alone.
    -- The look comes after the lock, with a snapshot of its own.
    perform pg_advisory_xact_lock_shared(1868724274, hashtext(n.name)) from unnest(p_names) n(name) order by n.name;
    return array(select c.cache::oid from outbox.caches c where c.name = any (p_names) and c.consumer = p_consumer
                  order by array_position(p_names, c.name), c.role);
end $$;
comment on function outbox.hold_caches is 'Called first by every batch: the tables of these caches that its consumer feeds, which stay what they are until it ends';

create function outbox.lose_events(p_consumer text, p_topic text, p_fed text[] default '{}') returns setof text
language plpgsql volatile as $$
begin
    -- Pages that were read before may lack the events, so rebuilds under way lose their progress and their worker. Their
    -- rows are locked before those of caches, as by a page.
    update outbox.rebuilds r
       set worker = null, lease_until = null, log_id = null, after_key = null, pages = 0, rows = 0, changed = 0, removed = 0
      from outbox.caches c
     where c.consumer = p_consumer and c.topic = p_topic and c.name <> all (p_fed)
       and r.cache = c.cache and r.finished_at is null;
    return query
        update outbox.caches c set complete_log = null, has_gap = true, updated_at = clock_timestamp()
         where c.consumer = p_consumer and c.topic = p_topic and c.name <> all (p_fed)
        returning c.name;
end $$;
comment on function outbox.lose_events is 'Events of a topic do not reach a consumer''s caches, but those that are named: until the owner''s pages have been merged from then on, they are incomplete; returns their names';

create function outbox.waiting_parkers(p_parkers text[], p_topic text) returns text[] language sql stable
set enable_seqscan = off as $$
    -- One look into the primary key for each, also under a plan that was made when nothing was parked.
    select array(select x.parker from unnest(p_parkers) x(parker)
                  where (select true from outbox.parked_keys k
                          where k.parker = x.parker and k.topic = p_topic order by k.key limit 1))
$$;
comment on function outbox.waiting_parkers is 'Those of these parkers that have parked keys in a topic';

create function outbox.prepare_cache(cache_table regclass) returns void language plpgsql volatile as $$
begin
    -- regclass prints itself quoted and qualified; no text of the caller reaches the statement.
    execute format('alter table %s
        add column if not exists outbox_log text,
        add column if not exists outbox_position bigint,
        add column if not exists outbox_transaction_id xid8,
        add column if not exists outbox_partition integer,
        add column if not exists outbox_offset bigint,
        add column if not exists outbox_page bigint,
        add column if not exists last_synced_at timestamptz not null default now(),
        alter column last_synced_at set default now()', cache_table);
    execute format('comment on column %s.outbox_log is %L', cache_table, 'Log of the last event applied to this row');
    execute format('comment on column %s.outbox_position is %L', cache_table, 'Position of that event in its log');
    execute format('comment on column %s.outbox_transaction_id is %L', cache_table, 'Transaction that wrote that event');
    execute format('comment on column %s.outbox_partition is %L', cache_table, 'Kafka partition that it came from');
    execute format('comment on column %s.outbox_offset is %L', cache_table, 'Its offset there');
    execute format('comment on column %s.outbox_page is %L', cache_table, 'Last page of the owner that wrote this row; see outbox.pages');
    execute format('comment on column %s.last_synced_at is %L', cache_table, 'When an event or a page was last applied to this row');
end $$;
comment on function outbox.prepare_cache is 'Adds the columns that a cache needs; call it in the migration that creates the table';

create function outbox.unprepare_cache(cache_table regclass) returns void language plpgsql volatile as $$
begin
    execute format('alter table %s drop column if exists outbox_log, drop column if exists outbox_position,
        drop column if exists outbox_transaction_id, drop column if exists outbox_partition,
        drop column if exists outbox_offset, drop column if exists outbox_page', cache_table);
    delete from outbox.tombstones where cache = cache_table;
    delete from outbox.caches where cache = cache_table;
end $$;
comment on function outbox.unprepare_cache is 'Takes back what prepare_cache added, but for last_synced_at; for the down migration of a table that stays';

-- ---------------------------------------------------------------------------------------------------------------
-- Generations of a cache: a second table is filled beside the live one, then the two swap their names.
create function outbox.create_generation(p_live regclass, p_name text) returns regclass language plpgsql volatile as $$
declare
    live record;
    made regclass;
    granted record;
begin
    select n.nspname, c.reloptions, c.relpersistence, c.relowner::regrole::text as owner, c.relowner, c.relacl,
           obj_description(c.oid, 'pg_class') as remark
      into strict live from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.oid = p_live;
    execute format('create %s table %I.%I (like %s including all)',
                   case live.relpersistence when 'u' then 'unlogged' else '' end, live.nspname, p_name, p_live);
    made := format('%I.%I', live.nspname, p_name)::regclass;
    if live.reloptions is not null then
        execute format('alter table %s set (%s)', made, array_to_string(live.reloptions, ', '));
    end if;
    execute format('comment on table %s is %L', made, live.remark);
    execute format('alter table %s owner to %s', made, live.owner);
    -- Default privileges may have granted more than the live table grants.
    for granted in
        select distinct a.grantee from pg_class c cross join aclexplode(c.relacl) a
         where c.oid = made and a.grantee <> live.relowner
    loop
        execute format('revoke all on %s from %s', made,
                       case granted.grantee when 0 then 'public' else granted.grantee::regrole::text end);
    end loop;
    for granted in
        select a.grantee, a.privilege_type as privilege, a.is_grantable, null::name as attname
          from aclexplode(live.relacl) a
        union all
        select a.grantee, a.privilege_type, a.is_grantable, t.attname
          from pg_attribute t cross join aclexplode(t.attacl) a where t.attrelid = p_live and not t.attisdropped
    loop
        execute format('grant %s %s on %s to %s %s', granted.privilege,
                       case when granted.attname is not null then format('(%I)', granted.attname) else '' end, made,
                       case granted.grantee when 0 then 'public' else granted.grantee::regrole::text end,
                       case when granted.is_grantable then 'with grant option' else '' end);
    end loop;
    return made;
end $$;
comment on function outbox.create_generation is 'An empty table that can take the place of a cache''s: columns, indexes, constraints, owner, rights';

create function outbox.swap_generations(p_cache text) returns void language plpgsql volatile as $$
declare
    live regclass;
    spare regclass;
    live_name name;
    spare_name name;
    between constant text := 'outbox_swap_' || gen_random_uuid();
begin
    -- The caller holds the cache's lock alone, so that no batch is open that knows the tables by their former names.
    select c.cache into strict live from outbox.caches c where c.name = p_cache and c.role = 'live';
    select c.cache into strict spare from outbox.caches c where c.name = p_cache and c.role = 'spare';
    select c.relname into strict live_name from pg_class c where c.oid = live;
    select c.relname into strict spare_name from pg_class c where c.oid = spare;
    execute format('alter table %s rename to %I', live, between);
    execute format('alter table %s rename to %I', spare, live_name);
    execute format('alter table %s rename to %I', live, spare_name);
    update outbox.caches c set name = between where c.cache = live;
    update outbox.caches c set role = 'live', updated_at = clock_timestamp() where c.cache = spare;
    update outbox.caches c set name = p_cache, role = 'spare', updated_at = clock_timestamp() where c.cache = live;
    -- What waits for a table goes with the table.
    update outbox.parked_keys k set parker = between where k.parker = p_cache;
    update outbox.parked_keys k set parker = p_cache where k.parker = spare_name;
    update outbox.parked_keys k set parker = spare_name where k.parker = between;
    update outbox.parked_events e set parker = between where e.parker = p_cache;
    update outbox.parked_events e set parker = p_cache where e.parker = spare_name;
    update outbox.parked_events e set parker = spare_name where e.parker = between;
    delete from outbox.rebuilds r where r.cache = live;
end $$;
comment on function outbox.swap_generations is 'The spare table of a cache becomes the live one and the other way round; once more swaps back';

create function outbox.drop_generation(p_cache text) returns void language plpgsql volatile as $$
declare
    live regclass;
    spare regclass;
    rename text;
    renames text[];
begin
    select c.cache into strict spare from outbox.caches c where c.name = p_cache and c.role = 'spare';
    select c.cache into strict live from outbox.caches c where c.name = p_cache and c.role = 'live';
    -- Indexes that are alike, in the order of their creation: the live table gets the names that migrations know.
    with indexes as (
        select i.indrelid, i.indexrelid, c.relname, i.indisunique, d.definition,
               row_number() over (partition by i.indrelid, i.indisunique, d.definition order by i.indexrelid) as place
          from pg_index i
          join pg_class c on c.oid = i.indexrelid
         cross join lateral (select regexp_replace(pg_get_indexdef(i.indexrelid), '^.*? USING ', '') as definition) d
         where i.indrelid in (live, spare)
    )
    select array_agg(format('alter index %s rename to %I', l.indexrelid::regclass, s.relname)) into renames
      from indexes l join indexes s using (indisunique, definition, place)
     where l.indrelid = live and s.indrelid = spare and l.relname <> s.relname;
    delete from outbox.parked_events e using pg_class c where c.oid = spare and e.parker = c.relname;
    delete from outbox.parked_keys k using pg_class c where c.oid = spare and k.parker = c.relname;
    delete from outbox.tombstones t where t.cache = spare;
    delete from outbox.caches c where c.cache = spare;
    execute format('drop table %s', spare);
    foreach rename in array coalesce(renames, '{}') loop
        execute rename;
    end loop;
end $$;
comment on function outbox.drop_generation is 'Drops the spare table of a cache with all that is known of it; the indexes of the live one get its names';
