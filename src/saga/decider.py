"""What happens next with one instance: a pure function of its journal and of what it is told.

`Execution` is handed what a claim read, and then one thing at a time: a fact, the answer to a checkpoint, a look at the
mail. Each time it says what to do now. It reads no clock, holds no connection and starts nothing, so the tests and
`saga.testing` drive the same code as the worker.

    decision = execution.begin(now)
    while not decision.released:
        ...                                     # start the work in decision.start
        if decision.checkpoint is not None:     # at most one is in flight
            decision = execution.answered(await write(decision.checkpoint), now)
        elif decision.look:
            decision = execution.mail(await look(), now)
        else:
            decision = execution.fact(await next_finished_work, now)

The states of an instance that is held:
* *forward*: the body waits for an operation. What it needs and has no intent becomes an intent of the next checkpoint;
  once that is applied, its work starts. Results are journalled as they come, together with the intents that follow.
* *back*: the plan is worked off, one row at a time (`compensating`).
* *released*: suspended until a timer or mail, ended, paused, or another worker has it.

What a crash does, by what was written last:
* An intent, and no result: the call may have happened. The next claim counts an attempt, and no rejection is clean any
  more; with attempts left it is tried again under the same key, else it is unknown.
* A result and the next intent: as above for the next call; the result is never asked for again.
* `executing` in the plan, and no result: the compensation is tried again under the same key.

Cancel and deadline are looked at where something would begin or be waited for, and never while a call is in flight. So
is a person's wish to pause, which comes first.
They close the body. So does an unknown outcome. After the pivot nothing is undone: what would be, pauses.
"""

from datetime import datetime, timedelta
from typing import Any, Final

from saga import limits
from saga.body import At, Body, Broke, Position, Raised, Returned
from saga.calls import Calls, Needs
from saga.compensating import Compensating
from saga.composing import Composer
from saga.definition import Saga
from saga.errors import BodyError, PayloadError
from saga.forward import Diverged, Forward, Unreadable
from saga.ledger import Ledger
from saga.plan import Stuck, make_plan
from saga.state import (
    ENDED,
    Answer,
    Checkpoint,
    Chore,
    Claimed,
    Completed,
    Decision,
    Ending,
    Fact,
    Late,
    Mailbox,
    State,
    Work,
)

_SOON: Final = timedelta(seconds=limits.SUSPEND_SECONDS)
_WAIT: Final = Decision()
"""Nothing new: wait for what is under way."""


