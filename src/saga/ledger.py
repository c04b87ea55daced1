"""What is known of one instance: what its journal holds, what is decided and not yet written, what it was told.

Three layers, from hard to soft:

* `rows` and `intents` are written. They change when a checkpoint was applied, and never otherwise.
* `ended` is known and not written: results of this worker's own calls, answers that came as mail. It survives whatever
  happens to a checkpoint, because nobody else knows it.
* `pending` is derived: the rows of the next checkpoint. It may be thrown away and derived again.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from saga.errors import storable
from saga.state import (
    Checkpoint,
    Claimed,
    Intent,
    Late,
    Mail,
    Mailbox,
    OutboxRow,
    Outcome,
    PlanRow,
    TaskRow,
)

_ANSWERED: Final = {"reply": "remote", "child": "child"}
"""Which kind of call each kind of mail can end."""


@dataclass(slots=True, kw_only=True)
class Ended:
    """How a call ended, before the journal says so."""

    outcome: Outcome
    output: str | None = None
    error: str | None = None
    at: datetime
    outbox: tuple[OutboxRow, ...] = ()
    is_external: bool = True
    """Whether nobody could find out again: an effect outside of the journal's transaction, seen by this worker only."""
    value: object = None
    """The output as it was read back from its journal form, where `has_value` says so."""
    has_value: bool = False
    by_absence: bool = False
    """Whether it is so because something did not come; taken back where there is news."""


def ended_by(mail: Mail, *, not_before: datetime) -> Ended:
    """How a reply, the end of a child or a granted lock ends the call that it is about."""
    payload = json.loads(mail.payload) or {}  # of a lock, null
    error = payload.get("error")
    outcome: Outcome = "completed" if mail.kind == "lock" else payload["outcome"]
    return Ended(
        outcome=outcome,
        output=json.dumps(payload["output"], ensure_ascii=False) if "output" in payload else None,
        error=storable(error) if error is not None else None,
        at=max(mail.at, not_before),
        is_external=False,
    )


class Ledger:
    """The knowledge about one claimed instance."""

    def __init__(self, claimed: Claimed) -> None:
        """As the claim handed it over."""
        self.rows: Final[list[TaskRow]] = sorted(claimed.tasks, key=lambda row: row.seq)
        self.by_path: Final[dict[str, TaskRow]] = {row.path: row for row in self.rows}
        self.intents: Final[dict[str, Intent]] = {intent.path: intent for intent in claimed.intents}
        self.plan: Final[list[PlanRow]] = [row for row in claimed.plan if row.position]
        self.skipped: Final[dict[str, PlanRow]] = {row.path: row for row in claimed.plan if not row.position}
        """What a person has taken for undone before there was a plan."""
        self.ended: Final[dict[str, Ended]] = {}
        self.pending: Final[list[TaskRow]] = []
        self.by_absence: Final[set[str]] = set()
        """Pending rows that say that something did not come: they must not be written beside news."""
        self.mail: Final[dict[int, Mail]] = {mail.no: mail for mail in claimed.mailbox.mail}
        self.late: tuple[Late, ...] = claimed.mailbox.late
        self._next_seq = self.rows[-1].seq + 1 if self.rows else 1
        self._started_at: Final = claimed.started_at

    def row(self, path: str) -> TaskRow | None:
        """The row of a path, written or pending."""
        return self.by_path.get(path)

    def add(self, row: TaskRow, *, by_absence: bool = False) -> TaskRow:
        """Decide a row; it is numbered here. After one that belongs to what comes next, so do all."""
        row.seq = self._next_seq + len(self.pending)
        row.is_next = row.is_next or (bool(self.pending) and self.pending[-1].is_next)
        self.pending.append(row)
        self.by_path[row.path] = row
        if by_absence:
            self.by_absence.add(row.path)
        return row

    def forget_pending(self) -> None:
        """Undo every decision that is not written; what was told stays."""
        for row in self.pending:
            del self.by_path[row.path]
        self.pending.clear()
        self.by_absence.clear()
        for path in [path for path, ended in self.ended.items() if ended.by_absence]:
            del self.ended[path]

    def forget_next(self) -> None:
        """Undo the decisions that belong to what comes next."""
        kept = [row for row in self.pending if not row.is_next]
        for row in self.pending[len(kept) :]:
            del self.by_path[row.path]
            self.by_absence.discard(row.path)
        self.pending[:] = kept

    def written(self, checkpoint: Checkpoint, *, with_next: bool) -> None:
        """A checkpoint was applied, in whole or without what comes next."""
        done = 0
        for row in checkpoint.rows:
            if with_next or not row.is_next:
                done += 1
                self.rows.append(row)
                self.by_absence.discard(row.path)
                self.ended.pop(row.path, None)
                self._next_seq = row.seq + 1
        del self.pending[:done]
        # What an attempt has ended with since it was composed is not in it: that stays known.
        kept = {intent.path: self.intents.get(intent.path, intent) for intent in checkpoint.open}
        self.intents.clear()
        self.intents.update(kept)
        if with_next:
            for intent in checkpoint.next:
                self.intents[intent.path] = intent

    def read(self, mailbox: Mailbox) -> None:
        """Take in what a look at the mail showed."""
        self.mail.update({mail.no: mail for mail in mailbox.mail})
        self.late = mailbox.late

    def take_replies(self) -> None:
        """Replies, ends of children and granted locks end calls like facts do."""
        for mail in self.mail.values():
            call = self.intents.get(mail.name)
            is_open = mail.kind == "lock" or (call is not None and call.kind == _ANSWERED.get(mail.kind))
            if not is_open or mail.name in self.by_path:
                continue
            if (known := self.ended.get(mail.name)) is not None and not known.by_absence:
                continue
            self.ended[mail.name] = ended_by(mail, not_before=self._started_at)

    def late_of(self, path: str) -> list[Late]:
        """The late results of a step, oldest first."""
        return [late for late in self.late if late.path == path] if self.late else []

    def open_intents(self) -> Iterable[Intent]:
        """Intents whose call has no row yet."""
        if not self.intents:
            return ()
        return [intent for intent in self.intents.values() if intent.path not in self.by_path]
