"""An inbox: side effects of another service's events, each once, in this service's own database.

    notifications = Inbox("notification", topic="llm.agents")

    @notifications.on
    async def notify(tx: Transaction, event: AgentDeleted) -> None:
        await tx.execute("insert into notifications ...", event.agent_id)
        tx.emit(OwnerNotified(...))

A cache says what a row *is*; an inbox does something *because* an event came. A declaration holds no connection.
`Consumer` feeds it, next to caches or alone. How a batch goes is told in `deliver`, which messages count as the same
in `messages`.

Guarantees:

* **Once.** What handlers write, what they emit, the ids of the messages and the consumer's position are one
  transaction. What comes again, from a crash, a rebalance, a replay of the relay, an adoption (H23) or a producer that
  sends twice, is dropped: by position, and by message id for `messages.RETENTION_DAYS`.
* **In order.** Events of a key are handled one after the other, also across one that fails: its key is parked, and the
  key's later events queue behind it. Everybody else's go on.
* **A failure is an event's own.** What a handler raises parks the event's key; an error of the server or of the way to
  it is nobody's fault, and the whole batch is tried again later.
"""

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias, TypeVar

from outbox.cache import handlers
from outbox.cache.handlers import Handler
from outbox.errors import InboxDeclarationError
from outbox.event import Event
from outbox.transaction import Transaction

__all__ = ["Inbox"]

E = TypeVar("E", bound=Event)
InboxHandler: TypeAlias = Callable[[Transaction, E], Coroutine[Any, Any, None]]

_HANDLER_SHAPE: Final = "write it as: async def name(tx: Transaction, event: AnEvent) -> None"
_RESERVED_NAMES: Final = frozenset({"relay"})
_NAME_MAX_BYTES: Final = 127


class Inbox:
    """Declares an inbox: handlers registered with `on`, which are called with a transaction and an event."""

    def __init__(self, name: str, *, topic: str, replays: bool = False) -> None:
        """Declare it; usually a module's constant.

        Args:
            name: under which message ids are kept and keys are parked, for good: another name begins with none. One
                name is one inbox in a database, and none of its caches has it for a table.
            topic: where the events come from.
            replays: take records that somebody sent once more on purpose (header `ob-replay`); each such occasion has
                its effects again. Without it they are dropped.

        Raises:
            InboxDeclarationError: the name will not do.
        """
        if name in _RESERVED_NAMES or not 1 <= len(name.encode()) <= _NAME_MAX_BYTES or "\x00" in name:
            raise InboxDeclarationError(
                f"inbox {name!r}: not usable as a name; choose one of 1 to {_NAME_MAX_BYTES} bytes, and not 'relay'"
            )
        self.name: Final = name
        self.topic: Final = topic
        self.replays: Final = replays
        self.handlers: Final[dict[str, Handler]] = {}
        """By event type."""

    def on(self, handler: InboxHandler[E]) -> InboxHandler[E]:
        """Register a handler for the event types in its annotation: one event class, or a union of them.

        The transaction is the batch's own: write with it, emit with it, nest `outbox.transaction(tx)` for a savepoint;
        its COMMIT is the consumer's. A handler that was called may be called again for the same event, because whatever
        comes to nothing is rolled back: a batch with an event that fails, a lost connection. So do nothing in it but
        with `tx`; what has to leave the database, emit. The handlers of a batch have `limits.BATCH_TIMEOUT_SECONDS` in
        all (where they need more, batches become smaller), and the transaction may not stand still for
        `limits.BATCH_IDLE_SECONDS`.

        Raises:
            InboxDeclarationError: the annotations do not say enough, or an event type has a handler already.
        """
        for found in _inspect(handler, self.topic):
            if found.kind.type in self.handlers:
                other = self.handlers[found.kind.type].function
                raise InboxDeclarationError(
                    f"inbox {self.name}: {found.kind.type} is handled by {handlers.name_of(other)} already; "
                    "call both from one handler, or declare an inbox for each"
                )
            self.handlers[found.kind.type] = found
        return handler


def _inspect(function: Callable[..., Any], topic: str) -> list[Handler]:
    """The event types that a handler takes.

    Raises:
        InboxDeclarationError: its annotations do not say, or say something that an inbox cannot do.
    """
    subject = handlers.Subject("inbox", topic, _HANDLER_SHAPE, InboxDeclarationError)
    name = handlers.name_of(function)
    if not inspect.iscoroutinefunction(function):
        raise InboxDeclarationError(f"{name}: handlers of an inbox are coroutines; {_HANDLER_SHAPE}")
    hints = subject.hints(function)
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) != 2 or any(parameter.name not in hints for parameter in parameters):
        raise InboxDeclarationError(f"{name}: needs two annotated parameters; {_HANDLER_SHAPE}")
    if hints[parameters[0].name] is not Transaction:
        raise InboxDeclarationError(f"{name}: its first parameter is the outbox.Transaction; {_HANDLER_SHAPE}")
    if hints.get("return", type(None)) is not type(None):
        raise InboxDeclarationError(f"{name}: returns {hints['return']}, which nobody would see; {_HANDLER_SHAPE}")
    return subject.handlers(function, hints[parameters[1].name])
