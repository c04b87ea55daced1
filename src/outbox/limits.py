"""Every bound of the package in one place; one that a user may move is the default of a field of `settings`."""

from typing import Final

# One event, checked when it is emitted, in the caller's transaction.
TOPIC_MAX_CHARACTERS: Final = 249
KEY_MAX_BYTES: Final = 1_024
EVENT_TYPE_MAX_BYTES: Final = 255
HEADERS_MAX_BYTES: Final = 16_384
RECORD_MAX_BYTES: Final = 1_000_000
"""Payload, key and headers together, where the topic's own limit is not known; Kafka's default limit is 1,048,588."""
EVENT_ID_MAX_CHARACTERS: Final = 60
RECORD_OVERHEAD_BYTES: Final = 512
"""Our own headers and the framing of a batch of one."""

# One transaction.
EMIT_MAX_EVENTS: Final = 100_000
RECEIPT_MAX_KEYS: Final = 100

# The relay.
WINDOW_MAX_EVENTS: Final = 2_500
WINDOWS_IN_FLIGHT: Final = 2
BATCH_MAX_BYTES: Final = 900_000
WINDOWS_KEPT: Final = 10_000
"""Done windows that stay for people to look at; the relay itself needs the newest only."""
WINDOW_MAX_BYTES: Final = 8_388_608
BACKLOG_MAX_SECONDS: Final = 60.0
"""How long one snapshot is paged through before another one goes on: an old snapshot keeps VACUUM from its work."""
RELAY_PARKED_MAX_EVENTS: Final = 1_000_000
"""Parked events of one shard; rather than park one more, the shard stands still loudly."""
RELAY_PARKED_FORGET_EVENTS: Final = 5_000
"""Released and discarded events deleted at a time."""
TOPICS_LOOK_SECONDS: Final = 60.0
"""Between two looks whether topics have the partition counts that are pinned."""
GUARD_MAX_RECORDS: Final = 10_000_000
"""Records read by the restore guard before it gives up loudly."""
WATERMARK_MAX_PARKED: Final = 1_000
"""Parked keys that a watermark names; while a shard has more, its caches do not get fresher."""

# Consumers.
CONSUMER_MAX_RECORDS: Final = 4_000
BATCHES_IN_FLIGHT: Final = 3
"""Batches that one consumer applies, or that wait for the one before them in their partition, while it polls."""
SLOW_BATCH_SECONDS: Final = 2.0
"""While so many are open and none ends in this time, those that wait behind another one of their partition give way."""
FETCH_PARTITION_BYTES: Final = 262_144
"""As they are stored, compressed; a batch of the relay that is larger is fetched whole."""
PARKED_MAX_EVENTS: Final = 100_000
"""Parked events of one cache; one more stops its partition loudly."""
PARKED_RETRY_ATTEMPTS: Final = 12
"""After so many failures, some forty minutes, a parked key of a cache or inbox waits for a person."""
PARKED_RETRY_FIRST_SECONDS: Final = 1.0
PARKED_RETRY_MAX_SECONDS: Final = 600.0
PARKED_LOOK_SECONDS: Final = 1.0
"""Between two looks for parked keys that are due."""
RETRY_MAX_KEYS: Final = 100
"""Parked keys of one cache or inbox tried in one transaction, while a partition's batches wait."""
RETRY_MAX_EVENTS: Final = 1_000
"""Parked events of one key tried at a time."""
RETRY_TURN_SECONDS: Final = 1.0
PARKED_DETAIL_MAX_CHARACTERS: Final = 2_000
GET_MANY_MAX_KEYS: Final = 10_000
WAIT_POLL_MIN_SECONDS: Final = 0.005
WAIT_POLL_MAX_SECONDS: Final = 0.050
SESSION_TIMEOUT_SECONDS: Final = 10.0
REBALANCE_TIMEOUT_SECONDS: Final = 30.0
"""How long the brokers wait for the members of a group when partitions move."""
FETCH_WAIT_SECONDS: Final = 0.1
LAST_RECORD_TIMEOUT_SECONDS: Final = 10.0
"""For reading the last applied record again; where it is gone, Kafka never answers."""
HALTED_LOOK_SECONDS: Final = 2.0
"""Between two looks of a partition that stands still at whether it may go on."""
WATERMARKS_READ_AT_START: Final = 1_000
WATERMARKS_PENDING_MAX: Final = 64
"""Of a shard, waiting to be applied; of more, every other one is dropped."""
FORGET_EVERY_SECONDS: Final = 10.0
FORGET_AFTER_SECONDS: Final = 60.0
"""What pages and deletions left behind stays this long at least."""
FORGET_MAX_ROWS: Final = 5_000
"""Pages and deletions dropped at a time, while the cache's batches wait."""
COMMIT_EVERY_SECONDS: Final = 5.0
"""Between two advisory commits of offsets to Kafka."""
BATCH_TIMEOUT_SECONDS: Final = 120.0
"""How long one batch may take in all, waiting for a connection included, before it is read again."""
BATCH_IDLE_SECONDS: Final = 15
"""How long a batch's transaction may stand still, in a frozen process, before PostgreSQL ends it."""

