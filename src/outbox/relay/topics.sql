-- name: known
-- Rows: topics of the service.
select topic, partition_count, max_message_bytes from outbox.topics

-- name: pin
-- First come, first served; whoever lost the race reads the winner's count afterwards. Rows: 1.
insert into outbox.topics (topic, partition_count, max_message_bytes) values ($1, $2, $3) on conflict (topic) do nothing
