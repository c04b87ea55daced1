"""Going back: the plan, one compensation after the other, in reverse.

The plan is made once, when compensation starts, from the tasks that were completed or are unknown. Each row is a step
of its own: `executing` is written before it has any effect, its result together with `executing` of the next one.

* A compensation is tried again until its retries are used up; then one with `required=False` ends `failed` and the next
  one follows, any other pauses the instance, and those after it stay `pending`.
* An external step that is unknown, or was tried more than once, is undone only once none of its calls can land any more
  (`not_before`), unless its service fences.
* A late result of a step opens its compensation again, in another round with another key, unless the one under way
  began after it was known. That holds on an instance that has ended, too.
* Cancel and deadline change nothing any more.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from saga import limits, messages
from saga.context import Unknown
from saga.definition import Saga
from saga.errors import PayloadError
from saga.ledger import Ledger
from saga.plan import Retried, Stuck, find
from saga.remote import Remote
from saga.state import (
    Asked,
    Completed,
    Fact,
    Mail,
    OutboxRow,
    PlanRow,
    TaskRow,
    Uncertain,
    Work,
    WorkKind,
    step_key,
    undo_key,
)
from saga.step import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """What a checkpoint has to say about the compensation that comes next."""

    rows: tuple[PlanRow, ...] = ()
    outbox: tuple[OutboxRow, ...] = ()
    held: bool = False
    wake_at: datetime | None = None
    is_end: bool = False


class Compensating:
    """The plan of one instance, and what happens next in it."""

    def __init__(self, saga: Saga[Any, Any], instance_id: UUID, ledger: Ledger, plan: Sequence[PlanRow]) -> None:
        """With the plan as it is written."""
        self._saga: Final = saga
        self._id: Final = instance_id
        self._ledger: Final = ledger
        self._written: dict[tuple[str, int], PlanRow] = {(row.path, row.round): row for row in plan}
        self._changes: dict[tuple[str, int], PlanRow] = {}
        """What is known and not written."""
        self._mail_seen: Final[set[int]] = set()
        self._asked: Final[set[tuple[str, int]]] = set()
        """Children that were asked to undo themselves; mail will tell."""
        self._expired: Final[set[str]] = set()

    # -------------------------------------------------------------------------------------------- the plan

    @property
    def rows(self) -> list[PlanRow]:
        """The plan in the order of execution, as known."""
        merged = {**self._written, **self._changes}
        return sorted(merged.values(), key=lambda row: (row.position, row.round))

    @property
    def changes(self) -> tuple[PlanRow, ...]:
        """Rows that are known to be otherwise than written."""
        return tuple(self._changes.values())

    @property
    def current(self) -> PlanRow | None:
        """The first row that is not done with."""
        return next((row for row in self.rows if row.status != "completed" and not _given_up(row)), None)

    def written(self, result: tuple[PlanRow, ...], following: tuple[PlanRow, ...]) -> None:
        """A checkpoint with these rows was applied."""
        for row in (*result, *following):
            self._written[row.path, row.round] = row
        for row in result:
            if self._changes.get((row.path, row.round)) == row:
                del self._changes[row.path, row.round]

    def forget(self, path: str) -> None:
        """What was told about a row is taken back: the transaction that it was told in was rolled back."""
        self._changes = {key: row for key, row in self._changes.items() if key[0] != path}

    def _change(self, row: PlanRow, **columns: Any) -> PlanRow:
        changed = replace(row, **columns)
        self._changes[row.path, row.round] = changed
        return changed

    # -------------------------------------------------------------------------------------------- what was told

    def claimed(self, now: datetime) -> None:
        """After a claim: attempts of a process that is gone count; what made the instance pause is tried again."""
        for row in self.rows:
            if row.status == "failed" and row.required:
                self._change(row, status="pending", attempts=0, not_before=None)
        self.read(now)  # what fails by that is no news of before the pause
        for row in self.rows:
            if row.status == "executing" and row.kind in ("step", "child"):
                self._change(row, status="pending", attempts=row.attempts + (row.kind == "step"))

    def read(self, now: datetime) -> None:
        """Take in mail and late results."""
        for no in sorted(self._ledger.mail.keys() - self._mail_seen):
            self._mail_seen.add(no)
            self._told_by_mail(self._ledger.mail[no], now)
        for row in {row.path: row for row in self.rows}.values():
            self._reopen_if_late(row)

    def _told_by_mail(self, mail: Mail, now: datetime) -> None:
        row = self.current
        if row is None or row.path != mail.name or row.status != "executing":
            return
        payload = json.loads(mail.payload)
        if mail.kind == "undone" and payload.get("round", 0) == row.round:
            error = payload.get("error")
            asked = str(messages.undo_id(self._id, row))
            if not error:
                self.told(Completed(path=row.path), now)
            elif payload.get("answers", asked) == asked:  # else of an attempt that has been counted
                self.told(Uncertain(path=row.path, error=error), now)
        elif mail.kind == "child":
            undone = payload.get("state") in ("failed", "cancelled")
            if undone:
                self.told(Completed(path=row.path), now)
            else:
                self._asked.discard((row.path, row.round))  # it completed in between: ask again

    def told(self, fact: Fact, now: datetime) -> None:
        """One attempt of the current row has ended."""
        row = self.current
        assert row is not None, fact
        assert row.path == fact.path, (row, fact)
        if isinstance(fact, Asked):
            self._asked.add((row.path, row.round))
        elif isinstance(fact, Completed):
            self._change(row, status="completed", attempts=row.attempts + 1, error=None, executed_at=now)
            self._reopen_if_late(self._changes[row.path, row.round])
        else:
            self._failed(row, _error_of(fact), now)

    def _failed(self, row: PlanRow, error: str, now: datetime) -> None:
        retried = self._retried(row)
        attempts = row.attempts + 1
        if attempts < retried.attempts:
            not_before = now + retried.delay(undo_key(self._id, row.path, row.round), attempts)
            self._change(row, status="pending", attempts=attempts, error=error, not_before=not_before)
        else:
            self._change(row, status="failed", attempts=attempts, error=error, executed_at=now)

    def _reopen_if_late(self, row: PlanRow) -> None:
        """Another round for a compensation that is done, if a result of its step came that it did not know."""
        if row.status != "completed" or len(self._ledger.late_of(row.path)) <= row.late_seen:
            return
        again = replace(
            row, round=row.round + 1, status="pending", attempts=0, not_before=None, error=None, executed_at=None
        )
        self._changes[again.path, again.round] = again

    def _late_seen(self, row: PlanRow) -> int:
        """The late results that a round knows: those that its first attempt knew. A later attempt has the same key, so
        where the first one has had its effect, it has none.
        """  # noqa: D205 - one thought
        is_first = row.attempts == 0 and row.error is None
        return len(self._ledger.late_of(row.path)) if is_first else row.late_seen

    # -------------------------------------------------------------------------------------------- what is next

    @property
    def stuck(self) -> str | None:
        """Why compensation cannot go on: the required row whose attempts are used up."""
        row = self.current
        if row is None or row.status != "failed":
            return None
        return f"compensation of {row.path} failed {row.attempts} times: {row.error}"

    def expire(self, now: datetime) -> bool:
        """Count an undo command whose reply has not come in time as a failed attempt; whether there was one."""
        row = self.current
        if row is None or row.kind != "remote" or row.status != "executing":
            return False
        if row.not_before is None or now < row.not_before:
            return False
        self._expired.add(row.path)
        self._failed(row, "no reply in time", now)
        return True

    def take_back(self) -> None:
        """There is news: what was decided because something did not come is decided again."""
        for path in self._expired:
            self.forget(path)
        self._expired.clear()

    def ready(self, now: datetime) -> Work | None:
        """The attempt that may start now, because the journal says all that it has to.

        Raises:
            Stuck: what it needs cannot be found or read.
        """
        row = self.current
        if row is None or row.kind == "remote" or self._is_long(row, now):
            return None
        if row.kind == "transactional":
            return None if self._changes else self._work(row)
        if not self._has_begun(row) or (row.path, row.round) in self._asked:
            return None
        return self._work(self._change(row, status="executing", late_seen=self._late_seen(row)))

    def check(self) -> None:
        """See that the code can undo everything that is left, and not only what is next.

        Raises:
            Stuck: it cannot.
        """
        for row in self.rows:
            if row.status == "completed" or _given_up(row):
                continue
            if row.kind == "remote":
                self._target(row)
            else:
                self._work(row)

    def following(self, now: datetime) -> "Following":
        """What has to be written for the current row.

        Raises:
            Stuck: what it needs cannot be found.
        """
        row = self.current
        if row is None:
            return Following(is_end=True)
        if row.status == "executing" or self._is_long(row, now):
            return Following(wake_at=row.not_before)
        if row.kind == "transactional":
            return Following(held=True)
        if row.kind != "remote":
            begun = replace(row, status="executing", late_seen=self._late_seen(row))
            return Following(rows=(begun,), held=True)
        target = self._target(row)
        assert isinstance(target, Remote), target
        until = now + timedelta(seconds=self._retried(row).timeout_seconds)
        sent = replace(row, status="executing", not_before=until, late_seen=self._late_seen(row))
        command = messages.undo(self._id, target, sent, self._task(row), self._saga.reply_topic)
        return Following(rows=(sent,), outbox=(command,), wake_at=until)

    def _has_begun(self, row: PlanRow) -> bool:
        written = self._written.get((row.path, row.round))
        return written is not None and written.status == "executing"

    def _is_long(self, row: PlanRow, now: datetime) -> bool:
        return row.not_before is not None and row.not_before > now + timedelta(seconds=limits.SUSPEND_SECONDS)

    def _work(self, row: PlanRow) -> Work:
        """The attempt that undoes a row.

        Raises:
            Stuck: what it needs cannot be found or read.
        """
        task = self._task(row)
        common: dict[str, Any] = {
            "instance_id": self._id,
            "path": row.path,
            "name": row.name,
            "key": undo_key(self._id, row.path, row.round),
            "attempt": row.attempts + 1,
            "not_before": row.not_before,
        }
        if row.kind == "child":
            child_id = step_key(self._id, row.path)
            return Work(kind="undo_child", timeout_seconds=limits.STEP_TIMEOUT_SECONDS, child_id=child_id, **common)
        target = self._target(row)
        kind: WorkKind = "undo_transactional" if row.kind == "transactional" else "undo"
        try:
            values = target.arguments.decode(task.input or "null")
            done, ask_first = self._done(row, task, target)
        except PayloadError as error:
            raise Stuck(row.path, f"{row.path} cannot be undone: {error}") from error
        return Work(
            kind=kind,
            target=target,
            values=values,
            done=done,
            ask_first=ask_first,
            timeout_seconds=self._retried(row).timeout_seconds,
            **common,
        )

    def _target(self, row: PlanRow) -> Target:
        """What undoes a row.

        Raises:
            Stuck: the code has it no more, or as something else.
        """
        target = find(self._saga, row.path, row.name)
        lacks = f"is a {target.kind} step" if target.kind != row.kind else "has no compensation"
        if target.kind != row.kind or (row.kind != "remote" and target.undo is None):
            raise Stuck(
                row.path,
                f"{row.path} has to be undone as a {row.kind} step, and {row.name} {lacks} in the code of "
                f"{self._saga.name} any more; bring it back, or skip it: saga resume ID --skip {row.path} --reason ...",
            )
        return target

    def _task(self, row: PlanRow) -> TaskRow:
        """The journalled step of a row."""
        task = self._ledger.row(row.path)
        assert task is not None, f"{row.path} is in the plan and not in the journal"
        return task

    def _done(self, row: PlanRow, task: TaskRow, target: Target) -> tuple[object, bool]:
        if task.outcome == "completed":
            return target.result.decode(task.output or "null"), False
        late = self._ledger.late_of(row.path)
        if late:
            return target.result.decode(late[-1].output), False
        return Unknown(str(step_key(self._id, row.path))), target.ask is not None

    def _retried(self, row: PlanRow) -> Retried:
        return Retried(self._saga.find(row.name) if row.kind != "child" else None)


def _given_up(row: PlanRow) -> bool:
    return row.status == "failed" and not row.required


def _error_of(fact: Fact) -> str:
    for name in ("error", "reason", "problem"):
        text = getattr(fact, name, None)
        if text:
            return str(text)
    return type(fact).__name__
