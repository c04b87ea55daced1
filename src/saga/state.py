"""What the journal holds, what may happen, and what is decided, as values.

Nothing here does anything. `decider.Execution` turns facts into a `Decision`; `journal` writes its `Checkpoint`; a
worker performs its `Work` and reports `Fact`s. JSON is text here: it is encoded and decoded by the types of `codec`.

They are not frozen, because that doubles the time it takes to make one, and a step makes ten. Nobody changes a value
that somebody else has.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias
from uuid import UUID

from outbox.codec import uuid5
from saga.step import Target

Kind: TypeAlias = Literal["step", "transactional", "remote", "child", "receive", "sleep", "lock", "pivot"]
Outcome: TypeAlias = Literal["completed", "rejected", "unknown"]
State: TypeAlias = Literal[
    "pending", "running", "waiting", "compensating", "paused", "completed", "failed", "cancelled"
]
Ending: TypeAlias = Literal["failed", "cancelled"]
PlanStatus: TypeAlias = Literal["pending", "executing", "completed", "failed"]
AnswerKind: TypeAlias = Literal["applied", "news", "changed", "fenced", "broken"]
Chore: TypeAlias = Literal["release_locks", "tell_parent"]

ENDED: Final[frozenset[str]] = frozenset({"completed", "failed", "cancelled"})


@lru_cache(maxsize=8_192)
def step_key(instance_id: UUID, path: str) -> UUID:
    """The idempotency key of a step, which is also the id of its task."""
    return uuid5(instance_id, path)


def undo_key(instance_id: UUID, path: str, round_no: int) -> UUID:
    """The idempotency key of a compensation; one that has to act again, after a late result, has another."""
    return uuid5(instance_id, f"{path}!undo{round_no}")


# ------------------------------------------------------------------------------------------------ the journal


@dataclass(slots=True, kw_only=True)
class TaskRow:
    """One journalled fact of the body: a row of `saga.tasks`."""

    seq: int
    path: str
    name: str
    kind: Kind
    outcome: Outcome
    digest: bytes | None = None
    input: str | None = None
    output: str | None = None
    error: str | None = None
    attempts: int = 1
    max_attempts: int = 1
    started_at: datetime | None = None
    completed_at: datetime
    is_next: bool = False
    """Whether it belongs to what comes next, and is not written where there is news."""


@dataclass(slots=True, kw_only=True)
class Intent:
    """A call that is about to happen, or may be happening: written before it has any effect.

    An intent without a task is why an outcome is unknown. `flying`: an attempt may be under way now, so that a claim
    which finds it counts one more. `tainted`: some attempt may have had its effect, so that a rejection is not clean.
    """

    path: str
    name: str
    kind: Kind
    digest: bytes
    input: str
    attempts: int = 0
    """Attempts that ended, or are taken for ended."""
    tainted: bool = False
    flying: bool = True
    phase: Literal["do", "probe", "stuck"] = "do"
    probes: int = 0
    """Times that asking failed."""
    not_before: datetime | None = None
    until: datetime | None = None
    """When the reply to a command is no longer waited for."""
    started_at: datetime | None = None
    error: str | None = None
    """What the last attempt ended with."""


_quoted: Final = json.encoder.encode_basestring
_TIMES: Final = ("not_before", "until", "started_at")


def intents_to_json(intents: tuple[Intent, ...]) -> str | None:
    """The column `intents`; null without any."""
    return f"[{','.join(map(intent_to_json, intents))}]" if intents else None


def intent_to_json(intent: Intent) -> str:
    """One intent; what equals its default is left out. The input is text in it, and so comes back to the letter."""
    text = (
        f'{{"path":{_quoted(intent.path)},"name":{_quoted(intent.name)},"kind":"{intent.kind}"'
        f',"digest":"{intent.digest.hex()}","attempts":{intent.attempts}'
        f',"flying":{"true" if intent.flying else "false"}'
        f',"input":{_quoted(intent.input)}'
    )
    if intent.started_at is not None:
        text += f',"started_at":"{intent.started_at.isoformat()}"'
    if intent.tainted:
        text += ',"tainted":true'
    if intent.probes:
        text += f',"probes":{intent.probes}'
    if intent.phase != "do":
        text += f',"phase":"{intent.phase}"'
    if intent.error is not None:
        text += f',"error":{_quoted(intent.error)}'
    if intent.not_before is not None:
        text += f',"not_before":"{intent.not_before.isoformat()}"'
    if intent.until is not None:
        text += f',"until":"{intent.until.isoformat()}"'
    return text + "}"


def intents_from_json(text: str | None) -> tuple[Intent, ...]:
    """The intents of a column."""
    return tuple(_intent(plain) for plain in json.loads(text)) if text else ()


def _intent(plain: dict[str, Any]) -> Intent:
    for name in _TIMES:
        if name in plain:
            plain[name] = datetime.fromisoformat(plain[name])
    plain["digest"] = bytes.fromhex(plain["digest"])
    return Intent(**plain)


@dataclass(slots=True, kw_only=True)
class PlanRow:
    """One compensation of the plan: a row of `saga.saga_compensations`."""

    position: int
    """Order of execution, from 1."""
    task_seq: int
    path: str
    name: str
    kind: Kind
    round: int = 0
    """Counts how often a late result opened it again."""
    required: bool = True
    status: PlanStatus = "pending"
    attempts: int = 0
    not_before: datetime | None = None
    late_seen: int = 0
    """Late results of the step when this compensation began; one more means that it has to act again."""
    error: str | None = None
    executed_at: datetime | None = None
    action: str = ""
    """What undoes it, for people."""
    data: str | None = None
    """The result that is undone, for people."""


@dataclass(slots=True, kw_only=True)
class Mail:
    """Something that others told the instance; numbered, never changed.

    `name` is the signal's for kind `signal`, and the path of the step for `reply`, `undone`, `child` and `lock`.
    """

    no: int
    kind: Literal["signal", "reply", "undone", "child", "lock"]
    name: str
    payload: str
    at: datetime


@dataclass(slots=True, kw_only=True)
class Late:
    """The result of a call whose worker had lost the instance by the time it came."""

    path: str
    output: str


@dataclass(slots=True, kw_only=True)
class Mailbox:
    """What is new for an instance, as one look shows it."""

    wakeups: int
    cancel_reason: str | None = None
    pause_asked: str | None = None
    """Why a person wants it to pause; what is under way ends first."""
    mail: tuple[Mail, ...] = ()
    late: tuple[Late, ...] = ()
    """All of them, every time: they are few."""


@dataclass(slots=True, kw_only=True)
class Claimed:
    """One instance as a claim hands it over."""

    id: UUID
    epoch: int
    checkpoint_no: int
    fresh: bool
    """Whether no worker ever had it: what its intents say cannot have happened yet, commands excepted."""
    state: State
    ending: Ending | None = None
    error: str | None = None
    pivoted: bool = False
    started_at: datetime
    deadline_at: datetime
    request: str
    intents: tuple[Intent, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    plan: tuple[PlanRow, ...] = ()
    mailbox: Mailbox
    has_locks: bool = False
    parent_id: UUID | None = None
    parent_path: str | None = None


# ------------------------------------------------------------------------------------------------ facts


@dataclass(slots=True, kw_only=True)
class Fact:
    """What became of one piece of work; `path` says which."""

    path: str


@dataclass(slots=True, kw_only=True)
class Completed(Fact):
    """It happened, and this is the result; of a compensation: it is undone."""

    output: str = "null"
    outbox: tuple["OutboxRow", ...] = ()
    """What a transactional step emitted: it rides in the checkpoint."""


@dataclass(slots=True, kw_only=True)
class Refused(Fact):
    """This attempt did nothing, and says so."""

    reason: str


@dataclass(slots=True, kw_only=True)
class Uncertain(Fact):
    """This attempt ended without an answer: a timeout, a lost connection, any exception."""

    error: str


@dataclass(slots=True, kw_only=True)
class Unwritable(Fact):
    """It happened, and its result cannot be journalled: a bug of the step."""

    problem: str


@dataclass(slots=True, kw_only=True)
class NotHappened(Fact):
    """A probe says so."""


@dataclass(slots=True, kw_only=True)
class Granted(Fact):
    """The lock is ours."""


@dataclass(slots=True, kw_only=True)
class Asked(Fact):
    """It is under way elsewhere, and mail will tell: a lock in use, a child that undoes itself."""


# ------------------------------------------------------------------------------------------------ decisions


@dataclass(slots=True, kw_only=True)
class OutboxRow:
    """One message in the outbox of the saga's database."""

    topic: str
    key: str
    event_id: UUID
    event_type: str
    headers: str | None
    payload: bytes
    schema_version: int = 1
    is_next: bool = True


