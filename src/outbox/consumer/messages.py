"""Message ids: what an inbox has had already, wherever in Kafka it comes again.

A partition's position and marks drop what is delivered twice at its own place. Ids cover the rest: producers that write
a message twice (they have no `ob-pos`), and old events that an adoption brings back under a new log id (H23).

    days    ... d-7  d-6  d-5  d-4  d-3  d-2  d-1   d    d+1
    slots         each day's ids have a slot     filled  empty, or being emptied

Guarantees:

* An id is kept by the transaction in which its message has its effect, or is parked, for at least seven whole days
  (`RETENTION_DAYS`) after it. What comes again later counts as new.
* Ids of several days are never in each other's way: a slot is emptied by TRUNCATE, which costs nothing a row, a day
  before it is filled again. No batch looks into it on that day, so its lock is free; where it is not, the next look is
  soon. A slot that could not be emptied in time keeps its old ids for nine days more, which harms nobody.
* Two batches that have the same message at the same moment take turns by the unique index of the day's slot, around
  midnight by that of the day before: the second one waits for the first, and knows the message then.
* A crash before COMMIT leaves neither effect nor id.

The day is the database's: a consumer remembers which it was, and is told when it is another one.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final
from uuid import UUID

from outbox import limits, postgres, retry
from outbox.postgres import Connection, Pool
from outbox.wire import REPLAY_HEADER

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)

SQL: Final = postgres.Statements("outbox", "consumer/messages.sql")

RETENTION_DAYS: Final = 7
_SLOTS: Final = RETENTION_DAYS + 2
_EARLY_SECONDS: Final = 2 * limits.BATCH_TIMEOUT_SECONDS
"""After midnight, when batches of the day before may still be open."""
_UUID: Final = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def message_id(headers: Mapping[str, bytes | None], *, is_ours: bool) -> str | None:
    """Under which id a message is kept, as the text of a UUID; None of a message without one.

    Our own event ids are unique by themselves. Of other producers only source and id together name a message.
    A record that an operator has replayed is a message of its own: once for each replay.
    """
    identity = headers.get("ce_id")
    if not identity:
        return None
    replay = headers.get(REPLAY_HEADER)
    if is_ours and replay is None and _UUID.fullmatch(identity):
        return identity.decode()
    parts = (headers.get("ce_source") or b"", identity, replay or b"")
    digest = hashlib.sha256(b"".join(b"%d:%b" % (len(part), part) for part in parts)).digest()
    return str(UUID(bytes=digest[:16]))


class Messages:
    """The ids that one inbox keeps."""

    def __init__(self, inbox: str) -> None:
        """Of the inbox with this name."""
        self._inbox = inbox
        self._today = 0

    async def receive(self, connection: Connection, ids: Sequence[str]) -> frozenset[str]:
        """Keep distinct ids, in the caller's transaction; those that were known come back."""
        if not ids:
            return frozenset()
        while True:
            today = self._today
            slots = [(today - days) % _SLOTS for days in range(_SLOTS - 1)]
            row = await SQL.receive.fetchrow(connection, self._inbox, ids, today, slots, _EARLY_SECONDS)
            assert row is not None
            if row["today"] == today:
                return frozenset(row["known"])
            self._today = row["today"]


async def keep_rotating(pool: Pool, stopping: "asyncio.Event") -> None:
    """Empty the slot of the next day, each day, until told to stop."""
    while not stopping.is_set():
        delay = limits.INBOX_ROTATION_SECONDS
        try:
            if await SQL.rotate.fetchval(pool):
                log.info("inboxes: forgot the messages that are more than %d days old", RETENTION_DAYS)
        except (postgres.PostgresError, *postgres.CONNECTION_ERRORS) as error:
            delay = limits.INBOX_ROTATION_AGAIN_SECONDS
            log.log(
                logging.INFO if retry.is_transient(error) else logging.ERROR,
                "inboxes: tomorrow's slot was not emptied: %r; again in %.0f s", error, delay,
            )  # fmt: skip
        await retry.pause(delay, stopping)
