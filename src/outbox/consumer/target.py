"""What a consumer feeds, as the engine sees it: caches (`poison`), inboxes (`deliver`), or of another package."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from outbox.cache.fold import Fault
from outbox.consumer.record import Arrival
from outbox.postgres import Connection


@dataclass(slots=True)
class Tally:
    """What became of a batch's events at one target.

    `dropped` are those that it had before, or does not want; `retried` are parked ones that were applied after all.
    """

    applied: int = 0
    unknown: int = 0
    parked: int = 0
    resolved: int = 0
    dropped: int = 0
    retried: int = 0


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a retry of a parked key came to.

    Attributes:
        applied: so many of the first events have their effect now, or need none.
        fault: why the next one does not; None if all have.
    """

    applied: int
    fault: Fault | None = None


class Work(Protocol):
    """What a batch does to one target; may be run more than once, each time after a rollback of the one before."""

    @property
    def target(self) -> "Target":
        """Whose work it is."""

    @property
    def keeps_plans(self) -> bool:
        """Whether its statements are right under plans made when tables were empty, as long as indexes are used."""

    async def run(self, connection: Connection, *, waiting: bool, careful: bool) -> Tally:
        """Do it, in the batch's transaction, whose row of `outbox.positions` is locked.

        Args:
            connection: in that transaction.
            waiting: whether the target has parked keys in the topic.
            careful: find the guilty events of a batch that was refused as a whole, and park their keys.

        Raises:
            ValueError, PostgresError of the data classes: not careful enough; roll back and run it carefully.
        """


class Target(Protocol):
    """A cache's table, an inbox, or something of another package."""

    @property
    def name(self) -> str:
        """Under which its keys are parked."""

    @property
    def topic(self) -> str:
        """Where its events come from."""

    def work(self, arrivals: Sequence[Arrival], partition: int) -> Work:
        """Decode a batch; outside of any transaction, never raises."""

    async def replay(
        self, connection: Connection, key: str, arrivals: Sequence[Arrival], partition: int, *, until: float
    ) -> Replayed:
        """Apply what waits for a parked key, in order, each event in a savepoint, up to the first that fails.

        Args:
            connection: in a transaction like a batch's, which has also locked the key's row in `outbox.parked_keys`.
            key: under which they were parked.
            arrivals: the first of its events.
            partition: where they came from.
            until: on the monotonic clock; past it nothing slow begins any more, but for the first event.

        Raises:
            PostgresError, OSError, TimeoutError: transient; roll back, and nothing has happened.
        """