@dataclass(slots=True, kw_only=True)
class ChildStart:
    """A saga to be started by its parent's checkpoint."""

    id: UUID
    workflow_id: UUID
    name: str
    version: int
    key: str
    digest: bytes
    request: str
    started_at: datetime
    deadline_at: datetime
    parent_path: str


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """One write of one instance. Result part: `rows`, `plan` and `outbox` without `is_next`, and `open`. Next part: the
    rest. Where the instance has news (its wake-up counter is not `seen`), the result part is written and the next part
    is not; if `strict`, nothing is.
    """  # noqa: D205 - one thought

    id: UUID
    epoch: int
    no: int
    seen: int
    strict: bool = False
    rows: tuple[TaskRow, ...] = ()
    plan: tuple[PlanRow, ...] = ()
    plan_next: tuple[PlanRow, ...] = ()
    outbox: tuple[OutboxRow, ...] = ()
    children: tuple[ChildStart, ...] = ()
    open: tuple[Intent, ...] = ()
    next: tuple[Intent, ...] = ()
    state: State
    held: bool
    """Whether the worker keeps the instance."""
    wake_at: datetime | None = None
    pivoted: bool = False
    ending: Ending | None = None
    output: str | None = None
    paused_reason: str | None = None
    waits_for: str | None = None
    """The receive or sleep that the body waits for; for people."""
    error: str | None = None
    at: datetime

    def tells_of(self, path: str) -> bool:
        """Whether it says what became of a step, or of its compensation."""
        return any(row.path == path for row in self.rows) or any(row.path == path for row in self.plan)


