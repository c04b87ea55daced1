-- The log: what services write, what the relay remembers, what waits in parking.
create schema outbox;
comment on schema outbox is 'Sagabox: transactional outbox, its relay and the caches fed from it';

-- ---------------------------------------------------------------------------------------------------------------
-- Identity. One current row; adoption after a restore or promotion adds a new one.
create table outbox.logs (
    log_id text primary key,
    ordinal bigint not null,
    shard_count smallint not null,
    system_identifier bigint not null,
    database_oid oid not null,
    timeline text not null,
    is_current boolean not null default true,
    created_at timestamptz not null default clock_timestamp(),
    constraint logs_log_id_check check (log_id ~ '^[0-9a-f]+-[0-9a-f]{4}$'),
    constraint logs_ordinal_check check (ordinal > 0),
    constraint logs_shard_count_check check (shard_count between 1 and 64)
);
create unique index idx_logs_is_current on outbox.logs (is_current) where is_current;
comment on table outbox.logs is 'Incarnations of the log; exactly one is current';
comment on column outbox.logs.log_id is 'Hexadecimal ordinal and a random suffix, short enough for every record''s header';
comment on column outbox.logs.ordinal is 'Orders incarnations: consumers let the higher one win';
comment on column outbox.logs.timeline is 'WAL timeline on which this incarnation lives; a promoted standby has another';

create function outbox.log_ordinal(log_id text) returns bigint
language sql immutable strict parallel safe as $$
    select ('x' || lpad(split_part(log_id, '-', 1), 16, '0'))::bit(64)::bigint
$$;
comment on function outbox.log_ordinal is 'The ordinal that a log id carries in front of its dash';

create function outbox.identity(out system_identifier bigint, out database_oid oid, out timeline text)
language sql volatile as $$
    select c.system_identifier, d.oid, left(pg_walfile_name(pg_current_wal_lsn()), 8)
      from pg_control_system() c cross join pg_database d where d.datname = current_database()
$$;
comment on function outbox.identity is 'Where this database lives now; the timeline is read from the WAL because the control file lags after a promotion';

create function outbox.open_log(p_shard_count smallint, p_ordinal bigint) returns text
language sql volatile as $$
    insert into outbox.logs (log_id, ordinal, shard_count, system_identifier, database_oid, timeline)
    select to_hex(p_ordinal) || '-' || substr(md5(gen_random_uuid()::text), 1, 4), p_ordinal, p_shard_count,
           i.system_identifier, i.database_oid, i.timeline
      from outbox.identity() i
    returning log_id
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- Events. Insert-only; storage is given back by truncating whole slots.
create sequence outbox.events_position_seq as bigint cache 1;

create table outbox.events (
    position bigint not null default nextval('outbox.events_position_seq'),
    transaction_id xid8 not null default pg_current_xact_id(),
    shard smallint not null,
    slot smallint not null default (extract(epoch from now())::bigint / 3600 % 8),
    topic text not null,
    key text not null,
    event_id uuid not null,
    event_type text not null,
    schema_version smallint not null default 1,
    headers jsonb,
    payload bytea not null,
    created_at timestamptz not null default clock_timestamp(),
    constraint events_topic_check check (topic ~ '^[a-zA-Z0-9._-]{1,249}$' and topic not in ('.', '..')),
    constraint events_key_check check (octet_length(key) between 1 and 1024),
    constraint events_event_type_check check (octet_length(event_type) between 1 and 255),
    constraint events_schema_version_check check (schema_version > 0),
    constraint events_headers_check check (jsonb_typeof(headers) = 'object' and octet_length(headers::text) <= 16384),
    constraint events_payload_check check (octet_length(payload) <= 8388608)
) partition by list (slot);

create table outbox.events_slot_0 partition of outbox.events for values in (0);
create table outbox.events_slot_1 partition of outbox.events for values in (1);
create table outbox.events_slot_2 partition of outbox.events for values in (2);
create table outbox.events_slot_3 partition of outbox.events for values in (3);
create table outbox.events_slot_4 partition of outbox.events for values in (4);
create table outbox.events_slot_5 partition of outbox.events for values in (5);
create table outbox.events_slot_6 partition of outbox.events for values in (6);
create table outbox.events_slot_7 partition of outbox.events for values in (7);

