"""Checkpoints: what is decided about one instance, as the one write that its journal takes."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from saga.calls import Calls, Needs
from saga.compensating import Following
from saga.errors import storable
from saga.ledger import Ledger
from saga.state import Checkpoint, Claimed, Ending, OutboxRow, PlanRow


class Composer:
    """Composes the checkpoints of one instance."""

    def __init__(self, claimed: Claimed, ledger: Ledger, calls: Calls) -> None:
        """After a claim."""
        self._claimed: Final = claimed
        self._ledger: Final = ledger
        self._calls: Final = calls
        self.no = claimed.checkpoint_no
        """Checkpoints written before."""
        self.seen = claimed.mailbox.wakeups
        """The wake-up counter as it was when the mail was last looked at."""

    @property
    def passes_pivot(self) -> bool:
        """Whether the pivot is among what is decided and not written."""
        pending = self._ledger.pending
        return bool(pending) and pending[-1].is_next and any(row.kind == "pivot" for row in pending)

    def forward(self, now: datetime, needs: Needs, *, held: bool) -> Checkpoint:
        """Results, and the intents of what comes next; or of what is waited for."""
        pivoted = self._calls.pivoted or self.passes_pivot
        wake_at = needs.wake_at if pivoted else [*needs.wake_at, self._claimed.deadline_at]
        return self._checkpoint(
            now,
            open=self._calls.open(held=held),
            next=tuple(needs.intents),
            outbox=(*self._emitted(), *needs.outbox),
            children=tuple(needs.children),
            state="running" if held else "waiting",
            held=held,
            wake_at=None if held else min(wake_at, default=None),
            waits_for=None if held else needs.waits_for,
        )

    def completed(self, now: datetime, output: str) -> Checkpoint:
        """The last results, and the end."""
        return self._checkpoint(now, outbox=self._emitted(), state="completed", held=False, output=output)

    def back(
        self,
        now: datetime,
        step: Following,
        changes: tuple[PlanRow, ...],
        *,
        ending: Ending,
        plan: Sequence[PlanRow] = (),
        error: str | None = None,
        strict: bool = False,
    ) -> Checkpoint:
        """What became of the plan, and its next row; with `plan`, that it begins."""
        following = {(row.path, row.round): row for row in (*plan, *step.rows)}
        return self._checkpoint(
            now,
            strict=strict,
            plan=changes,
            plan_next=tuple(following.values()),
            outbox=(*self._emitted(), *step.outbox),
            state=ending if step.is_end else "compensating",
            held=step.held,
            wake_at=step.wake_at,
            ending=ending,
            error=error if error is not None else self._claimed.error,
        )

    def paused(
        self,
        now: datetime,
        reason: str,
        plan: tuple[PlanRow, ...] | None,
        *,
        verdict: tuple[Ending, str] | None = None,
        strict: bool = False,
    ) -> Checkpoint:
        """Results, and that a person is needed.

        Args:
            now: the time.
            reason: why.
            plan: what has changed in it, where it is being undone.
            verdict: that it is to be undone and why, where the plan for that cannot be made: it stays decided.
            strict: as in `back`.
        """
        ending, error = verdict if verdict is not None else (None, self._claimed.error)
        return self._checkpoint(
            now,
            strict=strict,
            plan=plan or (),
            outbox=self._emitted(),
            open=self._calls.open(held=False) if plan is None and verdict is None else (),
            state="paused",
            held=False,
            paused_reason=storable(reason),
            ending=ending,
            error=error,
        )

    def _emitted(self) -> tuple[OutboxRow, ...]:
        """Messages of transactional steps whose rows are about to be written."""
        emitted: list[OutboxRow] = []
        for row in self._ledger.pending:
            known = self._ledger.ended.get(row.path)
            if known is not None and known.outbox:
                emitted += [replace(message, is_next=False) for message in known.outbox]
        return tuple(emitted)

    def _checkpoint(self, now: datetime, *, strict: bool = False, **columns: Any) -> Checkpoint:
        return Checkpoint(
            id=self._claimed.id,
            epoch=self._claimed.epoch,
            no=self.no,
            seen=self.seen,
            strict=strict or bool(self._ledger.by_absence),
            rows=tuple(self._ledger.pending),
            pivoted=self.passes_pivot,
            at=now,
            **columns,
        )
