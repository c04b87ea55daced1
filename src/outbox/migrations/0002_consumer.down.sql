-- Caches keep their rows; how far they were applied is forgotten, so a later consumer reads its topics from the start.
drop function outbox.unprepare_cache(regclass);
drop function outbox.prepare_cache(regclass);
drop function outbox.hold_caches(text[]);
drop function outbox.page_sees(text, pg_snapshot, text, xid8);
drop function outbox.page_order(text, pg_snapshot);
drop function outbox.supersedes(text, text);
drop function outbox.key_hash(text, text);
drop table outbox.freshness;
drop table outbox.watermarks;
drop table outbox.rebuilds;
drop table outbox.tombstones;
drop table outbox.page_ranges;
drop table outbox.pages;
drop table outbox.caches;
drop table outbox.applied;
drop table outbox.positions;
delete from outbox.parked_events where parker <> 'relay';
delete from outbox.parked_keys where parker <> 'relay';