class Execution:
    """One claimed instance."""

    def __init__(self, saga: Saga[Any, Any], claimed: Claimed) -> None:
        """As the claim handed it over; nothing happens before `begin`."""
        self._saga: Final = saga
        self._claimed: Final = claimed
        self._ledger: Final = Ledger(claimed)
        self._calls: Final = Calls(saga, claimed, self._ledger)
        self._compose: Final = Composer(claimed, self._ledger, self._calls)
        self._cancel = claimed.mailbox.cancel_reason
        self._pause_asked = claimed.mailbox.pause_asked
        self._ending = claimed.ending
        self._verdict: tuple[Ending, str] | None = None
        """That it has to be undone, decided and not written."""
        self._forward: Forward | None = None
        self._back: Compensating | None = None
        self._undoing: dict[str, Work] = {}
        self._writing: Checkpoint | None = None
        self._following: tuple[Work, ...] = ()
        """What starts once that is applied, if nothing else has been heard by then."""
        self._has_heard = True
        """Whether something was told since the body was run last."""
        self._looking = False
        self._released = False
        self.problem: Exception | None = None
        """What keeps the code from going on with this journal, where that is why the instance pauses."""

    @property
    def epoch(self) -> int:
        """Under which it was claimed."""
        return self._claimed.epoch

    # -------------------------------------------------------------------------------------------- what is told

    def begin(self, now: datetime) -> Decision:
        """What to do first."""
        self._ledger.take_replies()
        if self._ending is not None and self._ledger.plan:
            self._back = Compensating(self._saga, self._claimed.id, self._ledger, self._ledger.plan)
            self._back.claimed(now)
        elif self._ending is not None:  # no plan yet: it had completed and is opened again, or none could be made
            self._verdict, self._ending = (self._ending, self._claimed.error or "its parent is undone"), None
        return self._decide(now)

    def fact(self, fact: Fact, now: datetime) -> Decision:
        """A piece of work has ended."""
        if self._released:
            return _WAIT
        self._has_heard = True
        if fact.path in self._undoing and self._back is not None:
            del self._undoing[fact.path]
            self._back.told(fact, now)
        else:
            self._calls.told(fact, now)
        return self._decide(now)

    def answered(self, answer: Answer, now: datetime) -> Decision:
        """What became of the checkpoint that was asked for.

        Raises:
            RuntimeError: the journal was written by somebody else under the same epoch, which cannot be.
        """
        checkpoint, self._writing = self._writing, None
        assert checkpoint is not None, "an answer, and nothing was asked"
        match answer.kind:
            case "applied":
                return self._applied(checkpoint, now)
            case "news":
                self._apply(checkpoint, with_next=False)
                self._looking = True
                return Decision(look=True)
            case "changed":
                self._take_back()
                self._looking = True
                return Decision(look=True)
            case "fenced":
                return self._fenced()
            case "broken":
                self.release()
                raise RuntimeError(
                    f"instance {checkpoint.id}: checkpoint {checkpoint.no + 1} of epoch {checkpoint.epoch} is somebody"
                    " else's; two workers share an epoch, or the journal was edited"
                )

    def mail(self, mailbox: Mailbox, now: datetime) -> Decision:
        """What a look at the mail showed."""
        self._looking = False
        self._has_heard = True
        self._compose.seen = mailbox.wakeups
        self._cancel = mailbox.cancel_reason
        self._pause_asked = mailbox.pause_asked
        self._ledger.read(mailbox)
        self._ledger.take_replies()
        if self._back is not None:
            self._back.read(now)
        return self._decide(now)

    def withdraw(self, path: str, now: datetime, *, changed: bool = False) -> Decision:
        """A transactional step, or the compensation of one, was rolled back after its fact was told: it did not happen.

        Args:
            path: of the step.
            now: the time.
            changed: the checkpoint was refused because of news, so the mail has to be looked at first.
        """
        self._writing = None
        self._ledger.ended.pop(path, None)
        if self._back is not None:
            self._back.forget(path)
        self._take_back()
        self._looking = changed
        return Decision(look=True) if changed else self._decide(now)

    def late(self, fact: Fact) -> Late | None:
        """What has to be recorded of a call that ended after the instance was lost."""
        work = self._calls.flying.get(fact.path)
        if isinstance(fact, Completed) and work is not None and work.kind in ("step", "probe"):
            return Late(path=fact.path, output=fact.output)
        return None

    # -------------------------------------------------------------------------------------------- answers

    def _applied(self, checkpoint: Checkpoint, now: datetime) -> Decision:
        self._apply(checkpoint, with_next=True)
        if checkpoint.held:
            if self._following and not self._has_heard and self._interrupted(now) is None:
                return Decision(start=self._calls.fly(self._following))
            return self._decide(now)
        self.release()
        return Decision(released=True, chores=self._chores(checkpoint.state))

    def check_way_back(self) -> None:
        """See that the code can undo what is left of the plan; raises `Stuck` where it cannot."""
        if self._back is not None:
            self._back.check()

    def release(self) -> None:
        """Let go of the instance where it stands; nothing more is decided."""
        self._released = True
        if self._forward is not None:
            self._forward.body.close()

    def _apply(self, checkpoint: Checkpoint, *, with_next: bool) -> None:
        self._compose.no += 1
        self._ledger.written(checkpoint, with_next=with_next)
        if self._back is not None:
            self._back.written(checkpoint.plan, checkpoint.plan_next if with_next else ())
        if with_next:
            self._calls.written(checkpoint.next)
            self._calls.pivoted = self._calls.pivoted or checkpoint.pivoted
            self._ending = checkpoint.ending or self._ending
        elif self._ending is None:
            self._back = None

    def _take_back(self) -> None:
        """What was decided and not written is decided again, from what is known."""
        self._verdict = None
        self._has_heard = True
        self._ledger.forget_pending()
        if self._ending is None:
            self._back = None
        if self._back is not None:
            self._back.take_back()
        elif self._forward is not None:
            self._forward.rebuild()

    def _fenced(self) -> Decision:
        self.release()
        late = [
            Late(path=path, output=ended.output or "null")
            for path, ended in self._ledger.ended.items()
            if ended.is_external and ended.outcome == "completed"
        ]
        return Decision(released=True, late=tuple(late))

    def _chores(self, state: State) -> tuple[Chore, ...]:
        if state not in ENDED:
            return ()
        has_locks = self._claimed.has_locks or self._calls.has_asked_for_locks
        chores: tuple[Chore, ...] = ("release_locks",) if has_locks else ()
        return (*chores, "tell_parent") if self._claimed.parent_id is not None else chores

    # -------------------------------------------------------------------------------------------- forward

    def _decide(self, now: datetime) -> Decision:
        if self._released or self._writing is not None or self._looking:
            return _WAIT
        try:
            if self._back is not None and self._ending is not None:
                return self._decide_back(self._back, now)
            return self._decide_forward(now)
        except Diverged as divergence:
            self._ledger.forget_pending()
            self._calls.results()
            return self._pause(divergence, now)
        except (Unreadable, Stuck, PayloadError) as problem:
            return self._pause(problem, now)

    def _decide_forward(self, now: datetime) -> Decision:
        if self._verdict is not None:
            return self._go_back(*self._verdict, now)
        interrupted = self._interrupted(now)
        if interrupted is not None and self._forward is None:
            return self._go_back(*interrupted, now)  # without the body: it may not even agree with the journal any more
        at = self._advance(now).position
        return self._wait(at, interrupted, now) if isinstance(at, At) else self._ended(at, now)

    def _ended(self, position: Position, now: datetime) -> Decision:
        """The body has ended by itself."""
        match position:
            case Returned(value=value):
                if self._cancel is not None and not self._calls.pivoted:
                    return self._go_back("cancelled", self._cancel, now)
                return self._ask(self._compose.completed(now, self._saga.result.encode(value)))
            case Raised(reason=reason):
                if self._calls.pivoted or self._compose.passes_pivot:
                    return self._pause(BodyError(f"rejected after the pivot: {reason}"), now)
                return self._go_back("failed", reason, now)
            case Broke(problem=problem):
                return self._pause(BodyError(problem), now)
            case _:
                raise AssertionError(f"the body is {position}, and nothing said so")

    def _advance(self, now: datetime) -> Body:
        """Run the body as far as what is known allows."""
        first = self._forward is None
        if self._forward is None:
            self._forward = Forward(self._saga, self._claimed, self._ledger)
        elif not self._has_heard and self._forward.waits_for_calls_of_ours:
            return self._forward.body  # a checkpoint was applied, and nothing else is new
        self._has_heard = False
        self._calls.expire(now)
        self._forward.advance(now)
        if first and self._ledger.intents and isinstance(self._forward.body.position, At):
            self._calls.claimed(self._saga.find, now)  # only now it is known that the code agrees with the intents
            self._forward.advance(now)
        return self._forward.body

    def _interrupted(self, now: datetime) -> tuple[Ending, str] | None:
        if self._calls.pivoted:
            return None
        if self._cancel is not None:
            return "cancelled", self._cancel
        if now >= self._claimed.deadline_at:
            return "failed", "past its deadline"
        return None

    def _wait(self, at: At, doomed: tuple[Ending, str] | None, now: datetime) -> Decision:
        """The body waits for an operation: begin what it needs, or let the instance go until something comes."""
        assert self._forward is not None
        by_path, missing = self._ledger.by_path, []
        for slot in at.slots:
            row = by_path.get(slot.path)
            if row is None:
                missing.append(slot)
            elif row.outcome == "unknown" and doomed is None:
                doomed = ("failed", f"{row.path} is unknown: {row.error}")
        if doomed is not None or self._calls.stuck or self._pause_asked is not None:
            if self._calls.flying:
                return self._ask(self._compose.forward(now, Needs(), held=True)) if self._ledger.pending else _WAIT
            if self._pause_asked is not None:
                return self._pause(self._pause_asked, now)
            if doomed is not None:
                return self._go_back(*doomed, now)
            return self._pause("; ".join(self._calls.stuck.values()), now)
        needs = Needs()
        for slot in missing:
            if slot.kind in ("receive", "sleep"):
                needs.wake_at.append(self._forward.until(slot))
                needs.waits_for = f"{slot.kind} {slot.path}"
            else:
                self._calls.need(needs, slot, now)
        return self._act(needs, now)

    def _act(self, needs: Needs, now: datetime) -> Decision:
        at_once = [work for work in needs.ready if work.not_before is None or work.not_before <= now + _SOON]
        held = bool(
            self._calls.flying or needs.alone or at_once or any(intent.kind == "step" for intent in needs.intents)
        )
        if held:
            start = self._calls.fly(needs.ready)
            if self._ledger.pending or needs.intents:
                following = () if needs.alone else tuple(needs.following)
                return self._ask(self._compose.forward(now, needs, held=True), start, following)
            return Decision(start=(*start, *self._calls.fly(needs.alone)))
        needs.wake_at += [work.not_before for work in needs.ready if work.not_before is not None]
        return self._ask(self._compose.forward(now, needs, held=False))

    # -------------------------------------------------------------------------------------------- back

    def _go_back(self, ending: Ending, reason: str, now: datetime) -> Decision:
        """Close the body, account for every call, make the plan, and begin with it."""
        self._verdict = (ending, reason)
        if self._forward is not None:
            self._forward.body.close()
        self._ledger.forget_next()
        self._calls.unfinished(reason, now)
        plan = make_plan(self._saga, [*self._ledger.rows, *self._ledger.pending], now, self._ledger.skipped)
        self._back = Compensating(self._saga, self._claimed.id, self._ledger, plan)
        step = self._back.following(now)
        return self._ask(self._compose.back(now, step, self._back.changes, plan=plan, ending=ending, error=reason))

    def _decide_back(self, back: Compensating, now: datetime) -> Decision:
        if self._undoing:
            return _WAIT
        strict = back.expire(now)
        if (problem := back.stuck) is not None:
            return self._pause(problem, now, strict=strict)
        if self._pause_asked is not None and back.current is not None:
            return self._pause(self._pause_asked, now, strict=strict)
        work = back.ready(now)
        if work is not None:
            self._undoing[work.path] = work
            return Decision(start=(work,))
        assert self._ending is not None
        step = back.following(now)
        return self._ask(self._compose.back(now, step, back.changes, ending=self._ending, strict=strict))

    # -------------------------------------------------------------------------------------------- writing

    def _pause(self, reason: str | Exception, now: datetime, *, strict: bool = False) -> Decision:
        """Stop until a person resumes it; what is known of results is kept, and nothing new begins."""
        if self._calls.flying or self._undoing:
            return _WAIT
        self.problem = reason if isinstance(reason, Exception) else None
        back = self._back.changes if self._back is not None and self._ending is not None else None
        return self._ask(self._compose.paused(now, str(reason), back, verdict=self._verdict, strict=strict))

    def _ask(self, checkpoint: Checkpoint, start: tuple[Work, ...] = (), following: tuple[Work, ...] = ()) -> Decision:
        self._writing, self._following = checkpoint, following
        return Decision(start=start, checkpoint=checkpoint)
