"""The journal in memory: what the statements of `journal.sql` do, on Python values, for tests that need no database.

It keeps the same promises by the same means: epoch, checkpoint number and wake-up counter are compared when a
checkpoint is written, what belongs to what comes next is left out where there is news, and a strict one changes nothing
then. Values cross it as JSON, so what a body sees has been through the journal's form.
"""

import json
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from saga.definition import Saga
from saga.state import (
    ENDED,
    Answer,
    Checkpoint,
    ChildStart,
    Claimed,
    Ending,
    Intent,
    Late,
    Mail,
    Mailbox,
    OutboxRow,
    PlanRow,
    State,
    TaskRow,
    intents_from_json,
    intents_to_json,
)

MAX_CRASHES: Final = 5
"""Without progress in between; one more pauses the instance."""


@dataclass(slots=True, kw_only=True)
class Row:
    """One instance, as `saga.workflow_instances` and its tables hold it."""

    id: UUID
    name: str
    version: int
    request: str
    started_at: datetime
    deadline_at: datetime
    state: State = "pending"
    is_ready: bool = True
    owner: str | None = None
    epoch: int = 0
    no: int = 0
    claimed_no: int = 0
    crash_count: int = 0
    wakeups: int = 0
    cancel_reason: str | None = None
    pivoted: bool = False
    ending: Ending | None = None
    wake_at: datetime | None = None
    paused_reason: str | None = None
    error: str | None = None
    output: str | None = None
    intents: str | None = None
    tasks: list[TaskRow] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    """Under which each of the tasks was written."""
    plan: dict[tuple[str, int], PlanRow] = field(default_factory=dict)
    mail: list[Mail] = field(default_factory=list)
    late: list[Late] = field(default_factory=list)
    late_known: set[tuple[str, int]] = field(default_factory=set)
    """Path and epoch of each."""
    parent_id: UUID | None = None
    parent_path: str | None = None
    locks: set[str] = field(default_factory=set)