create index idx_events_shard_transaction_id on outbox.events (shard, transaction_id);

comment on table outbox.events is 'The log: one row an event, inserted by the transaction that caused it, never updated';
comment on column outbox.events.position is 'Order within one key, because the insert happens under the lock of the row that the event reports';
comment on column outbox.events.transaction_id is 'The writer; windows and versions are decided by it, never by the position';
comment on column outbox.events.slot is 'Storage rotation, an hour a slot';
comment on column outbox.events.headers is 'The user''s Kafka headers, text to text';

-- ---------------------------------------------------------------------------------------------------------------
create table outbox.topics (
    topic text primary key,
    partition_count integer not null,
    max_message_bytes integer,
    pinned_at timestamptz not null default clock_timestamp(),
    constraint topics_partition_count_check check (partition_count > 0),
    constraint topics_max_message_bytes_check check (max_message_bytes > 0)
);
comment on table outbox.topics is 'Partition counts as first seen: keys keep their partition although a topic grows';
comment on column outbox.topics.max_message_bytes is 'The broker''s limit for this topic, so that emit can refuse what could never be published';

create table outbox.shards (
    shard smallint primary key,
    lease_owner uuid,
    lease_epoch bigint not null default 0,
    lease_until timestamptz,
    done_through bigint not null default 0,
    next_offsets jsonb not null default '{}',
    start_snapshot pg_snapshot not null,
    start_position bigint not null default 0,
    parked_events bigint not null default 0,
    constraint shards_shard_check check (shard between 0 and 63),
    constraint shards_done_through_check check (done_through >= 0)
) with (fillfactor = 50);
comment on table outbox.shards is 'One relay at a time owns a shard; everything it decides is fenced by lease_epoch on this row';
comment on column outbox.shards.done_through is 'The largest n with all windows up to n acknowledged by Kafka; never decreases';
comment on column outbox.shards.next_offsets is 'Topic to partition to the Kafka offset after the newest acknowledged record';
comment on column outbox.shards.start_snapshot is 's1 of the first window of the current log';
comment on column outbox.shards.start_position is 'Where the position sequence stood when the current log began';
comment on column outbox.shards.parked_events is 'Events of this shard that wait in parking; bounded, and counted here because counting rows takes long';

create table outbox.windows (
    shard smallint not null references outbox.shards (shard),
    window_no bigint not null,
    kind text not null default 'log',
    log_id text not null references outbox.logs (log_id),
    s1 pg_snapshot not null,
    s2 pg_snapshot not null,
    after_position bigint not null default 0,
    through_position bigint,
    epoch bigint not null,
    horizon bigint not null,
    logged_at timestamptz not null default clock_timestamp(),
    primary key (shard, window_no),
    constraint windows_window_no_check check (window_no > 0),
    constraint windows_kind_check check (kind in ('log', 'release')),
    constraint windows_positions_check check (after_position >= 0 and through_position > after_position)
);
comment on table outbox.windows is 'What was about to be published: write-ahead record, fence and cursor of the relay';
comment on column outbox.windows.kind is 'log: events in order; release: parked events that name the window, and nothing between its snapshots. Only log windows are a cursor';
comment on column outbox.windows.s1 is 'The window holds what is visible in s2 and was not in s1';
comment on column outbox.windows.horizon is 'Where the position sequence stood: what lies beyond was written later, whatever its transaction id says after a restore';
comment on column outbox.windows.through_position is 'Null: all of (s1, s2] after after_position; else the last position of this page of a backlog';

