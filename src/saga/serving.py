"""Serving a participant: commands in, each with its effect once, replies out.

    BEGIN ... the batch's transaction, with the partition's row locked
      waiting   instances that are parked: their commands queue
      take      insert the commands' rows, or find them: a do and its undo share one
      handlers  of those that are not answered by their row alone
      answer    the rows, and the replies into this service's outbox
      park      commands that are tried again
    COMMIT

| the row says         | a do comes                          | an undo comes                                |
|----------------------|-------------------------------------|----------------------------------------------|
| nothing              | handler; too old: rejected          | tombstone, acknowledged (see below)          |
| answered             | the same answer again               | completed: compensation; else acknowledged   |
| undone, no answer    | rejected: its undo came first (H29) | acknowledged again                           |
| undone, answered     | the same answer again               | acknowledged again                           |

Guarantees, and what a crash does to them:

* **Once.** The row, what the handler wrote and emitted, the reply and the position commit together. A crash at any line
  before that leaves nothing, and the commands are read again; after it they are not. A do that is sent twice finds its
  row, wherever in Kafka it comes again, for `COMMANDS_KEPT_DAYS`. So a handler may be *called* more than once, while
  its effect is there once.
* **Never after its undo.** Both insert the same row first, so they take turns; a do that comes second is rejected. A do
  that was sent more than `COMMAND_MAX_AGE_DAYS` ago, and is not known, is refused: its tombstone may have been deleted.
* **What was done can be undone** for `COMMANDS_UNDOABLE_DAYS` after its saga's deadline. An undo of an older do, of
  which nothing is known, is answered with an error rather than acknowledged. Without a compensation there is nothing to
  remember: the undo is acknowledged at once.
* **Always answered.** `Rejected` is an answer. Any other error is the command's own: it is rolled back to its
  savepoint, its instance is parked, and it is tried again, `COMMAND_ATTEMPTS` times in all, or until its reply is not
  waited for any more; then the failure is the answer, and nothing of it has happened.
* **Nobody waits for a poison command** but the same saga's later commands to this participant. An error of the database
  is nobody's fault and keeps the batch; where it comes out of the same handler again and again (`COMMAND_STRIKES`), or
  the handler takes too long, it is that command's after all.
* A record that says it is a command, and could not be answered because nobody knows to whom, is parked alone.

As in an inbox (`outbox.consumer.deliver`) the fast way takes no savepoint; what raises has the batch done again
carefully. So that refusals, which are no errors, do not cost that each time, some batches after one are careful from
the start. What a command comes to is decided in `answering`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

from outbox import clock
from outbox.cache.fold import Fault, Step
from outbox.consumer import parking, retries
from outbox.consumer.parking import BEHIND, Queue
from outbox.consumer.record import Arrival
from outbox.consumer.target import Replayed, Tally
from outbox.postgres import Connection
from saga.answering import Memory, Serving
from saga.envelope import COMMAND, Command, UnreadableError, read_command
from saga.errors import SagaDeclarationError
from saga.participant import Participant


class ParticipantTarget:
    """A participant as a consumer feeds it."""

    def __init__(self, participant: Participant) -> None:
        """With its handlers, as they are now.

        Raises:
            SagaDeclarationError: it has none.
        """
        if not participant.handlers:
            raise SagaDeclarationError(
                f"participant {participant.name}", "has no handlers", "register them with @participant.on first"
            )
        self.name: Final = participant.topic
        self.topic: Final = participant.topic
        self.participant: Final = participant
        self.memory: Final = Memory()

    def work(self, arrivals: Sequence[Arrival], partition: int) -> "ParticipantWork":
        """Read the headers of a batch; pure, outside of any transaction."""
        work = ParticipantWork(self, partition)
        for arrival in arrivals:
            if COMMAND not in arrival.headers:
                work.unknown += 1
                continue
            try:
                work.commands.append((read_command(arrival), arrival))
            except UnreadableError as error:
                work.unreadable.append((Fault.of(error), arrival))
        return work

    async def replay(
        self,
        connection: Connection,
        key: str,  # noqa: ARG002 - as `target.Target` has it
        arrivals: Sequence[Arrival],
        partition: int,  # noqa: ARG002 - as `target.Target` has it
        *,
        until: float,
    ) -> Replayed:
        """See `target.Target`."""
        for number, arrival in enumerate(arrivals):
            if number and clock.monotonic() > until:
                return Replayed(number)
            try:
                command = read_command(arrival)
            except UnreadableError as error:
                return Replayed(number, Fault.of(error))
            serving = self.serving(connection)
            await serving.take([command])
            fault = await serving.alone(command)
            if fault is not None:
                return Replayed(number, fault)
        return Replayed(len(arrivals))

    def serving(self, connection: Connection) -> Serving:
        """Of commands in one transaction."""
        return Serving(self.participant, self.memory, connection)


@dataclass(slots=True)
class ParticipantWork:
    """What a batch brings to one participant."""

    keeps_plans: ClassVar = False
    target: ParticipantTarget
    partition: int
    unknown: int = 0
    commands: list[tuple[Command, Arrival]] = field(default_factory=list)
    unreadable: list[tuple[Fault, Arrival]] = field(default_factory=list)

    async def run(self, connection: Connection, *, waiting: bool, careful: bool) -> Tally:
        """Handle, answer and park, in the batch's transaction.

        Raises:
            HandlerFailed: a command failed or was refused; roll back and run carefully.
        """
        careful = self.target.memory.is_careful() or careful
        queues = _Queues()
        retried = 0
        if waiting and self.commands:
            keys = list({_key(command) for command, _ in self.commands})
            behind, retried = await retries.behind(connection, self.target, self.partition, keys)
            for key in behind:
                queues.open(key, BEHIND)
        serving = self.target.serving(connection)
        passing = [command for command, _ in self.commands if _key(command) not in queues]
        await serving.take(passing)
        if not careful:
            await serving.together(passing)
        for command, arrival in self.commands:
            if _key(command) in queues:
                queues.add(_key(command), BEHIND, arrival)
            elif careful and (fault := await serving.alone(command)) is not None:
                queues.open(_key(command), fault)
                queues.add(_key(command), fault, arrival)
        for fault, arrival in self.unreadable:  # alone: nobody has to wait for it
            key = f"offset {arrival.record.offset} of partition {self.partition}"
            queues.open(key, fault)
            queues.add(key, fault, arrival)
        parked = 0
        if filled := queues.filled():
            parked = await parking.park(connection, self.target.name, self.target.topic, self.partition, filled)
        applied = len(self.commands) + len(self.unreadable) - parked
        return Tally(applied=applied, unknown=self.unknown, parked=parked, retried=retried)


class _Queues:
    """Keys that wait, with the records of this batch behind them."""

    def __init__(self) -> None:
        self._faults: dict[str, Fault] = {}
        self._steps: dict[str, list[Step]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._steps

    def open(self, key: str, fault: Fault) -> None:
        self._faults[key], self._steps[key] = fault, []

    def add(self, key: str, fault: Fault, arrival: Arrival) -> None:
        self._steps[key].append(Step(fault, arrival.position, arrival))

    def filled(self) -> list[Queue]:
        return [Queue(key, self._faults[key], steps) for key, steps in self._steps.items() if steps]


def _key(command: Command) -> str:
    """Under which its commands queue: those of one saga keep their order."""
    return str(command.instance_id)
