"""Open calls: intents, attempts and what taints them, retries, and what a body's operation still needs.

An attempt ends in one of four ways, and what follows depends on what came before it:

| the attempt         | untainted             | tainted: an earlier one may have had its effect      |
|---------------------|-----------------------|------------------------------------------------------|
| completed           | completed             | completed: the same key, the same effect             |
| refused             | rejected              | unknown, or what the probe says                      |
| uncertain           | tried again, tainted  | tried again; attempts used up: unknown, or the probe |
| found by a claim    | tried again, tainted  | likewise: it counts as an uncertain attempt          |

After the pivot an unknown outcome cannot be undone, so the call is *stuck*: the instance pauses, and a person's resume
starts its attempts again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from saga import limits, messages
from saga.body import Slot
from saga.definition import Saga
from saga.errors import PayloadError
from saga.ledger import Ended, Ledger
from saga.plan import jitter
from saga.remote import Remote
from saga.run import DoChild, DoLock
from saga.state import (
    Asked,
    ChildStart,
    Claimed,
    Completed,
    Fact,
    Granted,
    Intent,
    NotHappened,
    OutboxRow,
    Refused,
    TaskRow,
    Uncertain,
    Unwritable,
    Work,
    step_key,
)
from saga.step import Target


@dataclass(slots=True, kw_only=True)
class Needs:
    """What an operation of the body still needs."""

    intents: list[Intent] = field(default_factory=list)
    """To be written before anything of them happens."""
    outbox: list[OutboxRow] = field(default_factory=list)
    children: list[ChildStart] = field(default_factory=list)
    ready: list[Work] = field(default_factory=list)
    """May start: their intents are written."""
    following: list[Work] = field(default_factory=list)
    """May start once `intents` are written, if nothing else has been heard by then."""
    alone: list[Work] = field(default_factory=list)
    """May start once everything that is decided is written: they commit by themselves."""
    wake_at: list[datetime] = field(default_factory=list)
    waits_for: str | None = None
    """The receive or sleep among it; for people."""


class Calls:
    """The open calls of one instance that goes forward."""

    def __init__(self, saga: Saga[Any, Any], claimed: Claimed, ledger: Ledger) -> None:
        """As the claim found them."""
        self._saga: Final = saga
        self._id: Final[UUID] = claimed.id
        self._deadline_at: Final = claimed.deadline_at
        self._ledger: Final = ledger
        self.pivoted = claimed.pivoted
        self.flying: Final[dict[str, Work]] = {}
        """What this worker performs now."""
        self.stuck: Final[dict[str, str]] = {}
        """Calls that need a person, and why."""
        self._asked: Final[set[str]] = set()
        self.has_asked_for_locks = False
        """Whether there are locks, or places in queues for them, that the claim did not find."""
        self._untouched: Final[set[str]] = {intent.path for intent in claimed.intents} if claimed.fresh else set()
        """Intents that nobody has acted upon: what they say cannot have happened."""

    # -------------------------------------------------------------------------------------------- how attempts end

    def claimed(self, targets: Callable[[str], Target | None], now: datetime) -> None:
        """Count the attempts that a claim found open; nobody knows what became of them."""
        for intent in list(self._ledger.open_intents()):
            if intent.phase == "stuck" and intent.until is not None:
                target = targets(intent.name)
                wait = timedelta(seconds=target.timeout_seconds if target else limits.STEP_TIMEOUT_SECONDS)
                self._keep(replace(intent, phase="do", until=now + wait, error=None))
            elif intent.phase == "stuck":
                self._begin_anew(intent, targets(intent.name))
            elif intent.kind == "step" and intent.flying and intent.path not in self._untouched:
                found = replace(intent, flying=False, error=intent.error or "its worker was lost")
                target = targets(intent.name)
                if intent.phase == "probe" or target is None:
                    self._keep(found)
                else:
                    self._failed(found, target, found.error or "", now)

    def _begin_anew(self, intent: Intent, target: Target | None) -> None:
        """A person wants a stuck call to be tried again. One that is called once at most is only asked about."""
        anew = replace(intent, attempts=0, probes=0, tainted=True, flying=False, not_before=None)
        if target is None or not target.at_most_once:
            self._keep(replace(anew, phase="do", error=None))
        elif target.ask is not None:
            self._keep(replace(anew, phase="probe"))
        else:
            self.stuck[intent.path] = (
                f"{intent.path} is unknown after the pivot, and is called once at most: {intent.error}; "
                f"say what it has brought: saga resume ID --step {intent.path} --result JSON"
            )

    def told(self, fact: Fact, now: datetime) -> None:
        """One attempt has ended."""
        work = self.flying.pop(fact.path)
        intent = self._ledger.intents.get(fact.path)
        match fact:
            case Completed():
                self._completed(work, fact, now)
            case Granted():
                self._end(fact.path, Ended(outcome="completed", at=now, is_external=False))
            case Asked():
                self._asked.add(fact.path)
            case Unwritable(problem=problem):
                self.stuck[fact.path] = f"{fact.path} happened, and its result cannot be written: {problem}"
            case NotHappened():
                reason = f"{work.name} did not happen: {intent.error if intent and intent.error else 'no answer'}"
                self._end(fact.path, Ended(outcome="rejected", error=reason, at=now))
            case Refused(reason=reason):
                if intent is None or not intent.tainted:
                    self._end(fact.path, Ended(outcome="rejected", error=reason, at=now, is_external=False))
                else:
                    self._exhausted(intent, _target(work), f"rejected: {reason}", now)
            case Uncertain(error=error):
                self._uncertain(work, intent, error, now)
            case _:
                raise AssertionError(f"unknown fact {fact!r}")

    def _completed(self, work: Work, fact: Completed, now: datetime) -> None:
        value = None
        if work.target is not None:
            try:
                value = work.target.result.decode(fact.output)
            except PayloadError as error:
                happened = "was rolled back" if work.kind == "transactional" else "happened"
                self.stuck[fact.path] = f"{fact.path} {happened}, and its result cannot be read back: {error}"
                return
        external = work.kind in ("step", "probe")
        ended = Ended(
            outcome="completed",
            output=fact.output,
            at=now,
            outbox=fact.outbox,
            is_external=external,
            value=value,
            has_value=work.target is not None,
        )
        self._end(fact.path, ended)

    def _uncertain(self, work: Work, intent: Intent | None, error: str, now: datetime) -> None:
        if intent is None:
            # A transaction that rolled back did nothing, and a step that raises what it did not declare has a bug.
            self.stuck[work.path] = f"{work.path} failed: {error}"
        elif work.kind == "probe":
            asked = replace(intent, probes=intent.probes + 1, flying=False)
            if asked.probes < limits.PROBE_ATTEMPTS:
                self._keep(replace(asked, not_before=now + self._delay(_target(work), work.key, asked.probes)))
            else:
                self._unknown(asked, f"the probe failed: {error}", now)
        else:
            self._failed(intent, _target(work), error, now)

    def _failed(self, intent: Intent, target: Target, error: str, now: datetime) -> None:
        attempts = intent.attempts + 1
        failed = replace(intent, attempts=attempts, tainted=True, flying=False, error=error)
        if attempts < target.retry.attempts:
            key = step_key(self._id, intent.path)
            self._keep(replace(failed, not_before=now + self._delay(target, key, attempts)))
        else:
            self._exhausted(failed, target, error, now)

    def _exhausted(self, intent: Intent, target: Target, error: str, now: datetime) -> None:
        if target.ask is not None:
            settled = now + timedelta(seconds=0.0 if target.fences else target.settle_seconds)
            self._keep(replace(intent, phase="probe", flying=False, tainted=True, error=error, not_before=settled))
        else:
            self._unknown(intent, error, now)

    def _unknown(self, intent: Intent, error: str, now: datetime) -> None:
        if self.pivoted:
            self._get_stuck(replace(intent, tainted=True), error)
        else:
            self._keep(replace(intent, flying=False, error=error))
            self._end(intent.path, Ended(outcome="unknown", error=error, at=now))

    def expire(self, now: datetime) -> None:
        """Commands whose reply did not come in time; after the pivot also those whose reply says that nobody knows."""
        for intent in tuple(self._ledger.intents.values()):
            if intent.kind != "remote" or intent.path in self._ledger.by_path:
                continue
            ended = self._ledger.ended.get(intent.path)
            if ended is not None and ended.outcome == "unknown" and self.pivoted:
                del self._ledger.ended[intent.path]
                self._get_stuck(intent, ended.error or "")
            elif ended is None and intent.path not in self.stuck and intent.until is not None and now >= intent.until:
                if self.pivoted:
                    self._get_stuck(intent, "no reply in time")
                else:
                    ended = Ended(
                        outcome="unknown", error="no reply in time", at=now, is_external=False, by_absence=True
                    )
                    self._end(intent.path, ended)

    def _get_stuck(self, intent: Intent, error: str) -> None:
        self._keep(replace(intent, phase="stuck", flying=False, error=error))
        self.stuck[intent.path] = f"{intent.path} is unknown after the pivot: {error}"

    def unfinished(self, reason: str, now: datetime) -> None:
        """Make a row of every call that has none: nothing more will be heard of it, so what did not end is unknown."""
        for intent in list(self._ledger.open_intents()):
            ended = self._ledger.ended.get(intent.path)
            if ended is None:
                if intent.path in self._untouched and intent.kind == "step" and not intent.tainted:
                    continue
                by_mail = intent.kind in ("remote", "child")
                ended = Ended(outcome="unknown", error=intent.error or reason, at=now, by_absence=by_mail)
            self._ledger.add(self._row(intent, ended), by_absence=ended.by_absence)

    def results(self) -> None:
        """Make a row of every result that nobody could find out again; for an instance whose body cannot be asked."""
        for intent in list(self._ledger.open_intents()):
            ended = self._ledger.ended.get(intent.path)
            if ended is not None and ended.is_external:
                self._ledger.add(self._row(intent, ended))

    def _row(self, intent: Intent, ended: Ended) -> TaskRow:
        target = self._saga.find(intent.name)
        return TaskRow(
            seq=0,
            path=intent.path,
            name=intent.name,
            kind=intent.kind,
            outcome=ended.outcome,
            digest=intent.digest,
            input=intent.input,
            output=ended.output,
            error=ended.error,
            attempts=max(1, intent.attempts + (ended.outcome != "unknown")),
            max_attempts=target.retry.attempts if target is not None else 1,
            started_at=intent.started_at,
            completed_at=ended.at,
        )

    def _keep(self, intent: Intent) -> None:
        self._ledger.intents[intent.path] = intent

    def _end(self, path: str, ended: Ended) -> None:
        self._ledger.ended[path] = ended

    def _delay(self, target: Target, key: UUID, failed: int) -> timedelta:
        return timedelta(seconds=target.retry.delay(failed, jitter(key, failed)))

    # -------------------------------------------------------------------------------------------- what comes next

    def open(self, *, held: bool) -> tuple[Intent, ...]:
        """Intents that a checkpoint has to keep."""
        if not self._ledger.intents:
            return ()
        kept = []
        for intent in self._ledger.open_intents():
            known = held or intent.path in self._untouched
            flying = intent.flying if not known else intent.kind == "step"
            kept.append(intent if intent.flying == flying else replace(intent, flying=flying))
        return tuple(kept)

    def written(self, intents: tuple[Intent, ...]) -> None:
        """These intents are new in the journal."""
        self._untouched.update(intent.path for intent in intents)

    def fly(self, works: Sequence[Work]) -> tuple[Work, ...]:
        """Start them."""
        for work in works:
            self._untouched.discard(work.path)
            self.flying[work.path] = work
            intent = self._ledger.intents.get(work.path)
            if intent is not None and not intent.flying:
                self._keep(replace(intent, flying=True))
        return tuple(works)

    def need(self, needs: Needs, slot: Slot, now: datetime) -> None:
        """What one slot without a row needs."""
        if slot.path in self.flying or slot.path in self.stuck:
            return
        intent = self._ledger.intents.get(slot.path)
        if slot.kind == "transactional":
            needs.alone.append(self._work(slot, "transactional", 1))
        elif slot.kind == "lock":
            if slot.path not in self._asked:
                needs.alone.append(self._lock(slot))
        elif intent is None:
            self._intend(needs, slot, now)
        elif slot.kind == "step":
            kind = "probe" if intent.phase == "probe" else "step"
            needs.ready.append(self._work(slot, kind, intent.attempts + 1, not_before=intent.not_before))
        elif intent.until is not None:
            needs.wake_at.append(intent.until)

    def _intend(self, needs: Needs, slot: Slot, now: datetime) -> None:
        intent = Intent(
            path=slot.path,
            name=slot.name,
            kind=slot.kind,
            digest=slot.digest,
            input=slot.text,
            flying=slot.kind == "step",
            started_at=now,
        )
        if slot.kind == "step":
            needs.following.append(self._work(slot, "step", 1))
        elif slot.kind == "remote":
            assert isinstance(slot.target, Remote)
            intent = replace(intent, until=now + timedelta(seconds=slot.target.timeout_seconds))
            needs.outbox.append(messages.do(self._id, slot.target, intent, self._saga.reply_topic, self._deadline_at))
            assert intent.until is not None
            needs.wake_at.append(intent.until)
        elif isinstance(slot.operation, DoChild):
            needs.children.append(_child(self._id, slot, slot.operation, intent, now))
        needs.intents.append(intent)

    def _work(self, slot: Slot, kind: Any, attempt: int, *, not_before: datetime | None = None) -> Work:
        assert slot.call is not None
        return Work(
            kind=kind,
            instance_id=self._id,
            path=slot.path,
            name=slot.name,
            key=step_key(self._id, slot.path),
            attempt=attempt,
            timeout_seconds=slot.target.timeout_seconds,
            target=slot.target,
            values=slot.call.values,
            not_before=not_before,
        )

    def _lock(self, slot: Slot) -> Work:
        assert isinstance(slot.operation, DoLock)
        self.has_asked_for_locks = True
        return Work(
            kind="lock",
            instance_id=self._id,
            path=slot.path,
            name=slot.name,
            key=step_key(self._id, slot.path),
            attempt=1,
            timeout_seconds=limits.STEP_TIMEOUT_SECONDS,
            lock_key=slot.operation.key,
        )


def _child(parent: UUID, slot: Slot, operation: DoChild, intent: Intent, now: datetime) -> ChildStart:
    child = operation.saga
    return ChildStart(
        id=step_key(parent, slot.path),
        workflow_id=child.workflow_id,
        name=child.name,
        version=child.version,
        key=f"{parent}/{slot.path}",
        digest=slot.digest,
        request=intent.input,
        started_at=now,
        deadline_at=now + timedelta(seconds=child.deadline_seconds),
        parent_path=slot.path,
    )


def _target(work: Work) -> Target:
    assert work.target is not None, f"{work.kind} of {work.path} has no step"
    return work.target
