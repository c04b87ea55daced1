"""The journal: checkpoints, starts and claims as statements on schema `saga`.

A checkpoint of one instance is a value (`state.Checkpoint`); `write` sends those of many instances in one statement and
one commit. What a crash or a lost connection does to it:

* Before COMMIT is durable nothing of it is there, for any of its instances. After it, all of it is.
* If the reply is lost nobody knows which. The same values are sent again before anything else is decided: the row then
  carries the number after the one that the checkpoint follows, and says whether it was applied in whole or beside news.
* A checkpoint of an owner that has lost the instance finds another epoch: `fenced`, nothing is written.

Instances whose rows somebody else holds (an open cancel, a signal in a long transaction) do not hold up the others:
they are answered `locked` and sent again alone, with `wait=True`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, cast
from uuid import UUID

from outbox import postgres
from outbox.postgres import Connection, Pool, Record
from saga.definition import Saga
from saga.starting import First
from saga.state import (
    Answer,
    AnswerKind,
    Checkpoint,
    ChildStart,
    Claimed,
    Late,
    Mail,
    Mailbox,
    OutboxRow,
    PlanRow,
    TaskRow,
    intents_from_json,
    intents_to_json,
    step_key,
    undo_key,
)

SQL: Final = postgres.Statements("saga", "journal.sql")

_STRICT, _HELD, _PIVOT = 1, 2, 4
_REST: Final = ("ending", "error", "paused_reason", "waits_for")


@dataclass(slots=True, kw_only=True)
class Written:
    """The answer to one checkpoint of a group."""

    id: UUID
    answer: Answer | None
    """None: somebody else has locked the row; send it again alone, waiting."""
    again: bool
    """Whether it had been applied before: its first reply was lost."""


async def write(
    db: "Connection | Pool", checkpoints: Sequence[Checkpoint], *, wait: bool = False, timeout: float | None = None
) -> list[Written]:
    """Write checkpoints of different instances in one statement.

    Args:
        db: a pool, or a connection; inside an open transaction it is the caller's to commit.
        checkpoints: at most one of an instance.
        wait: whether to wait for locked rows; for a single one, under the session's `lock_timeout`.
        timeout: seconds; the usual one of a statement where it is not given.

    Raises:
        postgres.PostgresError: a value was refused (find the guilty one by halves), or the server is in trouble.
    """
    statement = SQL.checkpoint_waiting if wait else SQL.checkpoint
    arguments = _arguments(checkpoints)
    if timeout is None:
        rows = await statement.fetch(db, *arguments)
    else:
        rows = await statement.fetch(db, *arguments, timeout=timeout)
    return [_written(row) for row in rows]


def _written(row: Record) -> Written:
    kind: str = row["answer"]
    if kind == "locked":
        return Written(id=row["id"], answer=None, again=False)
    answer = Answer(kind=cast("AnswerKind", kind), wakeups=row["wakeups"], cancel_reason=row["cancel"])
    return Written(id=row["id"], answer=answer, again=row["again"] and kind in ("applied", "news"))


def _arguments(checkpoints: Sequence[Checkpoint]) -> list[Any]:
    """The parameters of the statement, in order."""
    tasks = [(c.id, row) for c in checkpoints for row in c.rows]
    outbox = [(c.id, row) for c in checkpoints for row in c.outbox]
    return [
        [c.id for c in checkpoints],
        [c.epoch for c in checkpoints],
        [c.no for c in checkpoints],
        [c.seen for c in checkpoints],
        [_STRICT * c.strict + _HELD * c.held + _PIVOT * c.pivoted for c in checkpoints],
        [c.state for c in checkpoints],
        [c.wake_at for c in checkpoints],
        [intents_to_json((*c.open, *c.next)) for c in checkpoints],
        [intents_to_json(c.open) for c in checkpoints],
        [c.output for c in checkpoints],
        [_rest(c) for c in checkpoints],
        [c.at for c in checkpoints],
        [step_key(of, row.path) for of, row in tasks],
        [of for of, _ in tasks],
        [row.seq for _, row in tasks],
        [row.path for _, row in tasks],
        [row.name for _, row in tasks],
        [row.kind for _, row in tasks],
        [row.outcome for _, row in tasks],
        [row.digest for _, row in tasks],
        [row.input for _, row in tasks],
        [row.output for _, row in tasks],
        [row.error for _, row in tasks],
        [row.attempts for _, row in tasks],
        [row.max_attempts for _, row in tasks],
        [row.started_at for _, row in tasks],
        [row.completed_at for _, row in tasks],
        [row.is_next for _, row in tasks],
        _plan(checkpoints),
        _children(checkpoints),
        [of for of, _ in outbox],
        *_messages([row for _, row in outbox]),
        [row.is_next for _, row in outbox],
    ]


def _messages(rows: Sequence[OutboxRow]) -> list[Any]:
    return [
        [row.topic for row in rows],
        [row.key for row in rows],
        [row.event_id for row in rows],
        [row.event_type for row in rows],
        [row.schema_version for row in rows],
        [row.headers for row in rows],
        [row.payload for row in rows],
    ]


def _rest(checkpoint: Checkpoint) -> str | None:
    given = {name: text for name in _REST if (text := getattr(checkpoint, name)) is not None}
    return json.dumps(given, ensure_ascii=False) if given else None


def _plan(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Rows of the plan as JSON, null where there are none."""
    texts = [
        _plan_row(checkpoint.id, row, is_next=is_next)
        for checkpoint in checkpoints
        for is_next, rows in ((False, checkpoint.plan), (True, checkpoint.plan_next))
        for row in rows
    ]
    return f"[{','.join(texts)}]" if texts else None


