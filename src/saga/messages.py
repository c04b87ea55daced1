"""The commands that a saga sends to participants, as rows of its outbox.

| header          | meaning                                                                        |
|-----------------|--------------------------------------------------------------------------------|
| `saga-command`  | `do` or `undo`                                                                 |
| `saga-id`       | the instance; also the key, so that its commands to one participant keep order |
| `saga-path`     | the step: branch, name and occurrence                                          |
| `saga-key`      | the idempotency key of the *do*, for do and undo alike: what they are about    |
| `saga-round`    | of an undo: counts how often it had to be repeated after a late result         |
| `saga-reply-to` | the topic that the reply is expected on                                        |
| `saga-sent`     | when the do was sent, for do and undo alike: how old is what they are about    |
| `saga-until`    | of a do: when its reply is no longer waited for                                |
| `saga-deadline` | of a do: the saga's, after which it goes no way but back                       |

The type is the contract's name with `.do` or `.undo`; the payload is the command itself, in both.
"""

import json
from datetime import datetime
from uuid import UUID, uuid5

from saga.remote import Remote
from saga.state import Intent, OutboxRow, PlanRow, TaskRow, step_key


def do(
    instance_id: UUID, remote: Remote[object, object], intent: Intent, reply_topic: str, deadline_at: datetime
) -> OutboxRow:
    """The command of a remote step."""
    assert intent.until is not None
    headers = _headers(instance_id, intent.path, "do", reply_topic, intent.started_at)
    headers |= {"saga-until": _text(intent.until), "saga-deadline": _text(deadline_at)}
    event_id = step_key(instance_id, intent.path)
    return _row(remote, "do", key=instance_id, event_id=event_id, headers=headers, payload=intent.input)


def undo(instance_id: UUID, remote: Remote[object, object], row: PlanRow, task: TaskRow, reply_topic: str) -> OutboxRow:
    """The command that undoes it; each attempt is a message of its own, which the participant answers alike."""
    headers = _headers(instance_id, row.path, "undo", reply_topic, task.started_at) | {"saga-round": str(row.round)}
    event_id = undo_id(instance_id, row)
    return _row(remote, "undo", key=instance_id, event_id=event_id, headers=headers, payload=task.input or "null")


def undo_id(instance_id: UUID, row: PlanRow) -> UUID:
    """The id of the undo command that an executing row has sent last.

    A person's resume counts attempts anew; what tells theirs apart is until when each is waited for.
    """
    until = f"/{row.not_before.timestamp():.6f}" if row.not_before is not None else ""
    return uuid5(instance_id, f"{row.path}!undo{row.round}/{row.attempts}{until}")


def _headers(instance_id: UUID, path: str, command: str, reply_topic: str, sent: datetime | None) -> dict[str, str]:
    assert sent is not None, f"{path} is a call without a beginning"
    return {
        "saga-command": command,
        "saga-id": str(instance_id),
        "saga-path": path,
        "saga-key": str(step_key(instance_id, path)),
        "saga-sent": _text(sent),
        "saga-reply-to": reply_topic,
    }


def _row(
    remote: Remote[object, object], command: str, *, key: UUID, event_id: UUID, headers: dict[str, str], payload: str
) -> OutboxRow:
    return OutboxRow(
        topic=remote.topic,
        key=str(key),
        event_id=event_id,
        event_type=f"{remote.name}.{command}",
        headers=json.dumps(headers),
        payload=payload.encode(),
    )


def _text(moment: datetime) -> str:
    return moment.isoformat()
