"""One inbox's part of a batch: handlers one after the other, and the keys set aside whose events fail.

    BEGIN ... the batch's transaction, with the partition's row locked
      receive   keep the batch's message ids; what was known is dropped
      waiting   keys that are parked: their events queue
      handlers  one event after the other; what they emit is buffered
      flush     everything emitted, in one INSERT
      park
    COMMIT

The fast way takes no savepoint and no statement of ours an event. If a handler raises, or one of its statements is
refused, all of it is rolled back and done again *carefully*: each event in a savepoint of its own, with its deferred
constraints checked and its events inserted before the next one. The one that fails is rolled back alone and begins the
queue of its key; the key's later events, of this batch and of later ones, queue behind it.

Guarantees, and what a crash does to them:

* Effects, emitted events, message ids, parked events and the position commit together. A crash at any line before that
  leaves nothing of the batch, and it is read again; a crash after it leaves all, and it is not. So handlers may be
  *called* more than once for an event, while their effects are there once.
* What a failed event emitted is not published: the buffer follows savepoints, and a batch done again starts empty.
* A transient error of the database is nobody's fault: the batch is kept. That is one with such an SQLSTATE, also where
  the handler wrapped it in an exception of its own, a lost connection, or a statement that ran out of time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from pydantic import TypeAdapter

from outbox import clock, postgres
from outbox.cache import handlers
from outbox.cache.fold import Fault, Step
from outbox.cache.handlers import Handler
from outbox.consumer import handling, parking, retries
from outbox.consumer.inbox import Inbox
from outbox.consumer.messages import Messages, message_id
from outbox.consumer.parking import BEHIND, Queue
from outbox.consumer.record import Arrival, decode, record_key
from outbox.consumer.target import Replayed, Tally
from outbox.errors import EmitError, HandlerFailed
from outbox.event import Event
from outbox.postgres import Connection


@dataclass(frozen=True, slots=True)
class Delivery:
    """One event for a handler."""

    handler: Handler
    event: Event | Fault
    key: str
    arrival: Arrival


class InboxTarget:
    """An inbox as a consumer feeds it."""

    def __init__(self, inbox: Inbox) -> None:
        """With its handlers, as they are now."""
        self.name: Final = inbox.name
        self.topic: Final = inbox.topic
        self.messages: Final = Messages(inbox.name)
        self._replays = inbox.replays
        self._handlers = inbox.handlers
        self._keys = {type_: _key_adapter(handler) for type_, handler in inbox.handlers.items()}

    def work(self, arrivals: Sequence[Arrival], partition: int) -> "InboxWork":
        """Decode a batch; pure, outside of any transaction."""
        work = InboxWork(self, partition)
        for arrival in arrivals:
            handler = self._handlers.get(arrival.event_type) if arrival.event_type is not None else None
            if handler is None:
                work.unknown += 1
            elif arrival.is_replay and not self._replays:
                work.dropped += 1
            else:
                work.add(self._delivery(handler, arrival, partition))
        return work

    async def replay(
        self, connection: Connection, key: str, arrivals: Sequence[Arrival], partition: int, *, until: float
    ) -> Replayed:
        """See `target.Target`. Their ids were kept when they were parked."""
        for number, arrival in enumerate(arrivals):
            if number and clock.monotonic() > until:
                return Replayed(number)
            handler = self._handlers.get(arrival.event_type) if arrival.event_type is not None else None
            if handler is None:
                continue
            delivery = self._delivery(handler, arrival, partition)
            if delivery.key != key and await parking.SQL.waiting.fetch(
                connection, self.name, self.topic, [delivery.key]
            ):  # it could not be read when it was parked
                return Replayed(number, BEHIND)
            fault = delivery.event if isinstance(delivery.event, Fault) else await _alone(connection, delivery)
            if fault is not None:
                return Replayed(number, fault)
        return Replayed(len(arrivals))

    def _delivery(self, handler: Handler, arrival: Arrival, partition: int) -> Delivery:
        event = decode(arrival, handler.event_class)
        if not isinstance(event, Fault):
            try:
                return Delivery(handler, event, handlers.event_key(handler, event), arrival)
            except EmitError as error:
                event = Fault.of(error)
        return Delivery(handler, event, record_key(arrival, partition, self._keys[handler.kind.type]), arrival)


@dataclass(slots=True)
class InboxWork:
    """What a batch brings to one inbox."""

    keeps_plans: ClassVar = False  # handlers run statements of their own
    target: InboxTarget
    partition: int
    unknown: int = 0
    dropped: int = 0
    deliveries: dict[str, Delivery] = field(default_factory=dict)
    """By message id; by a text that is none for a message without one."""
    ids: list[str] = field(default_factory=list)

    def add(self, delivery: Delivery) -> None:
        """Take one more event; the same message twice in a batch counts once."""
        arrival = delivery.arrival
        identity = message_id(arrival.headers, is_ours=arrival.position is not None)
        if identity is None:
            self.deliveries[f"offset {arrival.record.offset}"] = delivery
        elif identity in self.deliveries:
            self.dropped += 1
        else:
            self.deliveries[identity] = delivery
            self.ids.append(identity)

    async def run(self, connection: Connection, *, waiting: bool, careful: bool) -> Tally:
        """Call the handlers, and park, in the batch's transaction.

        Raises:
            HandlerFailed: an event failed; roll back and run carefully.
        """
        known = await self.target.messages.receive(connection, self.ids)
        wanted = [delivery for identity, delivery in self.deliveries.items() if identity not in known]
        queues = _Queues()
        retried = 0
        if waiting and wanted:
            keys = list({delivery.key for delivery in wanted})
            parked_keys, retried = await retries.behind(connection, self.target, self.partition, keys)
            for key in parked_keys:
                queues.open(key, BEHIND)
        if careful:
            for delivery in queues.passing(wanted):
                if (fault := await _alone(connection, delivery)) is not None:
                    queues.begin(delivery, fault)
        else:
            await _together(connection, queues.passing(wanted))
        parked = 0
        if filled := queues.filled():
            parked = await parking.park(connection, self.target.name, self.target.topic, self.partition, filled)
        return Tally(
            applied=len(wanted) - parked,
            unknown=self.unknown,
            parked=parked,
            dropped=self.dropped + len(known),
            retried=retried,
        )


class _Queues:
    """Keys that wait, with the events of this batch behind them."""

    def __init__(self) -> None:
        self._faults: dict[str, Fault] = {}
        self._steps: dict[str, list[Step]] = {}

    def open(self, key: str, fault: Fault) -> None:
        """From here on the key's events wait."""
        self._faults[key] = fault
        self._steps[key] = []

    def begin(self, delivery: Delivery, fault: Fault) -> None:
        """This event failed."""
        self.open(delivery.key, fault)
        self._steps[delivery.key].append(_step(delivery, fault))

    def passing(self, deliveries: Sequence[Delivery]) -> Iterator[Delivery]:
        """The events to handle, in order; those that cannot be read, and those behind another one, queue meanwhile."""
        for delivery in deliveries:
            if (steps := self._steps.get(delivery.key)) is not None:
                steps.append(_step(delivery, BEHIND))
            elif isinstance(delivery.event, Fault):
                self.begin(delivery, delivery.event)
            else:
                yield delivery

    def filled(self) -> list[Queue]:
        """What is to be parked."""
        return [Queue(key, self._faults[key], steps) for key, steps in self._steps.items() if steps]


