-- Which messages had their effect is forgotten; positions are kept, so only what is delivered at another place counts again.
drop function outbox.rotate_inbox();
drop function outbox.inbox_day(timestamptz);
drop table outbox.inbox_messages;
