"""Commands and replies as records: what their headers say, read with care, and replies as rows of an outbox.

Headers of a command stand in `messages`. A reply has these:

| header         | meaning                                                                               |
|----------------|---------------------------------------------------------------------------------------|
| `saga-reply`   | `do` or `undo`: what it answers                                                       |
| `saga-id`      | the instance; also the key, so that its replies keep order                            |
| `saga-path`    | the step                                                                              |
| `saga-key`     | the idempotency key of the do, as in the command                                      |
| `saga-round`   | of an undo, as in the command                                                         |
| `saga-answers` | the id of the command message: an undo that was sent again has an answer of its own   |

The payload is what the saga's mailbox takes: `{"outcome": "completed", "output": ...}`, `{"outcome": "rejected" or
"unknown", "error": "..."}` for a do, `{"round": 0}` or `{"round": 0, "error": "..."}` for an undo. To the latter the
mailbox adds what `saga-answers` says, as `answers`: an old error must not be taken for one of a later attempt.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal, cast
from uuid import UUID

from outbox.codec import uuid7
from outbox.consumer.record import Arrival, storable
from saga import limits
from saga.state import OutboxRow, step_key

Kind = Literal["do", "undo"]

COMMAND: Final = "saga-command"
REPLY: Final = "saga-reply"

_TOPIC: Final = re.compile(r"[a-zA-Z0-9._-]{1,249}")
_ROUND_MAX: Final = 1_000_000
_OUTCOMES: Final = ("completed", "rejected", "unknown")


class UnreadableError(Exception):
    """A record says that it is a command or a reply, and is none that could be answered or delivered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One command, as its participant reads it."""

    kind: Kind
    key: UUID
    instance_id: UUID
    path: str
    contract: str
    payload: bytes
    reply_to: str
    sent: datetime
    until: datetime | None = None
    deadline: datetime | None = None
    round: int = 0
    message_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One reply, as the saga's service reads it."""

    kind: Kind
    instance_id: UUID
    path: str
    payload: str
    dedupe_key: str


def read_command(arrival: Arrival) -> Command:
    """The command in a record.

    Raises:
        UnreadableError: it is none that could be answered.
    """
    try:
        return _command(arrival)
    except (ValueError, OverflowError, OSError) as error:
        raise UnreadableError(f"a command that cannot be answered: {error}") from error


def _command(arrival: Arrival) -> Command:
    headers = arrival.headers
    kind = _kind(headers, COMMAND)
    contract, dot, ending = (arrival.event_type or "").rpartition(".")
    reply_to = _text(headers, "saga-reply-to")
    if not dot or ending != kind or not contract:
        raise ValueError(f"type {arrival.event_type!r}")
    if not _TOPIC.fullmatch(reply_to):
        raise ValueError(f"reply topic {reply_to!r}")
    return Command(
        kind=kind,
        key=UUID(_text(headers, "saga-key")),
        instance_id=UUID(_text(headers, "saga-id")),
        path=_path(headers),
        contract=contract,
        payload=arrival.record.value or b"",
        reply_to=reply_to,
        sent=_time(headers, "saga-sent") or datetime.fromtimestamp(arrival.record.timestamp / 1000, UTC),
        until=_time(headers, "saga-until"),
        deadline=_time(headers, "saga-deadline"),
        round=_round(headers),
        message_id=_message_id(headers, "ce_id"),
    )


def read_reply(arrival: Arrival) -> Reply:
    """The reply in a record.

    Raises:
        UnreadableError: it fits no step.
    """
    try:
        return _reply(arrival)
    except ValueError as error:
        raise UnreadableError(f"a reply that fits nothing: {error}") from error


def _reply(arrival: Arrival) -> Reply:
    headers = arrival.headers
    kind = _kind(headers, REPLY)
    instance_id, path = UUID(_text(headers, "saga-id")), _path(headers)
    if UUID(_text(headers, "saga-key")) != step_key(instance_id, path):
        raise ValueError("saga-key is not that of this step")
    payload = (arrival.record.value or b"").decode()
    plain = _storable(payload)
    if not _fits(kind, plain, headers):
        raise ValueError(f"the payload {payload[:100]!r} answers no {kind}")
    dedupe_key = "do"
    if kind == "undo":
        answers = _message_id(headers, "saga-answers")
        payload = json.dumps({**cast("dict[str, Any]", plain), "answers": answers})
        dedupe_key = f"undo/{_round(headers)}/{answers}"
    return Reply(kind=kind, instance_id=instance_id, path=path, payload=payload, dedupe_key=dedupe_key)