-- ---------------------------------------------------------------------------------------------------------------
-- Parking: one shape for both sides. parker is 'relay' here and the cache's table on the other side.
create table outbox.parked_keys (
    parker text not null,
    topic text not null,
    key text not null,
    shard smallint,
    partition integer,
    reason text not null,
    detail text not null,
    parked_at timestamptz not null default clock_timestamp(),
    attempts integer not null default 0,
    retry_at timestamptz,
    primary key (parker, topic, key),
    constraint parked_keys_reason_check check (octet_length(reason) between 1 and 255)
);
create index idx_parked_keys_shard_retry_at on outbox.parked_keys (shard, retry_at) where parker = 'relay' and retry_at is not null;
create index idx_parked_keys_parker_retry_at on outbox.parked_keys (parker, topic, partition, retry_at) where retry_at is not null;
comment on table outbox.parked_keys is 'Keys set aside because one of their events cannot be published or applied';
comment on column outbox.parked_keys.retry_at is 'When its events are tried again; null: not by itself. `outbox parked retry` sets it';
comment on column outbox.parked_keys.reason is 'Name of the error, for grouping; detail says the rest';

create table outbox.parked_events (
    id bigint generated always as identity primary key,
    parker text not null,
    topic text not null,
    key text not null,
    state text not null default 'parked',
    log_id text,
    shard smallint,
    window_no bigint,
    ordinal integer,
    position bigint,
    transaction_id xid8,
    partition integer,
    "offset" bigint,
    event_id uuid,
    event_type text,
    schema_version smallint,
    headers jsonb,
    payload bytea,
    created_at timestamptz not null,
    release_window_no bigint,
    release_ordinal integer,
    parked_at timestamptz not null default clock_timestamp(),
    constraint parked_events_release_check check ((release_window_no is null) = (release_ordinal is null)),
    constraint parked_events_state_check check (state in ('parked', 'released', 'discarded'))
);
create index idx_parked_events_parker_topic_key on outbox.parked_events (parker, topic, key, id);
create unique index idx_parked_events_origin on outbox.parked_events (shard, window_no, ordinal) where parker = 'relay';
create unique index idx_parked_events_release on outbox.parked_events (shard, release_window_no, release_ordinal)
    where parker = 'relay' and release_window_no is not null;
create index idx_parked_events_topic_key_position on outbox.parked_events (topic, key, position)
    where parker = 'relay' and state = 'parked';
create index idx_parked_events_over on outbox.parked_events (shard, (coalesce(release_window_no, window_no)))
    where parker = 'relay' and state <> 'parked';
comment on table outbox.parked_events is 'The events of parked keys in order, with where they came from';
comment on column outbox.parked_events.release_window_no is 'The window of kind release that published it after all';
comment on column outbox.parked_events.window_no is 'Origin with ordinal; a replay of that window leaves the event out. A window of kind release where it was refused once more';
comment on column outbox.parked_events.state is 'released and discarded ones keep their origin until no window that they belong to can be replayed';

-- ---------------------------------------------------------------------------------------------------------------
-- Emit.
create function outbox.uuid7() returns uuid language sql volatile as $$
    select encode(
        set_bit(set_bit(
            overlay(uuid_send(gen_random_uuid())
                    placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                    from 1 for 6),
            52, 1), 53, 1), 'hex')::uuid
$$;
comment on function outbox.uuid7 is 'Time-ordered uuid (RFC 9562), for servers without a built-in one';

create function outbox.shard_of(key text, shard_count integer) returns smallint
language sql immutable strict parallel safe as $$
    select case when shard_count = 1 then 0
                else ('x' || substr(md5(key), 1, 7))::bit(28)::int % shard_count end::smallint
$$;
comment on function outbox.shard_of is 'The shard of a key; md5 because hashtext may differ between PostgreSQL versions';

create function outbox.wake(p_shard smallint) returns boolean language plpgsql volatile as $$
begin
    -- 1868724273 is 'obx1'. The lock stays until after the commit is visible, so a relay that cannot get it
    -- exclusively knows that somebody may be about to commit.
    if pg_try_advisory_xact_lock_shared(1868724273, p_shard) then
        return false;
    end if;
    perform pg_notify('outbox_wake', p_shard::text);
    return true;
end $$;
comment on function outbox.wake is 'Called by every emit: notifies only a relay that is idle';

