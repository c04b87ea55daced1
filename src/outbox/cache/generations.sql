-- Generations of a cache: making, swapping and dropping a second table. Reads the catalogue, and outbox.caches by key.

-- name: found
-- The tables of cache $1, with what a rebuild has done to each. Rows: at most two.
select c.cache::oid as oid, c.role, r.relname as name, b.cache is not null as rebuilding, b.finished_at
  from outbox.caches c
  join pg_class r on r.oid = c.cache
  left join outbox.rebuilds b on b.cache = c.cache
 where c.name = $1

-- name: dependents
-- What hangs on table $1 itself, and would stay with it when it gives up its name. Rows: those things, at most 20.
select d.what from (
    select pg_describe_object(p.classid, p.objid, 0) as what
      from pg_depend p
      left join pg_rewrite v on p.classid = 'pg_rewrite'::regclass and v.oid = p.objid
     where p.deptype = 'n'
       and (p.refclassid = 'pg_class'::regclass and p.refobjid = $1::oid
            or p.refclassid = 'pg_type'::regclass
               and p.refobjid in (select t.oid from pg_type t where t.typrelid = $1::oid
                                  union all
                                  select t.typarray from pg_type t where t.typrelid = $1::oid))
       and p.objid <> $1::oid
       and not exists (select from pg_constraint o
                        where p.classid = 'pg_constraint'::regclass and o.oid = p.objid)
       and not exists (select from pg_attrdef a
                        where p.classid = 'pg_attrdef'::regclass and a.oid = p.objid and a.adrelid = $1::oid)
       and not exists (select from pg_index i
                        where p.classid = 'pg_class'::regclass and i.indexrelid = p.objid and i.indrelid = $1::oid)
    union
    select pg_describe_object('pg_constraint'::regclass, o.oid, 0) from pg_constraint o
     where o.contype = 'f' and $1::oid in (o.conrelid, o.confrelid)
    union
    select pg_describe_object('pg_trigger'::regclass, t.oid, 0) from pg_trigger t
     where t.tgrelid = $1::oid and not t.tgisinternal
    union
    select pg_describe_object('pg_policy'::regclass, o.oid, 0) from pg_policy o where o.polrelid = $1::oid
    union
    select pg_describe_object('pg_rewrite'::regclass, v.oid, 0) from pg_rewrite v where v.ev_class = $1::oid
    union
    select 'publication ' || b.pubname from pg_publication_rel q join pg_publication b on b.oid = q.prpubid
     where q.prrelid = $1::oid
    union
    select 'partitions or inheritance' from pg_inherits i where $1::oid in (i.inhrelid, i.inhparent)
    union
    select 'partitions or inheritance' from pg_class c where c.oid = $1::oid and c.relkind = 'p'
    union
    select 'row level security' from pg_class c where c.oid = $1::oid and c.relrowsecurity
    union
    select 'sequence ' || p.objid::regclass from pg_depend p join pg_class s on s.oid = p.objid and s.relkind = 'S'
     where p.classid = 'pg_class'::regclass and p.refclassid = 'pg_class'::regclass and p.refobjid = $1::oid
       and p.deptype = 'a') d
 order by d.what limit 20

-- name: taken
-- Whether a table, view or index beside table $1 has the name $2 already. One row.
select exists (select from pg_class c join pg_class l on l.relnamespace = c.relnamespace
                where l.oid = $1::oid and c.relname = $2)

-- name: make
-- An empty table beside table $1, called $2. Locks: the live table against changes of its columns.
select outbox.create_generation($1::oid::regclass, $2)::oid

-- name: register
-- From its commit on every batch of cache $1 goes into table $2, too. The caller holds the cache's lock alone. Rows: 1.
insert into outbox.caches (cache, name, role, consumer, topic, notifies)
select $2::oid, c.name, 'spare', c.consumer, c.topic, c.notifies from outbox.caches c where c.name = $1 and c.role = 'live'

-- name: filling
-- That table $1 waits for its pages. Rows: 1 of rebuilds.
insert into outbox.rebuilds (cache) values ($1::oid)

-- name: lock_alone
-- Waits for the open batches of cache $1, while later ones wait; until the transaction ends. See outbox.hold_caches.
select pg_advisory_xact_lock(1868724274, hashtext($1))

-- name: be_short
-- No wait of this transaction may be longer than $1 milliseconds: readers wait behind it.
select set_config('lock_timeout', $1, true)

-- name: swap
-- Locks: both tables, exclusively. Rows: two of caches, what is parked for either table.
select outbox.swap_generations($1)

-- name: drop
-- Locks: the spare table, exclusively, and indexes of the live one. Rows: what is known of the spare table.
select outbox.drop_generation($1)

-- name: now
-- The transaction before which everything that fills a generation is over.
select pg_snapshot_xmin(pg_current_snapshot())::text

-- name: older
-- Processes whose snapshot may be older than transaction $1, and so would not see rows of the new table. Without the right
-- to read all statistics only those of this role are seen. Rows: connections.
select a.pid from pg_stat_activity a
 where a.datname = current_database() and a.pid <> pg_backend_pid() and a.backend_xmin is not null
   and age(a.backend_xmin) > age($1::text::xid8::xid)