@dataclass(slots=True, kw_only=True)
class Answer:
    """What became of a checkpoint, all of it read from the locked row."""

    kind: AnswerKind
    wakeups: int = 0
    cancel_reason: str | None = None


WorkKind: TypeAlias = Literal["step", "transactional", "probe", "undo", "undo_transactional", "lock", "undo_child"]


@dataclass(slots=True, kw_only=True)
class Work:
    """One attempt of one call, for a worker to perform and to report as a `Fact` of the same path."""

    kind: WorkKind
    instance_id: UUID
    path: str
    name: str
    key: UUID
    """The idempotency key."""
    attempt: int
    timeout_seconds: float
    target: Target | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    done: object = None
    """For an undo: the result, or `Unknown`."""
    ask_first: bool = False
    """For an undo of an unknown step with a probe: ask, and undo what is found."""
    lock_key: str | None = None
    child_id: UUID | None = None
    not_before: datetime | None = None


@dataclass(slots=True, kw_only=True)
class Decision:
    """What to do now: start `start`; write `checkpoint`, or look at the mail, or wait for the next fact."""

    start: tuple[Work, ...] = ()
    checkpoint: Checkpoint | None = None
    look: bool = False
    released: bool = False
    chores: tuple[Chore, ...] = ()
    late: tuple[Late, ...] = ()
