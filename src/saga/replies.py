"""Replies of participants, into the mailboxes of the sagas that wait for them.

    Kafka -> BEGIN ... the batch's transaction -> deliver: lock the instance, store the reply, count a wake-up -> COMMIT

A reply wakes an instance that waits; a worker claims it and writes the result together with the next command. Nothing
is decided here.

Guarantees:

* **Once.** A do has one reply in the mailbox, however often it is answered; so has each undo message. What comes again
  is dropped by the mailbox's unique index, and by the consumer's position before that.
* **Never lost.** A reply to a call that is not waited for any more, or to a saga that has ended, is kept in the mailbox
  like any other, where `saga show` finds it: it changes nothing, because the participant does not let a do take effect
  after its undo. One of a saga that is not in this database, or that cannot be read, is kept in `saga.stray_replies`.
* Mail and position commit together; a crash before that leaves neither.

The rows of instances are locked in the order of their ids. Somebody who holds one of them in an open transaction holds
up the partition until then.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Final

from outbox import postgres
from outbox.consumer import handling
from outbox.consumer.record import Arrival, storable
from outbox.consumer.target import Replayed, Tally
from outbox.postgres import Connection
from outbox.transaction import Transaction
from saga.envelope import REPLY, Reply, UnreadableError, read_reply, text_of

log = logging.getLogger(__name__)

SQL: Final = postgres.Statements("saga", "replies.sql")

UNKNOWN: Final = "no such saga in this database"
_KINDS: Final = {"do": "reply", "undo": "undone"}
_Stray = tuple[str, Arrival, Reply | None]


class ReplyTarget:
    """The replies to the sagas of one name, as a consumer feeds them."""

    def __init__(self, topic: str) -> None:
        """From their topic."""
        self.name: Final = topic
        self.topic: Final = topic

    def work(self, arrivals: Sequence[Arrival], partition: int) -> "ReplyWork":  # noqa: ARG002 - as `Target` has it
        """Read a batch; pure, outside of any transaction."""
        work = ReplyWork(self)
        for arrival in arrivals:
            if REPLY not in arrival.headers:
                work.unknown += 1
                continue
            try:
                work.replies.append((read_reply(arrival), arrival))
            except UnreadableError as error:
                work.strays.append((text_of(error), arrival, None))
        return work

    async def replay(
        self,
        connection: Connection,  # noqa: ARG002 - as `Target` has it
        key: str,  # noqa: ARG002
        arrivals: Sequence[Arrival],
        partition: int,  # noqa: ARG002
        *,
        until: float,  # noqa: ARG002
    ) -> Replayed:
        """Nothing of this target is ever parked."""
        return Replayed(len(arrivals))


@dataclass(slots=True)
class ReplyWork:
    """What a batch brings."""

    keeps_plans: ClassVar = False
    target: ReplyTarget
    unknown: int = 0
    replies: list[tuple[Reply, Arrival]] = field(default_factory=list)
    strays: list[_Stray] = field(default_factory=list)

    async def run(self, connection: Connection, *, waiting: bool, careful: bool) -> Tally:  # noqa: ARG002 - as `Work` has it
        """Put replies into mailboxes, in the batch's transaction; carefully: each in a savepoint."""
        tally = Tally(unknown=self.unknown)
        strays = list(self.strays)
        if not careful:
            await self._tell(connection, self.replies, tally, strays)
        else:
            for told in self.replies:
                error = await handling.alone(connection, partial(self._alone, connection, told, tally, strays))
                if error is not None:
                    strays.append((text_of(error), told[1], told[0]))
        if strays:
            await _keep(connection, self.target.topic, strays)
            tally.applied += len(strays)
        return tally

    async def _alone(
        self, connection: Connection, told: tuple[Reply, Arrival], tally: Tally, strays: list[_Stray], _: Transaction
    ) -> None:
        await self._tell(connection, [told], tally, strays)

    async def _tell(
        self, connection: Connection, told: Sequence[tuple[Reply, Arrival]], tally: Tally, strays: list[_Stray]
    ) -> None:
        if not told:
            return
        replies = [one for one, _ in told]
        answers = await SQL.deliver.fetch(
            connection,
            [one.instance_id for one in replies],
            [_KINDS[one.kind] for one in replies],
            [one.path for one in replies],
            [one.dedupe_key for one in replies],
            [one.payload for one in replies],
        )
        for row in answers:
            one, arrival = told[row["nth"] - 1]
            if row["answer"] == "unknown":
                strays.append((UNKNOWN, arrival, one))
            elif row["answer"] == "duplicate":
                tally.dropped += 1
            else:
                tally.applied += 1


async def _keep(connection: Connection, topic: str, strays: Sequence[_Stray]) -> None:
    log.warning("%s: kept %d replies that fit nothing; the first: %s", topic, len(strays), strays[0][0])
    await SQL.keep_strays.execute(
        connection,
        topic,
        [reason for reason, _, _ in strays],
        [one.instance_id if one else None for _, _, one in strays],
        [one.path if one else None for _, _, one in strays],
        [_headers(arrival) for _, arrival, _ in strays],
        [arrival.record.value for _, arrival, _ in strays],
    )


def _headers(arrival: Arrival) -> str:
    headers = {
        storable(name.encode("utf-8", "backslashreplace")): None if value is None else storable(value)
        for name, value in arrival.headers.items()
    }
    return json.dumps(headers)