def _step(delivery: Delivery, fault: Fault) -> Step:
    return Step(fault, delivery.arrival.position, delivery.arrival)


async def _together(connection: Connection, deliveries: Iterator[Delivery]) -> None:
    """All handlers in one unit of work, whose events are flushed at its end.

    Raises:
        HandlerFailed: one of them failed, or hid that a statement of its own did.
    """
    try:
        await _one_unit(connection, deliveries)
    except postgres.PostgresError as error:
        if postgres.sqlstate(error) != postgres.ABORTED:
            raise
        raise HandlerFailed(f"a handler hid an error of the database: {error!r}") from error


async def _one_unit(connection: Connection, deliveries: Iterator[Delivery]) -> None:
    async with handling.unit(connection) as tx:
        for delivery in deliveries:
            try:
                await handling.call(delivery.handler.function(tx, delivery.event))
            except Exception as error:
                if handling.is_transient(connection, error):
                    raise
                raise HandlerFailed(f"{handlers.name_of(delivery.handler.function)}: {error!r}") from error
            handling.require_transaction(connection)


async def _alone(connection: Connection, delivery: Delivery) -> Fault | None:
    """One handler in a savepoint; why it failed, if it did.

    Raises:
        PostgresError, OSError, TimeoutError: transient; nothing is known of the batch any more.
        TransactionClosed: the handler ended the transaction.
    """
    error = await handling.alone(connection, lambda tx: delivery.handler.function(tx, delivery.event))
    return None if error is None else Fault.of(error)


def _key_adapter(handler: Handler) -> TypeAdapter[Any]:
    return handlers.field_adapter(handler.event_class, handler.kind.key_field)
