"""What a consumer feeds: caches (`poison`) and inboxes (`deliver`), as the engine sees both."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from outbox.consumer.record import Arrival
from outbox.postgres import Connection


@dataclass(slots=True)
class Tally:
    """What became of a batch's events at one target; `dropped` are those that it had before, or does not want."""

    applied: int = 0
    unknown: int = 0
    parked: int = 0
    resolved: int = 0
    dropped: int = 0


class Work(Protocol):
    """What a batch does to one target; may be run more than once, each time after a rollback of the one before."""

    @property
    def target(self) -> "Target":
        """Whose work it is."""

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
    """A cache's table, or an inbox."""

    @property
    def name(self) -> str:
        """Under which its keys are parked."""

    def work(self, arrivals: Sequence[Arrival], partition: int) -> Work:
        """Decode a batch; outside of any transaction, never raises."""