INBOX_ROTATION_SECONDS: Final = 600.0
"""Between two looks whether old message ids are to be forgotten."""
INBOX_ROTATION_AGAIN_SECONDS: Final = 15.0
"""After a look that found their table in use."""

# Memory in front of caches.
MEMORY_MAX_ROWS: Final = 10_000_000
"""Of one cache and process; a slip of the pen beyond."""
MEMORY_ROW_SECONDS: Final = 60.0
"""How old a remembered row may be, whatever fails."""
MEMORY_ABSENT_SECONDS: Final = 1.0
"""How long it is remembered that a key is absent."""
MEMORY_CHECK_SECONDS: Final = 5.0
"""Between two looks at whether the connection that listens still lives, and for the answer."""
NOTIFY_MAX_BYTES: Final = 7_999
"""PostgreSQL's bound of a notification."""

# Explaining.
EXPLAIN_RECORDS: Final = 100_000
"""The newest records of a partition, where nobody asks for others."""
EXPLAIN_SECONDS: Final = 120.0
"""For reading them."""
EXPLAIN_BEYOND_SECONDS: Final = 2.0
"""For records that were applied and are behind the end that Kafka tells."""
EXPLAIN_PAGES: Final = 1_000
EXPLAIN_PARTITIONS: Final = 100_000

# Owners of caches.
OWNER_PAGE_ROWS: Final = 5_000
"""Rows of a page, where nobody asks for fewer."""
OWNER_PAGE_MAX_ROWS: Final = 50_000
OWNER_PAGE_MAX_BYTES: Final = 16_777_216
"""Of the rows as JSON; a page that would be larger has fewer rows."""
OWNER_ANSWER_MAX_BYTES: Final = 67_108_864
"""Read from an owner over HTTP before it is given up."""
OWNER_KEYS_MAX: Final = 10_000
"""Keys in one question that an owner answers."""
OWNER_KEYS_ASKED: Final = 100
"""Keys in one question that a cache asks."""
OWNER_LOCKED_SECONDS: Final = 2.0
"""For an answer that a cache's batches wait for."""
OWNER_ASKED_AT_ONCE: Final = 16
"""Questions at a time to an owner that takes one key each, for rows that are stale."""
OWNER_TIMEOUT_SECONDS: Final = 10.0
"""For one answer over HTTP."""
OWNER_RETRY_SECONDS: Final = 30.0
"""How long a page is asked for again while an owner does not answer."""
OWNER_SCAN_SECONDS: Final = 600.0
"""For a statement that may read all rows of an owner or a cache."""

# Rebuilding and reconciling.
REBUILD_LEASE_SECONDS: Final = 15.0
"""How long a rebuild belongs to a process without a sign of life."""
BOOTSTRAP_LOOK_SECONDS: Final = 60.0
"""Between two looks of a consumer at whether its caches hold all of their owner's present log."""
SWAP_LOCK_SECONDS: Final = 0.25
"""How long a swap of generations may make readers wait before it gives way and tries again."""
SWAP_TRY_SECONDS: Final = 120.0
RECONCILE_GRACE_SECONDS: Final = 5.0
"""Between two looks at a row that differs: what is on its way arrives meanwhile."""
RECONCILE_LISTED: Final = 1_000
"""Drifted keys that a report names."""

# Waiting.
CONNECT_TIMEOUT_SECONDS: Final = 10.0
STATEMENT_TIMEOUT_SECONDS: Final = 30.0
CURSOR_TIMEOUT_SECONDS: Final = 300.0
"""The first page of a cursor may have to sort a whole backlog."""
PUBLISH_TIMEOUT_SECONDS: Final = 30.0
DRAIN_TIMEOUT_SECONDS: Final = 10.0
BACKOFF_MAX_SECONDS: Final = 30.0

# Migrating.
MIGRATION_TURN_SECONDS: Final = 600
"""How long one migrator waits for another."""
MIGRATION_LOCK_SECONDS: Final = 10
"""How long a migration waits for a table, while everybody else waits behind it."""
MIGRATION_TIMEOUT_SECONDS: Final = 3_600.0

# Looking.
LAG_MAX_EVENTS: Final = 1_000_000
"""Where `outbox status` stops counting."""
POSITIONS_SHOWN: Final = 1_000
PARKED_SHOWN: Final = 50
PARKED_PAYLOAD_SHOWN_BYTES: Final = 65_536

TESTING_MAX_EVENTS: Final = 100
"""Of one call of `outbox.testing.converges`: with more, plans take long and shrink badly."""
