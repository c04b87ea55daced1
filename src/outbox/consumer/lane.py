"""One assigned partition, as `lanes` keeps it: its states, what they mean to a person, and what is needed of Kafka."""

import asyncio
import enum
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from outbox import retry
from outbox.consumer.apply import Partition
from outbox.consumer.pace import Pace
from outbox.consumer.record import Record
from outbox.kafka import TopicPartition


class State(enum.StrEnum):
    """Of a lane."""

    CLAIMING = enum.auto()
    RUNNING = enum.auto()
    WAITING = enum.auto()
    """After an error; claims again after a pause."""
    RECREATED = enum.auto()
    """The topic is not the one that was read before: another record stands at the stored position, or none."""
    NEEDS_REBUILD = enum.auto()
    """Kafka deleted records that were not read yet."""
    REVOKED = enum.auto()


RESTARTING: Final = "restarting"
"""Stored by `outbox cache rebuild`: the partition is to be read from the first record that Kafka has."""

ALARMS: Final = {
    State.RECREATED: (
        "the topic was re-created: what Kafka has at the stored position is not what was applied; `outbox cache "
        "rebuild` takes the owner's rows and reads the topic from its first record on; for an inbox alone see "
        "docs/operations.md"
    ),
    State.NEEDS_REBUILD: (
        "Kafka has deleted records that were not applied yet, so rows may be wrong for ever; `outbox cache rebuild` "
        "takes the owner's rows and goes on with the oldest record that is there; for an inbox alone see "
        "docs/operations.md; keep records longer"
    ),
}


class Source(Protocol):
    """What lanes need of Kafka's consumer; aiokafka's has it."""

    def assignment(self) -> Iterable[TopicPartition]: ...  # noqa: D102
    def pause(self, *partitions: TopicPartition) -> None: ...  # noqa: D102
    def resume(self, *partitions: TopicPartition) -> None: ...  # noqa: D102
    def seek(self, partition: TopicPartition, offset: int) -> None: ...  # noqa: D102
    def position(self, partition: TopicPartition) -> Awaitable[int]: ...  # noqa: D102
    def beginning_offsets(self, partitions: list[TopicPartition]) -> Awaitable[Mapping[TopicPartition, int]]: ...  # noqa: D102
    def end_offsets(self, partitions: list[TopicPartition]) -> Awaitable[Mapping[TopicPartition, int]]: ...  # noqa: D102
    def commit(self, offsets: Mapping[TopicPartition, int]) -> Awaitable[None]: ...  # noqa: D102


ReadOne = Callable[[TopicPartition, int], Awaitable[Record | None]]
"""The record at an offset, if it is still there."""


@dataclass(slots=True)
class Lane:
    """One assigned partition."""

    at: TopicPartition
    state: State = State.CLAIMING
    partition: Partition | None = None
    task: asyncio.Task[None] | None = None
    pauses: Iterator[float] = field(default_factory=retry.backoff)
    batch: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a batch is applied."""
    open: list[asyncio.Task[None]] = field(default_factory=list)
    """Its batches, the one that is applied first."""
    is_aside: bool = False
    """Paused until that one is over; those behind it were dropped."""
    committed: int = -1
    """The offset last told to Kafka."""
    pace: Pace = field(default_factory=Pace)


def abandon(lane: Lane) -> None:
    """It is not ours any more; its open batch may end, and nothing else begins."""
    lane.state = State.REVOKED
    if lane.task is not None:
        lane.task.cancel()