def _plan_row(instance_id: UUID, row: PlanRow, *, is_next: bool) -> str:
    columns = {
        "id": str(undo_key(instance_id, row.path, row.round)),
        "instance_id": str(instance_id),
        "task_id": str(step_key(instance_id, row.path)),
        "task_seq": row.task_seq,
        "path": row.path,
        "name": row.name,
        "kind": row.kind,
        "round": row.round,
        "position": row.position,
        "action": row.action,
        "required": row.required,
        "status": row.status,
        "attempts": row.attempts,
        "not_before": _text(row.not_before),
        "late_seen": row.late_seen,
        "executed_at": _text(row.executed_at),
        "error": row.error,
        "is_next": is_next,
    }
    return f'{json.dumps(columns, ensure_ascii=False)[:-1]}, "data": {row.data or "null"}}}'


def _children(checkpoints: Sequence[Checkpoint]) -> str | None:
    texts = [_child(checkpoint.id, child) for checkpoint in checkpoints for child in checkpoint.children]
    return f"[{','.join(texts)}]" if texts else None


def _child(parent_id: UUID, child: ChildStart) -> str:
    columns = {
        "id": str(child.id),
        "workflow_id": str(child.workflow_id),
        "name": child.name,
        "version": child.version,
        "key": child.key,
        "digest": child.digest.hex(),
        "started_at": _text(child.started_at),
        "deadline_at": _text(child.deadline_at),
        "parent_id": str(parent_id),
        "parent_path": child.parent_path,
    }
    return f'{json.dumps(columns)[:-1]}, "request": {child.request}}}'


