"""Going forward: the body, and what its next operation needs.

The body is kept alive between steps, so that a step costs no replay; after a claim, and where a decision is taken back,
it is run again from its start over the journal. Both ways must come by the same rows, in the same order:

* The rows after those consumed must be those of the operation that the body waits for: same path (branch, name,
  occurrence), kind and digest. Within a parallel they may be in any order.
* An operation without a row is new, and allowed only where all rows are consumed; an intent must be one of its slots.
* At the end of the body no row and no intent may be left.

Anything else is a divergence: the code is not what wrote this journal. Nothing is executed then.
"""

import json
from datetime import datetime, timedelta
from typing import Any, Final

from saga.body import At, Body, Slot
from saga.definition import Saga
from saga.errors import PayloadError
from saga.ledger import Ended, Ledger
from saga.run import DoParallel, DoReceive, DoSleep, Signal
from saga.state import Claimed, TaskRow


class Diverged(Exception):
    """The body and the journal do not agree.

    Attributes:
        path: of the journal's row or intent.
        journal: what the journal has there, in a few words.
        code: what the code asks for.
    """

    def __init__(self, path: str, problem: str, *, journal: str, code: str) -> None:
        super().__init__(f"diverged at {path}: {problem}")
        self.path: Final = path
        self.journal: Final = journal
        self.code: Final = code


