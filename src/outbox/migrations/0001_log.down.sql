-- Everything of the log goes, unpublished events included.
drop schema outbox cascade;