def _text(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment is not None else None


# ------------------------------------------------------------------------------------------------ starting


@dataclass(slots=True, kw_only=True)
class Start:
    """An instance to be started."""

    id: UUID
    saga: Saga[Any, Any]
    key: str
    digest: bytes
    request: str
    started_at: datetime
    deadline_at: datetime
    first: First


async def start(
    db: "Connection | Pool", starts: Sequence[Start], *, owner: UUID | None = None
) -> list[tuple[UUID, str]]:
    """Start instances in one statement; for each the id under its key, and what became of it.

    `started`; `exists`: the same request was started under this key; `conflict`: another one; `unseen`: the caller's
    transaction is older than the start that has the key, and has to be tried again.

    Args:
        db: a pool, or a connection; inside an open transaction the starts are the caller's to commit.
        starts: of different keys.
        owner: a living worker that gets them at once; never inside a caller's transaction.
    """
    rows = await SQL.start.fetch(db, *_start_arguments(starts, owner))
    return [(row["id"], row["answer"]) for row in rows]


def _start_arguments(starts: Sequence[Start], owner: UUID | None) -> list[Any]:
    """The parameters of the statement, in order."""
    outbox = [(s.id, row) for s in starts for row in s.first.outbox]
    return [
        [s.id for s in starts],
        [s.saga.workflow_id for s in starts],
        [s.saga.name for s in starts],
        [s.saga.version for s in starts],
        [s.key for s in starts],
        [s.digest for s in starts],
        [s.request for s in starts],
        [intents_to_json(s.first.intents) for s in starts],
        [s.started_at for s in starts],
        [s.deadline_at for s in starts],
        owner,
        [of for of, _ in outbox],
        *_messages([row for _, row in outbox]),
    ]


# ------------------------------------------------------------------------------------------------ claiming


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A claimed instance, and what a worker needs to know besides."""

    workflow_id: UUID
    crash_count: int
    claimed: Claimed


async def claim(db: "Connection | Pool", owner: UUID, limit: int, workflows: Sequence[UUID]) -> list[Lease]:
    """Take instances of these definitions that are ready, longest first."""
    return [lease_of(row) for row in await SQL.claim.fetch(db, owner, limit, list(workflows))]


def lease_of(row: Record) -> Lease:
    """An instance with its journal, as `saga.read_claimed` returns it."""
    claimed = Claimed(
        id=row["id"],
        epoch=row["epoch"],
        checkpoint_no=row["checkpoint_no"],
        fresh=row["fresh"],
        state=row["state"],
        ending=row["ending"],
        error=row["error"],
        pivoted=row["pivoted"],
        started_at=row["started_at"],
        deadline_at=row["deadline_at"],
        request=row["request"],
        intents=intents_from_json(row["intents"]),
        tasks=_tasks(row) if row["seqs"] else (),
        plan=_planned(row["plan"]) if row["plan"] else (),
        mailbox=_mailbox(row),
        has_locks=row["has_locks"],
        parent_id=row["parent_id"],
        parent_path=row["parent_path"],
    )
    return Lease(workflow_id=row["workflow_id"], crash_count=row["crash_count"], claimed=claimed)


def _tasks(row: Record) -> tuple[TaskRow, ...]:
    names = (
        "seqs",
        "paths",
        "names",
        "kinds",
        "outcomes",
        "digests",
        "inputs",
        "outputs",
        "errors",
        "attempts",
        "starts",
        "ends",
    )
    return tuple(
        TaskRow(
            seq=seq,
            path=path,
            name=name,
            kind=kind,
            outcome=outcome,
            digest=digest,
            input=given,
            output=output,
            error=error,
            attempts=attempts,
            started_at=started_at,
            completed_at=completed_at,
        )
        for seq, path, name, kind, outcome, digest, given, output, error, attempts, started_at, completed_at in zip(
            *(row[column] for column in names), strict=True
        )
    )


def _planned(text: str) -> tuple[PlanRow, ...]:
    rows = []
    for plain in json.loads(text):
        for column in ("not_before", "executed_at"):
            if plain[column] is not None:
                plain[column] = datetime.fromisoformat(plain[column])
        rows.append(PlanRow(**plain))
    return tuple(rows)


def _mailbox(row: Record) -> Mailbox:
    mail: tuple[Mail, ...] = ()
    late: tuple[Late, ...] = ()
    if row["mail_nos"]:
        columns = ("mail_nos", "mail_kinds", "mail_names", "mail_payloads", "mail_times")
        mail = tuple(
            Mail(no=no, kind=kind, name=name, payload=payload, at=at)
            for no, kind, name, payload, at in zip(*(row[column] for column in columns), strict=True)
        )
    if row["late_paths"]:
        late = tuple(
            Late(path=path, output=output or "null")
            for path, output in zip(row["late_paths"], row["late_outputs"], strict=True)
        )
    return Mailbox(
        wakeups=row["wakeups"],
        cancel_reason=row["cancel_reason"],
        pause_asked=row["pause_asked"],
        mail=mail,
        late=late,
    )


async def look(db: "Connection | Pool", instance_id: UUID) -> Mailbox:
    """What others told an instance."""
    row = await SQL.look.fetchrow(db, instance_id)
    assert row is not None, f"instance {instance_id} is gone while a worker has it"
    return _mailbox(row)


async def record_late(db: "Connection | Pool", instance_id: UUID, epoch: int, late: Late) -> str:
    """Keep the result of a run that was fenced: `recorded`; `known`, where the journal has it; `duplicate`."""
    return str(await SQL.record_late.fetchval(db, instance_id, late.path, epoch, late.output))