create function outbox.fits(p_payload bytea, p_key text, p_headers jsonb, p_topic text, p_limit integer) returns bytea
language plpgsql immutable parallel safe as $$
declare
    size_bytes constant integer := octet_length(p_payload) + octet_length(p_key)
                                 + coalesce(octet_length(p_headers::text), 0) + 512;
begin
    if size_bytes > coalesce(p_limit, 1000000) then
        raise exception using errcode = 'OB010',
            message = format('event for topic %s needs %s bytes, the topic takes %s', p_topic, size_bytes, coalesce(p_limit, 1000000));
    end if;
    return p_payload;
end $$;
comment on function outbox.fits is 'The payload, or SQLSTATE OB010 where the record (512 bytes of our own headers included) is over the topic''s limit';

create function outbox.emit(
    type text, topic text, key text, payload jsonb,
    headers jsonb default null, schema_version integer default 1, event_id uuid default null
) returns bigint language plpgsql volatile as $$
#variable_conflict use_variable
declare
    body constant bytea := convert_to(payload::text, 'UTF8');
    at bigint;
    its_shard smallint;
begin
    if headers is not null and (jsonb_typeof(headers) <> 'object' or
        exists (select from jsonb_each(headers) h where jsonb_typeof(h.value) <> 'string')) then
        raise exception using errcode = 'OB011', message = 'headers must be a JSON object of strings',
            hint = 'pass jsonb_build_object(''name'', ''text'', ...)';
    end if;
    -- One of ours would be taken for the position or the type that the relay writes.
    if exists (select from jsonb_object_keys(headers) h(name) where h.name ~ '^(ce_|ob-)' or h.name in ('', 'content-type')) then
        raise exception using errcode = 'OB011', message = 'headers named ce_*, ob-*, content-type or nothing are reserved',
            hint = 'choose another name';
    end if;
    its_shard := outbox.shard_of(key, (select l.shard_count from outbox.logs l where l.is_current));
    insert into outbox.events as e (shard, topic, key, event_id, event_type, schema_version, headers, payload)
    values (its_shard, topic, key, coalesce(event_id, outbox.uuid7()), type, schema_version, headers,
            outbox.fits(body, key, headers, topic, (select t.max_message_bytes from outbox.topics t where t.topic = emit.topic)))
    returning e.position into at;
    perform outbox.wake(its_shard);
    return at;
end $$;
comment on function outbox.emit is 'Emits one event from SQL; call it after the write that it reports, never before';

-- ---------------------------------------------------------------------------------------------------------------
-- The relay's transactions. Each locks the shard row first; only statements after that lock decide anything.
create function outbox.window_rows(
    p_shard smallint, p_s1 pg_snapshot, p_s2 pg_snapshot, p_after bigint, p_through bigint
) returns table (
    ordinal bigint, "position" bigint, transaction_id xid8, topic text, key text, event_id uuid, event_type text,
    schema_version smallint, headers jsonb, payload bytea, created_at timestamptz
) language sql stable
set enable_seqscan = off as $$
    -- Two index ranges instead of an OR: rows touched are exactly the rows of the window, whatever the statistics say.
    select row_number() over (order by e.position), e.position, e.transaction_id, e.topic, e.key, e.event_id, e.event_type,
           e.schema_version, e.headers, e.payload, e.created_at
      from (select * from outbox.events r
             where r.shard = p_shard and r.transaction_id >= pg_snapshot_xmax(p_s1)
            union all
            select * from outbox.events r
             where r.shard = p_shard and r.transaction_id = any (array(select pg_snapshot_xip(p_s1)))) e
     where pg_visible_in_snapshot(e.transaction_id, p_s2)
       and e.position > p_after and (p_through is null or e.position <= p_through)
     order by e.position
$$;
comment on function outbox.window_rows is 'The rows of a window in order; the ordinal counts parked ones too';

create function outbox.lock_shard(p_shard smallint, p_epoch bigint) returns outbox.shards
language plpgsql volatile as $$
declare
    s outbox.shards;
    known outbox.logs;
    here record;
