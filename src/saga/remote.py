"""Remote steps: contracts that the calling service and the participant both import.

    reserve_stock = remote("stock.reserve", ReserveStock, Reserved, timeout=30)

The part of the name before the first dot is the participant. The command travels through the outbox of the calling
service, the reply through the participant's. An unknown outcome is undone by a command of its own; a command that the
undo has overtaken is refused by the participant.
"""

from typing import Any, Final, Generic, overload

from typing_extensions import TypeVar

from outbox import Duration
from saga import limits
from saga.codec import Value
from saga.context import positive
from saga.errors import SagaDeclarationError
from saga.step import Call, Target, check_name

C = TypeVar("C")
R = TypeVar("R")

_TOPIC_MAX_CHARACTERS: Final = 249


class OneArgument:
    """A command as the arguments of a call: the journal holds the command itself."""

    names: Final = ("command",)

    def __init__(self, command: Value[Any]) -> None:
        """For commands of one type."""
        self._command = command

    def bind(self, command: Any) -> dict[str, Any]:
        """As `codec.Arguments.bind`."""
        return {"command": command}

    def unbind(self, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """As `codec.Arguments.unbind`."""
        return [values["command"]], {}

    def encode(self, values: dict[str, Any]) -> str:
        """As `codec.Arguments.encode`."""
        return self._command.encode(values["command"])

    def decode(self, text: str) -> dict[str, Any]:
        """As `codec.Arguments.decode`."""
        return {"command": self._command.decode(text)}

    def recognise(self, values: dict[str, Any]) -> tuple[str, bytes]:
        """As `codec.Arguments.recognise`."""
        return self._command.recognise(values["command"])


class Remote(Target, Generic[C, R]):
    """A contract with a participant; made by `remote`."""

    def __init__(self, name: str, command: Value[C], reply: Value[R], timeout_seconds: float) -> None:
        """For `remote`."""
        super().__init__(name=name, kind="remote", arguments=OneArgument(command), result=reply)
        self.participant: Final = name.partition(".")[0]
        self.command: Final = command
        self.reply: Final = reply
        self.timeout_seconds = timeout_seconds
        self.fences = True  # its participant leaves a tombstone where the undo comes first

    def __call__(self, command: C, /) -> Call[R]:
        """Describe a call; `run(...)` sends it."""
        return Call(self, self.arguments.bind(command))

    @property
    def topic(self) -> str:
        """Where its participant reads commands."""
        return command_topic(self.participant)


@overload
def remote(name: str, command: type[C], reply: type[R], *, timeout: Duration) -> Remote[C, R]: ...
@overload
def remote(name: str, command: type[C], reply: None = None, *, timeout: Duration) -> Remote[C, None]: ...
def remote(name: str, command: Any, reply: Any = None, *, timeout: Duration) -> Remote[Any, Any]:
    """Declare a contract: `participant.command`, the command's class, the reply's class, how long to wait for it.

    Raises:
        SagaDeclarationError: the name has no participant in it, or a class has no JSON form.
    """
    check_name("remote", name)
    participant, dot, action = name.partition(".")
    if not dot or not action:
        raise SagaDeclarationError(
            f"remote {name!r}", "names no participant", "write participant.command: stock.reserve"
        )
    command_topic(participant)
    timeout_seconds = positive(f"remote {name!r} timeout", timeout, limits.STEP_TIMEOUT_SECONDS)
    return Remote(name, Value(command, f"command of {name}"), Value(reply, f"reply of {name}"), timeout_seconds)


def command_topic(participant: str) -> str:
    """The topic that a participant reads; its partitions are the participant's parallelism.

    Raises:
        SagaDeclarationError: Kafka has no topic of such a name.
    """
    return _topic("participant", participant, "commands")


def reply_topic(saga: str) -> str:
    """The topic that the workers of a saga read replies from.

    Raises:
        SagaDeclarationError: Kafka has no topic of such a name.
    """
    return _topic("saga", saga, "replies")


def _topic(what: str, name: str, suffix: str) -> str:
    topic = f"saga.{name}.{suffix}"
    if ":" in name or len(topic) > _TOPIC_MAX_CHARACTERS:
        raise SagaDeclarationError(
            f"{what} {name!r}",
            "does not fit into the name of a topic",
            f"use a-z A-Z 0-9 _ . - and fewer than {_TOPIC_MAX_CHARACTERS - 13} characters",
        )
    return topic