class Unreadable(Exception):
    """A result cannot be read as what the step says now that it returns.

    Attributes:
        path: of the result.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(problem)
        self.path: Final = path


class Forward:
    """The body of one instance over its journal."""

    def __init__(self, saga: Saga[Any, Any], claimed: Claimed, ledger: Ledger) -> None:
        """Run the body to its first operation.

        Raises:
            PayloadError: the request cannot be read.
        """
        self._saga: Final = saga
        self._claimed: Final = claimed
        self._ledger: Final = ledger
        self._consumed = 0
        self.body = self._new_body()

    def _new_body(self) -> Body:
        request = self._saga.request.decode(self._claimed.request)
        return Body(self._saga, self._claimed.id, request, self._claimed.started_at)

    def rebuild(self) -> None:
        """Run the body again, from its start: a decision that it has seen was taken back."""
        self.body.close()
        self._consumed = 0
        self.body = self._new_body()

    @property
    def waits_for_calls_of_ours(self) -> bool:
        """Whether only an end of this worker's own calls can answer the body, and no time or mail."""
        at = self.body.position
        return isinstance(at, At) and all(slot.kind in ("step", "transactional") for slot in at.slots)

    def advance(self, now: datetime) -> None:
        """Answer operations as long as their rows are there, or can be decided; pending rows are added.

        Raises:
            Diverged: the body does not come by the journal's rows.
            Unreadable: a result does not fit.
        """
        while isinstance(at := self.body.position, At):
            self._check_order(at)
            rows = self._rows(at, now)
            if len(rows) < len(at.slots):
                return
            self._consumed += len(rows)
            self._answer(at, rows)
        self._check_end()

    def _rows(self, at: At, now: datetime) -> list[TaskRow]:
        """The rows that an operation has, or gets now, without those that cannot answer it."""
        rows, by_path, is_new = [], self._ledger.by_path, False
        for slot in at.slots:
            row = by_path.get(slot.path)
            if row is None:
                if not is_new:
                    is_new = True
                    self._check_intents(at)
                row = self._decide(slot, now)
            if row is not None and row.outcome != "unknown":
                rows.append(row)
        return rows

    def _answer(self, at: At, rows: list[TaskRow]) -> None:
        if len(rows) == 1 and rows[0].outcome == "completed" and not isinstance(at.operation, DoParallel):
            self.body.answer(self._value(at.slots[0], rows[0]), rows[0].completed_at)
            return
        moment = max(row.completed_at for row in rows)
        for row in rows:
            if row.outcome == "rejected":
                self.body.reject(row.error or "", moment)
                return
        values = tuple(self._value(slot, row) for slot, row in zip(at.slots, rows, strict=True))
        self.body.answer(values if isinstance(at.operation, DoParallel) else values[0], moment)

    def _value(self, slot: Slot, row: TaskRow) -> Any:
        try:
            if slot.call is not None:
                known = self._ledger.ended.get(slot.path)
                if known is not None and known.has_value:
                    value, known.value, known.has_value = known.value, None, False  # handed out once: it may be changed
                    return value
                return slot.target.result.decode(row.output or "null")
            operation = slot.operation
            if isinstance(operation, DoReceive):
                return None if row.output is None else _signal_of(operation, row.output)
            return operation.saga.result.decode(row.output or "null") if slot.kind == "child" else None  # type: ignore[attr-defined]
        except ValueError as error:
            problem = str(error) if isinstance(error, PayloadError) else f"{row.path}: {error}"
            raise Unreadable(row.path, problem) from error

    # -------------------------------------------------------------------------------------------- agreement

    def _check_order(self, at: At) -> None:
        rows, pending = self._ledger.rows, self._ledger.pending
        if self._consumed == len(rows) + len(pending):
            return
        index, slots = self._consumed, {slot.path: slot for slot in at.slots}
        total = len(rows) + len(pending)
        while index < total:
            row = rows[index] if index < len(rows) else pending[index - len(rows)]
            slot = slots.pop(row.path, None)
            if slot is None:
                if len(slots) == 0:
                    return
                asked = min(slots)
                raise Diverged(
                    row.path,
                    f"the journal has it where the code now asks for {asked}",
                    journal=f"{row.kind} {row.path}",
                    code=f"{slots[asked].kind} {asked}",
                )
            _check_same(slot, row.kind, row.digest or b"")
            index += 1

    def _check_intents(self, at: At) -> None:
        slots: dict[str, Slot] = {}
        for path, intent in self._ledger.intents.items():
            if path in self._ledger.by_path:
                continue
            slots = slots or {slot.path: slot for slot in at.slots}
            slot = slots.get(path)
            if slot is None:
                asked = min(slots)
                raise Diverged(
                    intent.path,
                    f"it may be happening where the code now asks for {asked}",
                    journal=f"{intent.kind} {intent.path}, begun",
                    code=f"{slots[asked].kind} {asked}",
                )
            _check_same(slot, intent.kind, intent.digest)

    def _check_end(self) -> None:
        rows = self._ledger.rows + self._ledger.pending
        if self._consumed < len(rows):
            row = rows[self._consumed]
            problem = "the journal has it, and the code does not ask for it any more"
            raise Diverged(row.path, problem, journal=f"{row.kind} {row.path}", code="the end of the body")
        for intent in self._ledger.open_intents():
            problem = "it may be happening, and the code does not ask for it any more"
            journal = f"{intent.kind} {intent.path}, begun"
            raise Diverged(intent.path, problem, journal=journal, code="the end of the body")

    # -------------------------------------------------------------------------------------------- new rows

    def _decide(self, slot: Slot, now: datetime) -> TaskRow | None:
        """The row that answers a slot, if what is known says so."""
        ended = self._ledger.ended.get(slot.path)
        if ended is not None:
            return self._ledger.add(self.row_of(slot, ended), by_absence=ended.by_absence)
        if slot.kind == "pivot":
            return self._ledger.add(_row(slot, at=self.body.run.now(), is_next=True))
        if slot.kind == "sleep":
            return self._ledger.add(_row(slot, at=now)) if now >= self.until(slot) else None
        return self._receive(slot, now) if slot.kind == "receive" else None

    def _receive(self, slot: Slot, now: datetime) -> TaskRow | None:
        taken = {
            json.loads(row.input)["no"]
            for row in (*self._ledger.rows, *self._ledger.pending)
            if row.kind == "receive" and row.input is not None
        }
        for no in sorted(self._ledger.mail):
            mail = self._ledger.mail[no]
            if mail.kind == "signal" and mail.name == slot.name and no not in taken:
                row = _row(slot, at=max(mail.at, self.body.run.now()), output=mail.payload, input=f'{{"no": {no}}}')
                return self._ledger.add(row)
        if now < self.until(slot):
            return None
        return self._ledger.add(_row(slot, at=now), by_absence=True)

    def until(self, slot: Slot) -> datetime:
        """When a sleep or a receive is over: from the last fact that the body has seen."""
        operation = slot.operation
        length = (
            operation.timeout_seconds
            if isinstance(operation, DoReceive)
            else operation.duration_seconds
            if isinstance(operation, DoSleep)
            else 0.0
        )
        return self.body.run.now() + timedelta(seconds=length)

    def row_of(self, slot: Slot, ended: Ended) -> TaskRow:
        """The row of a call that has ended."""
        intent = self._ledger.intents.get(slot.path)
        return TaskRow(
            seq=0,
            path=slot.path,
            name=slot.name,
            kind=slot.kind,
            digest=slot.digest or None,
            completed_at=ended.at,
            outcome=ended.outcome,
            input=intent.input if intent else slot.text if slot.kind != "lock" else None,
            output=ended.output,
            error=ended.error,
            attempts=max(1, intent.attempts + (ended.outcome != "unknown")) if intent else 1,
            max_attempts=slot.target.retry.attempts if slot.call is not None else 1,
            started_at=intent.started_at if intent else None,
        )


def _signal_of(operation: DoReceive, text: str) -> Signal:
    """What was sent; by others than `Handle.signal`, perhaps, and by the aliases of its fields."""
    return operation.signal.model_validate_json(text, by_alias=True, by_name=True)


def _row(slot: Slot, *, at: datetime, **columns: Any) -> TaskRow:
    return TaskRow(
        seq=0,
        path=slot.path,
        name=slot.name,
        kind=slot.kind,
        digest=slot.digest or None,
        completed_at=at,
        outcome="completed",
        **columns,
    )


def _check_same(slot: Slot, kind: str, digest: bytes) -> None:
    if slot.kind != kind:
        problem = f"the journal has a {kind}, the code asks for a {slot.kind}"
        raise Diverged(slot.path, problem, journal=f"{kind} {slot.path}", code=f"{slot.kind} {slot.path}")
    if slot.digest != digest:
        problem = "the code calls it with another input than the journal has"
        raise Diverged(slot.path, problem, journal=f"{kind} {slot.path}", code="the same with another input")