begin
    -- Exclusive on purpose: under FOR SHARE a key could be parked between another transaction's look and its write.
    select * into strict s from outbox.shards where shard = p_shard for no key update;
    if s.lease_epoch <> p_epoch then
        raise exception using errcode = 'OB001',
            message = format('shard %s belongs to epoch %s, not %s', p_shard, s.lease_epoch, p_epoch);
    end if;
    select * into strict known from outbox.logs where is_current;
    select * into strict here from outbox.identity();
    if (known.system_identifier, known.database_oid, known.timeline)
       is distinct from (here.system_identifier, here.database_oid, here.timeline) then
        raise exception using errcode = 'OB002',
            message = format('log %s belongs to another database', known.log_id),
            hint = 'see: outbox adopt --help';
    end if;
    return s;
end $$;
comment on function outbox.lock_shard is 'The lock under which logging, parking and releasing happen; OB001 when fenced, OB002 when restored';

create function outbox.log_window(
    p_shard smallint, p_epoch bigint, p_done_through bigint, p_next_offsets jsonb,
    p_window_no bigint, p_s1 pg_snapshot, p_s2 pg_snapshot, p_after bigint, p_through bigint, p_parked_max bigint default null
) returns bigint[] language plpgsql volatile as $$
declare
    s outbox.shards;
    diverted bigint[] := '{}';
begin
    -- Published implies durable: this commit must not be lost by a crash after the records are in Kafka.
    perform set_config('synchronous_commit', 'on', true);
    s := outbox.lock_shard(p_shard, p_epoch);
    insert into outbox.windows (shard, window_no, log_id, s1, s2, after_position, through_position, epoch, horizon)
    select p_shard, p_window_no, l.log_id, p_s1, p_s2, p_after, p_through, p_epoch, q.last_value
      from outbox.logs l cross join outbox.events_position_seq q where l.is_current;
    if exists (select from outbox.parked_keys k where k.parker = 'relay' and k.shard = p_shard) then
        with moved as (
            insert into outbox.parked_events (parker, topic, key, log_id, shard, window_no, ordinal, position, transaction_id,
                                              event_id, event_type, schema_version, headers, payload, created_at)
            select 'relay', r.topic, r.key, l.log_id, p_shard, p_window_no, r.ordinal, r.position, r.transaction_id,
                   r.event_id, r.event_type, r.schema_version, r.headers, r.payload, r.created_at
              from outbox.window_rows(p_shard, p_s1, p_s2, p_after, p_through) r
              join outbox.parked_keys k on k.parker = 'relay' and k.topic = r.topic and k.key = r.key
              cross join (select log_id from outbox.logs where is_current) l
             order by r.ordinal
            returning position
        )
        select coalesce(array_agg(position), '{}') into diverted from moved;
        perform outbox.count_parked(p_shard, cardinality(diverted), p_parked_max);
    end if;
    perform outbox.mark_done(p_shard, p_done_through, p_next_offsets);
    return diverted;
end $$;
comment on function outbox.log_window is 'Logs a window and diverts rows of parked keys; returns the positions not to publish';

create function outbox.mark_done(p_shard smallint, p_done_through bigint, p_next_offsets jsonb) returns void
language sql volatile as $$
    -- next_offsets: topic -> partition -> offset, merged two levels deep.
    update outbox.shards s
       set done_through = greatest(s.done_through, p_done_through),
           next_offsets = s.next_offsets || coalesce((
               select jsonb_object_agg(t.key, coalesce(s.next_offsets -> t.key, '{}') || t.value)
                 from jsonb_each(p_next_offsets) t), '{}')
     where s.shard = p_shard and (p_done_through > s.done_through or p_next_offsets <> '{}')
$$;

create function outbox.log_done(p_shard smallint, p_epoch bigint, p_done_through bigint, p_next_offsets jsonb) returns void
language plpgsql volatile as $$
begin
    perform outbox.lock_shard(p_shard, p_epoch);
    perform outbox.mark_done(p_shard, p_done_through, p_next_offsets);
