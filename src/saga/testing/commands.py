"""Commands to participants, as the Lab carries them from the outbox of one service to another one."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import UUID

from saga.state import Fact, OutboxRow


@dataclass(slots=True, kw_only=True)
class Message:
    """A command on its way, or one that was handled."""

    id: UUID
    command: str
    instance_id: UUID
    path: str
    name: str
    payload: str
    round: int


@dataclass(slots=True, kw_only=True)
class Handled:
    """What a participant remembers of one command."""

    reply: dict[str, Any]
    is_done: bool


Handle: TypeAlias = Callable[[Message, str | None], Awaitable[Fact]]
"""Handles a command, or undoes it (then with its stored output). For a do, `Asked` means that it was done and its reply
is lost; `Uncertain`, that the command itself is."""


def message_of(row: OutboxRow) -> Message | None:
    """The command in a row of the outbox; None where it holds something else."""
    headers = json.loads(row.headers or "{}")
    if "saga-command" not in headers:
        return None
    return Message(
        id=row.event_id,
        command=headers["saga-command"],
        instance_id=UUID(headers["saga-id"]),
        path=headers["saga-path"],
        name=row.event_type.rpartition(".")[0],
        payload=row.payload.decode(),
        round=int(headers.get("saga-round", 0)),
    )