class MemoryJournal:
    """All instances of one database."""

    def __init__(self) -> None:
        """An empty journal."""
        self.rows: Final[dict[UUID, Row]] = {}
        self.outbox: Final[list[OutboxRow]] = []
        self._locks: Final[dict[str, list[tuple[UUID, str]]]] = {}
        """Key to whom it belongs, and who waits for it, in order."""
        self._shelf: Final[dict[UUID, tuple[int, int]]] = {}

    # -------------------------------------------------------------------------------------------- starting

    def start(
        self,
        saga: Saga[Any, Any],
        instance_id: UUID,
        request: str,
        now: datetime,
        *,
        intents: tuple[Intent, ...] = (),
        outbox: tuple[OutboxRow, ...] = (),
    ) -> None:
        """Insert an instance."""
        self.rows[instance_id] = Row(
            id=instance_id,
            name=saga.name,
            version=saga.version,
            request=request,
            started_at=now,
            deadline_at=now + timedelta(seconds=saga.deadline_seconds),
            intents=intents_to_json(intents),
        )
        self.outbox.extend(outbox)

    def _start_child(self, parent: Row, child: ChildStart) -> None:
        if child.id not in self.rows:
            self.rows[child.id] = Row(
                id=child.id,
                name=child.name,
                version=child.version,
                request=child.request,
                started_at=child.started_at,
                deadline_at=child.deadline_at,
                parent_id=parent.id,
                parent_path=child.parent_path,
            )

    # -------------------------------------------------------------------------------------------- claiming

    def claim(self, instance_id: UUID, owner: str) -> Claimed | None:
        """Take an instance that wants a worker."""
        row = self.rows[instance_id]
        if not row.is_ready:
            return None
        fresh = row.epoch == 0
        row.epoch += 1
        row.claimed_no = row.no
        row.owner, row.is_ready, row.wake_at = owner, False, None
        row.state = "compensating" if row.ending else "running"
        return Claimed(
            id=row.id,
            epoch=row.epoch,
            checkpoint_no=row.no,
            fresh=fresh,
            state=row.state,
            ending=row.ending,
            error=row.error,
            pivoted=row.pivoted,
            started_at=row.started_at,
            deadline_at=row.deadline_at,
            request=row.request,
            intents=intents_from_json(row.intents),
            tasks=tuple(row.tasks),
            plan=tuple(row.plan.values()),
            mailbox=self.look(instance_id),
            has_locks=any(one == row.id for queue in self._locks.values() for one, _ in queue),
            parent_id=row.parent_id,
            parent_path=row.parent_path,
        )

    def look(self, instance_id: UUID) -> Mailbox:
        """What others told the instance."""
        row = self.rows[instance_id]
        return Mailbox(wakeups=row.wakeups, cancel_reason=row.cancel_reason, mail=tuple(row.mail), late=tuple(row.late))

    def take_over(self, instance_id: UUID) -> None:
        """The owner is dead: whatever it still writes is fenced off."""
        row = self.rows[instance_id]
        if row.owner is None:
            return
        row.owner, row.is_ready = None, True
        row.epoch += 1
        row.crash_count = 0 if row.no > row.claimed_no else row.crash_count + 1
        if row.crash_count > MAX_CRASHES:
            row.state, row.is_ready = "paused", False
            row.paused_reason = f"crash loop: its worker was lost {row.crash_count} times without any progress"

    def resume(self, instance_id: UUID) -> None:
        """A person lets a paused instance go on."""
        row = self.rows[instance_id]
        if row.state == "paused":
            row.state, row.paused_reason, row.is_ready = "waiting", None, True

    # -------------------------------------------------------------------------------------------- writing

    def write(self, checkpoint: Checkpoint) -> Answer:
        """Apply a checkpoint, in whole, in part, or not."""
        row = self.rows[checkpoint.id]
        answer = self._compare(row, checkpoint)
        if answer.kind in ("applied", "news") and row.no == checkpoint.no:
            self._apply(row, checkpoint, with_next=answer.kind == "applied")
            self._shelf[row.id] = (row.no, checkpoint.epoch if answer.kind == "applied" else -1)
        return answer

    def _compare(self, row: Row, checkpoint: Checkpoint) -> Answer:
        if row.epoch != checkpoint.epoch:
            return Answer(kind="fenced")
        kind: Any = "news" if row.wakeups != checkpoint.seen else "applied"
        if row.no == checkpoint.no + 1:  # sent again: it was applied before
            kind = "applied" if self._shelf.get(row.id) == (row.no, row.epoch) else "news"
        elif row.no != checkpoint.no:
            kind = "broken"
        elif kind == "news" and checkpoint.strict:
            kind = "changed"
        return Answer(kind=kind, wakeups=row.wakeups, cancel_reason=row.cancel_reason)

    def _apply(self, row: Row, checkpoint: Checkpoint, *, with_next: bool) -> None:
        row.no += 1
        row.tasks += [task for task in checkpoint.rows if with_next or not task.is_next]
        row.epochs += [checkpoint.epoch] * (len(row.tasks) - len(row.epochs))
        for planned in (*checkpoint.plan, *(checkpoint.plan_next if with_next else ())):
            row.plan[planned.path, planned.round] = planned
        self.outbox.extend(message for message in checkpoint.outbox if with_next or not message.is_next)
        row.intents = intents_to_json((*checkpoint.open, *(checkpoint.next if with_next else ())))
        if with_next:
            for child in checkpoint.children:
                self._start_child(row, child)
            row.state, row.wake_at = checkpoint.state, checkpoint.wake_at
            row.owner = row.owner if checkpoint.held else None
            row.pivoted = row.pivoted or checkpoint.pivoted
            row.ending = checkpoint.ending or row.ending
            row.paused_reason, row.error = checkpoint.paused_reason, checkpoint.error or row.error
            row.output = checkpoint.output

    # -------------------------------------------------------------------------------------------- wake-ups

    def tell(self, instance_id: UUID, kind: Any, name: str, payload: str, now: datetime) -> None:
        """Add mail, and make a waiting instance ready."""
        row = self.rows[instance_id]
        row.mail.append(Mail(no=len(row.mail) + 1, kind=kind, name=name, payload=payload, at=now))
        self.wake(instance_id)

    def wake(self, instance_id: UUID) -> None:
        """Count a wake-up; an instance that waits wants a worker from now on."""
        row = self.rows[instance_id]
        row.wakeups += 1
        if row.owner is None and row.state in ("waiting", "compensating"):
            row.is_ready, row.wake_at = True, None

    def cancel(self, instance_id: UUID, reason: str) -> None:
        """Ask for a cancel."""
        row = self.rows[instance_id]
        if row.state not in ENDED:
            row.cancel_reason = row.cancel_reason or reason
            self.wake(instance_id)

    def due(self, now: datetime) -> None:
        """Let the timers go off."""
        for row in self.rows.values():
            if row.owner is None and row.wake_at is not None and row.wake_at <= now:
                row.is_ready, row.wake_at = True, None

    def record_late(self, instance_id: UUID, epoch: int, late: Late) -> None:
        """Keep the result of a run that had lost the instance, unless it has journalled it or said so before; open its
        compensation again.
        """  # noqa: D205 - one thought
        row = self.rows[instance_id]
        written = zip(row.tasks, row.epochs, strict=True)
        if any((task.path, task.outcome, of) == (late.path, "completed", epoch) for task, of in written):
            return
        if (late.path, epoch) in row.late_known:
            return
        row.late_known.add((late.path, epoch))
        row.late.append(late)
        if row.state in ENDED and any(path == late.path for path, _ in row.plan):
            row.state, row.is_ready = "compensating", True
        self.wake(instance_id)

    # -------------------------------------------------------------------------------------------- locks, children

    def acquire(self, instance_id: UUID, key: str, path: str) -> bool:
        """Take a lock, or queue up for it; whether it is held now."""
        queue = self._locks.setdefault(key, [])
        if not any(waiting == instance_id for waiting, _ in queue):
            queue.append((instance_id, path))
        if queue[0][0] == instance_id:
            self.rows[instance_id].locks.add(key)
            return True
        return False

    def release_locks(self, instance_id: UUID, now: datetime) -> None:
        """Give back the locks of an instance that has ended, and leave every queue."""
        self.rows[instance_id].locks.clear()
        for key, queue in self._locks.items():
            held = bool(queue) and queue[0][0] == instance_id
            queue[:] = [(waiting, path) for waiting, path in queue if waiting != instance_id]
            if held and queue:
                waiting, path = queue[0]
                self.rows[waiting].locks.add(key)
                self.tell(waiting, "lock", path, "null", now)

    def tell_parent(self, instance_id: UUID, now: datetime) -> None:
        """Tell the parent that its child has ended."""
        row = self.rows[instance_id]
        if row.parent_id is None or row.parent_path is None:
            return
        payload: dict[str, Any] = {
            "outcome": "completed" if row.state == "completed" else "rejected",
            "state": row.state,
        }
        if row.state == "completed":
            payload["output"] = json.loads(row.output or "null")
        else:
            payload["error"] = row.error
        self.tell(row.parent_id, "child", row.parent_path, json.dumps(payload), now)

    def undo_child(self, child_id: UUID) -> bool:
        """Ask a child to undo itself; whether there is nothing to undo any more."""
        row = self.rows.get(child_id)
        if row is None or row.state in ("failed", "cancelled"):
            return True
        if row.state == "completed":
            row.state, row.ending, row.error, row.is_ready = "compensating", "cancelled", "its parent is undone", True
            row.plan.clear()
            self.wake(child_id)
        else:
            self.cancel(child_id, "its parent is undone")
        return False