end $$;
comment on function outbox.log_done is 'Moves done_through where no later window does it on its way';

create function outbox.count_parked(p_shard smallint, p_change integer, p_max bigint default null) returns void
language plpgsql volatile as $$
declare
    waiting bigint;
begin
    -- The caller holds the shard row. That somebody deleted rows by hand must not stop a relay: never below zero.
    update outbox.shards set parked_events = greatest(parked_events + p_change, 0)
     where shard = p_shard and p_change <> 0
    returning parked_events into waiting;
    if p_change > 0 and waiting > p_max then
        raise exception using errcode = 'OB003',
            message = format('shard %s would have %s parked events, and may have %s', p_shard, waiting, p_max);
    end if;
end $$;
comment on function outbox.count_parked is 'Counts what a shard has parked; OB003 past the bound, so that nothing is parked';

create function outbox.park(
    p_shard smallint, p_epoch bigint, p_topic text, p_key text, p_window_no bigint, p_ordinal bigint,
    p_reason text, p_detail text, p_parked_max bigint default null
) returns bigint language plpgsql volatile as $$
declare
    its_kind text;
    moved integer;
begin
    perform set_config('synchronous_commit', 'on', true);
    perform outbox.lock_shard(p_shard, p_epoch);
    select w.kind into its_kind from outbox.windows w where w.shard = p_shard and w.window_no = p_window_no;
    -- Refused once more: what is left of the key waits for a person again.
    insert into outbox.parked_keys as k (parker, topic, key, shard, reason, detail, attempts)
    values ('relay', p_topic, p_key, p_shard, p_reason, p_detail, (its_kind is not distinct from 'release')::integer)
    on conflict (parker, topic, key) do update
       set reason = excluded.reason, detail = excluded.detail, attempts = k.attempts + 1, retry_at = null
     where excluded.attempts > 0;
    insert into outbox.parked_events (parker, topic, key, log_id, shard, window_no, ordinal, position, transaction_id,
                                      event_id, event_type, schema_version, headers, payload, created_at)
    select 'relay', r.topic, r.key, w.log_id, p_shard, w.window_no, r.ordinal, r.position, r.transaction_id,
           r.event_id, r.event_type, r.schema_version, r.headers, r.payload, r.created_at
      from outbox.windows w
     cross join lateral (
            select * from outbox.window_rows(w.shard, w.s1, w.s2, w.after_position, w.through_position) l where w.kind = 'log'
             union all
            select * from outbox.release_rows(w.shard, w.window_no) l where w.kind = 'release') r
     where w.shard = p_shard and w.window_no >= p_window_no
       and r.topic = p_topic and r.key = p_key and (w.window_no > p_window_no or r.ordinal >= p_ordinal)
     order by w.window_no, r.ordinal
    on conflict (shard, window_no, ordinal) where parker = 'relay' do nothing;
    get diagnostics moved = row_count;
    perform outbox.count_parked(p_shard, moved, p_parked_max);
    return (select w.window_no from outbox.windows w where w.shard = p_shard order by w.window_no desc limit 1);
end $$;
comment on function outbox.park is 'Parks a key from one record on: that record and the key''s later rows of all logged windows; returns the last of those windows';

create function outbox.release_rows(p_shard smallint, p_window_no bigint) returns table (
    ordinal bigint, "position" bigint, transaction_id xid8, topic text, key text, event_id uuid, event_type text,
    schema_version smallint, headers jsonb, payload bytea, created_at timestamptz
) language sql stable as $$
    select e.release_ordinal, e.position, e.transaction_id, e.topic, e.key, e.event_id, e.event_type, e.schema_version,
           e.headers, e.payload, e.created_at
      from outbox.parked_events e
     where e.parker = 'relay' and e.shard = p_shard and e.release_window_no = p_window_no
$$;
comment on function outbox.release_rows is 'The rows of a window of kind release';

