"""Participants: the other side of a remote step, in the service that owns what the step changes.

    participant = Participant("stock")

    @participant.on(reserve_stock)
    async def do_reserve(tx: Transaction, command: ReserveStock) -> Reserved: ...

    @do_reserve.compensation
    async def undo_reserve(tx: Transaction, done: Reserved, command: ReserveStock) -> None: ...

A declaration holds no connection; `Worker` serves it. `done` is the reply that was stored when the command was handled:
a participant always knows whether it did, so its compensation never sees `Unknown`.
"""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic

from typing_extensions import TypeVar

from outbox import Transaction
from saga.codec import hints_of, name_of
from saga.errors import SagaDeclarationError
from saga.remote import Remote, command_topic
from saga.step import check_async, check_name

C = TypeVar("C")
R = TypeVar("R")
Tx = TypeVar("Tx", bound=Transaction)


class Handler(Generic[Tx, C, R]):
    """What a participant does with one command; made by `Participant.on`."""

    def __init__(self, contract: Remote[C, R], function: Callable[[Tx, C], Awaitable[R]]) -> None:
        """For `Participant.on`."""
        self.contract: Final = contract
        self.function: Final = function
        self.undo: Callable[[Tx, R, C], Awaitable[None]] | None = None

    def __call__(self, tx: Tx, command: C, /) -> Awaitable[R]:
        """The function as it was written, to call it directly in a test."""
        return self.function(tx, command)

    def compensation(self, fn: Callable[[Tx, R, C], Awaitable[None]], /) -> Callable[[Tx, R, C], Awaitable[None]]:
        """Register how the command is undone. Without one, an undo is acknowledged and nothing happens.

        Raises:
            SagaDeclarationError: there is one already, or the function does not fit.
        """
        field = f"{name_of(self.function)}.compensation"
        if self.undo is not None:
            raise SagaDeclarationError(field, "is registered twice", "keep one of the two")
        _check_parameters(field, fn, ("tx", "done", "command"))
        self.undo = fn
        return fn


class Participant:
    """The commands that one service handles; usually a module's constant."""

    def __init__(self, name: str) -> None:
        """Declare it; `name` is the first part of its contracts' names.

        Raises:
            SagaDeclarationError: the name cannot be part of a topic's.
        """
        check_name("participant", name)
        if "." in name:
            raise SagaDeclarationError(f"participant {name!r}", "has a dot", "a contract's name is participant.command")
        self.name: Final = name
        self.topic: Final = command_topic(name)
        self.handlers: Final[dict[str, Handler[Any, Any, Any]]] = {}
        """By the contract's name."""

    def on(self, remote: Remote[C, R], /) -> Callable[[Callable[[Tx, C], Awaitable[R]]], Handler[Tx, C, R]]:
        """Register the handler of a contract.

        It runs in a transaction of this service's database, together with the reply: once for each command, however
        often that is delivered. It raises `Rejected` where the answer is no.

        Raises:
            SagaDeclarationError: the contract is another participant's, or has a handler already.
        """
        field = f"participant {self.name}: {remote.name}"
        if remote.participant != self.name:
            raise SagaDeclarationError(field, f"belongs to the participant {remote.participant}", "register it there")
        if remote.name in self.handlers:
            raise SagaDeclarationError(field, "is handled already", "a command has one handler")

        def register(function: Callable[[Tx, C], Awaitable[R]]) -> Handler[Tx, C, R]:
            _check_parameters(field, function, ("tx", "command"))
            handler = Handler(remote, function)
            self.handlers[remote.name] = handler
            return handler

        return register


def _check_parameters(field: str, function: Callable[..., Any], names: tuple[str, ...]) -> None:
    check_async(function)
    hints_of(function)
    try:
        inspect.signature(function).bind(*names)
    except TypeError as error:
        raise SagaDeclarationError(
            field, f"{name_of(function)} does not take ({', '.join(names)}): {error}", "let it take exactly these"
        ) from error
