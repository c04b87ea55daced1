"""Commands to participants, as the Lab carries them from the outbox of one service to another one."""

import json
from dataclasses import dataclass
from uuid import UUID

from saga.state import OutboxRow


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