create function outbox.log_release(
    p_shard smallint, p_epoch bigint, p_done_through bigint, p_next_offsets jsonb,
    p_window_no bigint, p_max_events integer, p_max_bytes bigint
) returns integer language plpgsql volatile as $$
declare
    its_log text;
    due record;
    found record;
    taken integer := 0;
    bytes bigint := 0;
begin
    perform set_config('synchronous_commit', 'on', true);
    perform outbox.lock_shard(p_shard, p_epoch);
    select l.log_id into strict its_log from outbox.logs l where l.is_current;
    for due in
        select k.topic, k.key from outbox.parked_keys k
         where k.parker = 'relay' and k.shard = p_shard and k.retry_at <= now()
         order by k.retry_at, k.topic, k.key limit p_max_events
    loop
        -- By position: what was refused for a second time came back later than what is to follow it.
        -- Of a retired log every snapshot of the current one sees the transactions: 3 says so.
        with first as (
            select e.id, row_number() over w as place, sum(octet_length(e.payload)) over w as through_bytes
              from (select p.id, p.position, p.payload from outbox.parked_events p
                     where p.parker = 'relay' and p.topic = due.topic and p.key = due.key and p.state = 'parked'
                     order by p.position limit p_max_events - taken) e
            window w as (order by e.position)
        ), moved as (
            update outbox.parked_events e
               set state = 'released', release_window_no = p_window_no, release_ordinal = taken + f.place,
                   transaction_id = case when e.log_id = its_log then e.transaction_id else '3' end
              from first f
             where e.id = f.id and (bytes + f.through_bytes <= p_max_bytes or taken + f.place = 1)
            returning octet_length(e.payload) as size
        )
        select count(*) as events, coalesce(sum(m.size), 0) as bytes into found from moved m;
        taken := taken + found.events;
        bytes := bytes + found.bytes;
        exit when exists (select from outbox.parked_events p
                           where p.parker = 'relay' and p.topic = due.topic and p.key = due.key and p.state = 'parked');
        delete from outbox.parked_keys k where k.parker = 'relay' and k.topic = due.topic and k.key = due.key;
        exit when taken = p_max_events;
    end loop;
    if taken > 0 then
        -- Between its snapshots lies nothing: it is no part of the log, and no cursor.
        insert into outbox.windows (shard, window_no, kind, log_id, s1, s2, epoch, horizon)
        select p_shard, p_window_no, 'release', its_log, n.snapshot, n.snapshot, p_epoch, q.last_value
          from (select pg_current_snapshot() as snapshot) n cross join outbox.events_position_seq q;
    end if;
    perform outbox.count_parked(p_shard, -taken);
    perform outbox.mark_done(p_shard, p_done_through, p_next_offsets);
    return taken;
end $$;
comment on function outbox.log_release is 'Logs a window of parked events whose keys are to be tried again, first come first; returns how many. A key is free once its last one is in a window';

create function outbox.discard_parked(p_topic text, p_key text) returns bigint language plpgsql volatile as $$
declare
    its_shard smallint;
    gone integer;
begin
    select k.shard into its_shard from outbox.parked_keys k where k.parker = 'relay' and k.topic = p_topic and k.key = p_key;
    -- The lock under which windows are logged: each later one finds the key parked, and its rows among what is discarded,
    -- or finds it free.
    perform from outbox.shards s where s.shard = its_shard for no key update;
    delete from outbox.parked_keys k where k.parker = 'relay' and k.topic = p_topic and k.key = p_key and k.shard = its_shard;
    if not found then
        return null;
    end if;
    update outbox.parked_events e set state = 'discarded'
     where e.parker = 'relay' and e.topic = p_topic and e.key = p_key and e.state = 'parked';
    get diagnostics gone = row_count;
    perform outbox.count_parked(its_shard, -gone);
    return gone;
end $$;
comment on function outbox.discard_parked is 'Gives up a key''s waiting events and frees the key; returns how many they were, null where it is not parked';

-- ---------------------------------------------------------------------------------------------------------------
select outbox.open_log(1::smallint, (extract(epoch from clock_timestamp()) * 1000)::bigint);
insert into outbox.shards (shard, start_snapshot) values (0, pg_current_snapshot());
