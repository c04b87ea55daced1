"""Releasing: parked keys that a person wants tried again, published through windows of their own.

`outbox parked retry` only sets a flag and wakes the relay, because only the relay knows what else it is about to
publish. It answers with windows of kind *release*, numbered among the others, logged before they are published, done
and replayed like the others:

    flag (retry_at) -> one transaction under the shard's lock:   the key's first events, by position, get
                       log the window, move the events into it   (release window, ordinal); behind the last
                                                                 of them the key is free
                    -> publish -> done -> the events are forgotten
                          | refused again
                          v
                       parked again from that record on, its origin the release window

Guarantees:

* Order. Until the key is free, every window diverts its events; the window that frees it holds the last of them, and
  what follows has a higher number. A writer that has the key locked meanwhile commits before the lock (its event is
  diverted, and released in its place) or after it (its event is in a later window).
* A crash at any line: before the transaction commits the events are parked and flagged, after it the window is replayed
  from `release_window_no`. Both windows that an event belongs to, the one that it was parked from and the one that
  releases it, may be replayed; so the event keeps its origin, and is left out of the first, until both are done.
* A release window is never a cursor: between its snapshots lies nothing, and loading looks at log windows only.
"""

from typing import Final

from outbox import clock, limits, postgres
from outbox.postgres import Connection
from outbox.relay.lease import Lease
from outbox.relay.wakeup import Wakeup
from outbox.relay.window import Bounds, Progress, offsets_out

SQL: Final = postgres.Statements("outbox", "relay/release.sql")

_LOOK_EVERY_SECONDS: Final = 1.0


class Flags:
    """Whether parked keys of a shard are to be released."""

    def __init__(self, connection: Connection, shard: int, wakeup: Wakeup) -> None:
        """On the connection that reads the shard."""
        self._connection = connection
        self._shard = shard
        self._wakeup = wakeup
        self._look_at = 0.0
        self._due = False

    async def due(self) -> bool:
        """Looks once a second, and at once when the relay was woken; forgets some of what is over on the way."""
        if not self._wakeup.called and clock.monotonic() < self._look_at:
            return self._due
        self._wakeup.called = False
        self._look_at = clock.monotonic() + _LOOK_EVERY_SECONDS
        row = await SQL.look.fetchrow(self._connection, self._shard)
        assert row is not None, "the shard's row exists: its lease was taken"
        self._due = row["due"]
        if row["over"]:
            await SQL.forget.execute(self._connection, self._shard, limits.RELAY_PARKED_FORGET_EVENTS)
        return self._due

    def look_again(self) -> None:
        """The next question is not answered from memory: a window was logged."""
        self._look_at = 0.0


async def log_window(connection: Connection, lease: Lease, number: int, bounds: Bounds, progress: Progress) -> int:
    """Log a window of kind release; returns how many events it has, and 0 where there was nothing to log."""
    count: int = await SQL.log.fetchval(
        connection, lease.shard, lease.epoch, progress.done_through, offsets_out(progress.next_offsets),
        number, bounds.max_events, bounds.max_bytes,
    )  # fmt: skip
    return count