def _storable(payload: str) -> object:
    """What a payload says, if the journal can hold all of it."""
    plain = json.loads(payload, parse_constant=_refuse)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    text.encode()  # refuses a lone surrogate
    if "\\u0000" in text:
        raise ValueError("it contains U+0000")
    return plain


def _refuse(constant: str) -> None:
    raise ValueError(f"it contains {constant}")


def _fits(kind: Kind, plain: object, headers: "Headers") -> bool:
    """Whether a payload is one that the mailbox's reader understands."""
    if not isinstance(plain, dict) or not isinstance(plain.get("error", ""), str):
        return False
    return plain.get("round") == _round(headers) if kind == "undo" else plain.get("outcome") in _OUTCOMES


def reply(command: Command, payload: str) -> OutboxRow:
    """The answer to a command, as a message of its own each time that it is sent."""
    headers = {
        REPLY: command.kind,
        "saga-id": str(command.instance_id),
        "saga-path": command.path,
        "saga-key": str(command.key),
        "saga-answers": command.message_id,
    }
    if command.kind == "undo":
        headers["saga-round"] = str(command.round)
    return OutboxRow(
        topic=command.reply_to,
        key=str(command.instance_id),
        event_id=uuid7(),
        event_type=f"{command.contract}.{'reply' if command.kind == 'do' else 'undone'}",
        headers=json.dumps(headers, ensure_ascii=False),
        payload=payload.encode(),
    )


def answer_to_do(outcome: str, output: str | None, error: str | None) -> str:
    """What the mailbox takes for a do; the output is passed on to the letter."""
    if outcome == "completed":
        return f'{{"outcome": "completed", "output": {output or "null"}}}'
    return json.dumps({"outcome": outcome, "error": error or ""}, ensure_ascii=False)


def answer_to_undo(round_no: int, error: str | None = None) -> str:
    """What the mailbox takes for an undo."""
    plain: dict[str, Any] = {"round": round_no}
    if error is not None:
        plain["error"] = error
    return json.dumps(plain, ensure_ascii=False)


def text_of(error: BaseException) -> str:
    """What is told of an error: bounded, and storable."""
    text = storable(f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace"))
    return text[: limits.REASON_MAX_CHARACTERS]


Headers = Mapping[str, bytes | None]


def _kind(headers: Headers, name: str) -> Kind:
    kind = _text(headers, name)
    if kind not in ("do", "undo"):
        raise ValueError(f"{name} is {kind!r}")
    return cast("Kind", kind)


def _path(headers: Headers) -> str:
    path = _text(headers, "saga-path")
    if not 1 <= len(path.encode()) <= limits.PATH_MAX_BYTES:
        raise ValueError(f"saga-path has {len(path.encode())} bytes")
    return path


def _round(headers: Headers) -> int:
    if headers.get("saga-round") is None:
        return 0
    number = int(_text(headers, "saga-round"))
    if not 0 <= number <= _ROUND_MAX:
        raise ValueError(f"saga-round is {number}")
    return number


def _message_id(headers: Headers, name: str) -> str:
    return storable(headers.get(name) or b"")[: limits.NAME_MAX_BYTES]


def _time(headers: Headers, name: str) -> datetime | None:
    if headers.get(name) is None:
        return None
    moment = datetime.fromisoformat(_text(headers, name))
    if moment.tzinfo is None:
        raise ValueError(f"{name} has no time zone")
    return moment


def _text(headers: Headers, name: str) -> str:
    value = headers.get(name)
    if not value:
        raise ValueError(f"{name} is missing")
    text = value.decode()
    if "\x00" in text:
        raise ValueError(f"{name} contains U+0000")
    return text
