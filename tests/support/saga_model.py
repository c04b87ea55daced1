"""An explicit-state model of one saga, two workers and everything that can go wrong, visited breadth first.

What decides and what journals is the code itself (`saga_automata`); the model is what lies between: two processes, the
calls that they have under way, the services, the mail, time. Every interleaving of these steps is visited, with every
fault once and several faults together:

* A worker writes its checkpoint; hears the answer; looks; begins a call, if its lease holds; hears how a call ended.
* It is killed at any of these places. Its calls may land until they have *settled*, and then no more.
* Its lease runs out while it goes on (a process that was stopped and continued); another worker may take over from now
  on. Its calls may land at any time, as it will report their results.
* An answer of the journal is lost, so the same checkpoint is sent again. A call times out, and has landed, or lands
  later, or never. A call is rejected. A compensation fails. A command is delivered twice, or overtaken by a later one.
  A person cancels; the deadline passes; a signal comes.

What must hold is said in `saga_search`, which visits the states.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from saga.state import ENDED, Answer, Decision, Late
from saga.testing.commands import message_of
from saga.testing.memory import Row
from tests.support.saga_automata import Deciders, Journals, Told
from tests.support.saga_states import (
    NOBODY,
    Call,
    Heard,
    Scenario,
    State,
    Worker,
    in_order,
    order_of,
    place_of,
    seconds_of,
    with_place,
)

Step: TypeAlias = tuple[str, State]


class Broken(Exception):
    """Something happens that must not."""


@dataclass
class Model:
    """All states that can be come by."""

    scenario: Scenario
    deciders: Deciders = field(init=False)
    journals: Journals = field(init=False)
    first: State = field(init=False)

    def __post_init__(self) -> None:
        self.deciders = Deciders(self.scenario.saga)
        self.journals = Journals(self.scenario.journal, self.scenario.saga, driven=self.scenario.driven)
        self.first = State(self.journals.first)

    # -------------------------------------------------------------------------------------------- steps

    def steps(self, s: State) -> Iterator[Step]:
        """What can happen next; a label with `!` says that it need not.

        Raises:
            Broken: what must not.
        """
        stopped = {self._epoch(worker) for worker in s.workers if not worker.is_leased}
        steps = [step for call in s.calls if call.epoch not in stopped for step in self._of_call(s, call)]
        steps += [step for worker in s.workers if worker.is_leased for step in self._of_worker(s, worker)]
        steps += [*self._of_journal(s), *self._of_messages(s)]
        yield from steps
        for worker in s.workers:
            if not worker.is_leased:
                yield from self._of_worker(s, worker)
        for call in s.calls:
            if call.epoch in stopped:
                yield from self._of_call(s, call)
        yield from self._of_time(s, is_idle=all(label.startswith("!") for label, _ in steps))

    def _may(self, s: State, fault: str) -> bool:
        return len(s.faults) < self.scenario.together and s.faults.count(fault) < self.scenario.faults.get(fault, 0)

    def _fault(self, s: State, fault: str, label: str, **changes: Any) -> Step:
        return f"!{label}", s._replace(faults=tuple(sorted((*s.faults, fault))), **changes)

    def _epoch(self, worker: Worker) -> int:
        return self.deciders.nodes[worker.node].epoch

    def _has(self, s: State, worker: Worker) -> bool:
        return self.journals.row(s.db).epoch == self._epoch(worker)

    # -------------------------------------------------------------------------------------------- workers

    def _of_worker(self, s: State, w: Worker) -> Iterator[Step]:
        node = self.deciders.nodes[w.node]
        name = f"worker {node.epoch}"
        match w.stage:
            case "write":
                assert node.decision.checkpoint is not None
                db, answer = self.journals.write(s.db, w.node, node.decision.checkpoint)
                if answer.kind == "broken":
                    raise Broken("a worker finds the journal written by somebody else under its epoch")
                known = (answer.kind, answer.wakeups, answer.cancel_reason)
                following = self._with(s, w, w._replace(stage="answer", answer=known))._replace(db=db)
                yield f"{name} writes {node.decision.checkpoint.state}: {answer.kind}", following
            case "answer":
                yield f"{name} hears {w.answer[0]}", self._answered(s, w)
                if self._may(s, "answer lost"):
                    again = self._with(s, w, w._replace(stage="write", answer=()))
                    yield self._fault(again, "answer lost", f"{name} does not hear {w.answer[0]}, and sends it again")
            case "look":
                mailbox = self.journals.look(s.db)
                told = Told("mail", s.db, s.now, mailbox)
                yield f"{name} looks", self._told(s, w, *self._landed(s, w), told)
            case "late" if w.late:
                (path, output), *rest = w.late
                following = self._with(s, w, self._late(s, w._replace(late=tuple(rest))))
                db = self.journals.record_late(s.db, node.epoch, Late(path=path, output=output))
                yield f"{name} reports {path}", following._replace(db=db)
        if self._may(s, "crash") and not w.owes:
            yield self._fault(self._without(s, w), "crash", f"{name} is killed")
        if w.is_leased and self._may(s, "lease"):
            zombie = w._replace(is_leased=False)
            yield self._fault(self._with(s, w, zombie), "lease", f"the lease of {name} runs out")

    def _landed(self, s: State, w: Worker) -> list[Told]:
        return [heard.told(s.now) for heard in w.landed]

    def _answered(self, s: State, w: Worker) -> State:
        kind, wakeups, cancel = w.answer
        answer = Answer(kind=kind, wakeups=wakeups, cancel_reason=cancel)
        told = Told("answer", w.answer, s.now, answer)
        return self._told(s, w, *self._landed(s, w), told)

    def _told(self, s: State, w: Worker, *told: Told) -> State:
        """A worker's decider is told something, and its decision is begun with."""
        node = w.node
        for one in told:
            node = self.deciders.tell(node, one)
        return self._carry_out(s, w, w._replace(node=node, landed=(), answer=()))

    def _carry_out(self, s: State, before: Worker | None, w: Worker) -> State:
        node = self.deciders.nodes[w.node]
        decision: Decision = node.decision
        if not self.scenario.checks_lease or w.is_leased:
            started = [
                Call(node.epoch, work.kind, work.path, str(work.key), seconds_of(work.not_before, s.now))
                for work in decision.start
            ]
            s = s._replace(calls=in_order((*s.calls, *started)))
        is_busy = any(call.epoch == node.epoch for call in s.calls)
        new: Worker | None = w
        if decision.released:
            late = tuple((late.path, late.output) for late in decision.late)
            new = self._late(s, w._replace(stage="late", late=late))
        elif decision.checkpoint is not None:
            new = w._replace(stage="write")
        elif decision.look:
            new = w._replace(stage="look")
        elif is_busy:
            new = w._replace(stage="wait")
        else:
            new = None
        return self._with(s, before, new)

    def _late(self, s: State, w: Worker) -> Worker | None:
        """A fenced worker waits for its calls, and then forgets the instance."""
        late = list(w.late)
        for heard in w.landed:
            found = self.deciders.late(w.node, heard.fact)
            late += [(found.path, found.output)] if found is not None else []
        is_busy = late or any(call.epoch == self._epoch(w) for call in s.calls)
        return w._replace(landed=(), late=tuple(late)) if is_busy else None

    def _with(self, s: State, before: Worker | None, after: Worker | None) -> State:
        kept = list(s.workers)
        if before is not None:
            kept.remove(before)
        return s._replace(workers=tuple(sorted((*kept, after) if after is not None else kept, key=order_of)))

    def _without(self, s: State, w: Worker) -> State:
        """It is dead: what it has not begun is gone, what has begun may land for a time."""
        epoch = self._epoch(w)
        mine = [call for call in s.calls if call.epoch == epoch]
        orphans = [call._replace(epoch=NOBODY) for call in mine if call.stage == "begun" and s.now < call.until]
        others = [call for call in s.calls if call.epoch != epoch]
        return self._with(s, w, None)._replace(calls=in_order((*others, *orphans)))

    # -------------------------------------------------------------------------------------------- calls

    def _of_call(self, s: State, c: Call) -> Iterator[Step]:
        worker = next((w for w in s.workers if self._epoch(w) == c.epoch), None)
        name = f"{c.kind} {c.path}"
        match c.stage:
            case "queued":
                assert worker is not None
                if not worker.is_leased and self.scenario.checks_lease:
                    yield f"{name} is not begun, the lease is over", self._ended(s, c, worker, None)
                elif s.now >= c.until:
                    if worker.is_leased and not self._has(s, worker):
                        raise Broken("a worker whose lease holds begins a call, and another one has the instance")
                    begun = c._replace(stage="begun", until=s.now + self.scenario.settle)
                    yield f"{name} of {c.epoch} begins", self._call(s, c, begun)
            case "begun":
                landed = self._land(s, c)
                if worker is None:
                    yield f"!{name} of a dead worker lands", self._call(landed, c, None)
                else:
                    yield from self._ends(s, landed, c, worker, name)
            case _:
                raise AssertionError(c)

    def _ends(self, s: State, landed: State, c: Call, worker: Worker, name: str) -> Iterator[Step]:
        """A call of a worker that lives ends, in one way or another."""
        owing = worker._replace(owes=True) if s.now >= c.until else worker
        done = Heard(c.path, "done" if c.kind == "step" else "undone")
        yield f"{name} of {c.epoch} ends", self._ended(self._with(landed, worker, owing), c, owing, done)
        lost = Heard(c.path, "timed out")
        if self._may(s, "timeout") and not owing.owes:
            yield self._fault(self._ended(landed, c, worker, lost), "timeout", f"{name} lands and times out")
            orphan = c._replace(epoch=NOBODY)
            yield self._fault(self._ended(s, c, worker, lost, orphan), "timeout", f"{name} times out")
        if c.kind == "step" and self._may(s, "reject"):
            refused = Heard(c.path, "rejected")
            yield self._fault(self._ended(s, c, worker, refused), "reject", f"{name} is rejected")
        if c.kind == "undo" and self._may(s, "undo fails"):
            yield self._fault(self._ended(s, c, worker, lost), "undo fails", f"{name} fails")

    def _call(self, s: State, before: Call, after: Call | None) -> State:
        kept = list(s.calls)
        kept.remove(before)
        return s._replace(calls=in_order((*kept, after) if after is not None else kept))

    def _land(self, s: State, c: Call) -> State:
        """A call has its effect, once under its key."""
        place = place_of(s, c.path)
        if c.kind == "step":
            if place.state == "no" or (place.state == "undone" and not self.scenario.fences):
                place = place._replace(state="done")
        elif c.key not in place.undos:
            undone = "undone" if place.state == "done" or self.scenario.fences else place.state
            place = place._replace(state=undone, undos=place.undos | {c.key})
        return with_place(s, place)

    def _ended(self, s: State, c: Call, w: Worker, heard: Heard | None, orphan: Call | None = None) -> State:
        """A worker learns how a call has ended; without one, that it was not begun."""
        s = self._call(s, c, orphan)
        if w.stage == "late":
            return self._with(s, w, self._late(s, w._replace(landed=(heard,) if heard is not None else ())))
        if w.stage != "wait":
            return self._with(s, w, w._replace(landed=(*w.landed, heard) if heard is not None else w.landed))
        if heard is not None:
            return self._told(s, w, heard.told(s.now))
        is_busy = any(call.epoch == c.epoch for call in s.calls)
        return s if is_busy else self._with(s, w, None)  # it leaves: nothing is under way any more

    # -------------------------------------------------------------------------------------------- the rest

    def _of_journal(self, s: State) -> Iterator[Step]:
        row = self.journals.row(s.db)
        if row.is_ready and len(s.workers) < 2:
            db, claimed = self.journals.claim(s.db)
            node = self.deciders.begin(s.db, claimed, s.now)
            yield (
                f"a worker claims it, epoch {claimed.epoch}",
                self._carry_out(s._replace(db=db), None, Worker(node, "")),
            )
        if row.owner is not None and not any(w.is_leased and self._epoch(w) == row.epoch for w in s.workers):
            yield "it is taken over", s._replace(db=self.journals.take_over(s.db))
        if row.owner is None and row.wake_at is not None and seconds_of(row.wake_at, s.now) <= s.now:
            yield "its timer goes off", s._replace(db=self.journals.due(s.db, s.now))
        if row.state == "paused" and not needs_other_code(row):
            yield "a person resumes it", s._replace(db=self.journals.resume(s.db))
        if row.state not in ENDED and self._may(s, "cancel"):
            yield self._fault(s, "cancel", "a person cancels it", db=self.journals.cancel(s.db))
        if self.scenario.signal is not None and not s.signals and row.state not in ENDED:
            db = self.journals.tell(s.db, "signal", self.scenario.signal, "{}", s.now)
            yield "!a signal comes", s._replace(db=db, signals=1)

    def _of_messages(self, s: State) -> Iterator[Step]:
        outbox = self.journals.states[s.db].outbox
        waiting = [n for n in range(len(outbox)) if n not in s.delivered]
        for n in waiting:
            if n == waiting[0]:
                yield f"command {n + 1} is handled", self._handle(s, n)
            elif self._may(s, "overtaken"):
                yield self._fault(self._handle(s, n), "overtaken", f"command {n + 1} is handled before others")
        if self._may(s, "twice"):
            for n in s.delivered:
                yield self._fault(self._handle(s, n), "twice", f"command {n + 1} is handled again")
        if s.replies:
            (kind, path, payload), *rest = s.replies
            db = self.journals.tell(s.db, kind, path, payload, s.now)
            yield f"a reply comes: {kind} {path}", s._replace(db=db, replies=tuple(rest))

    def _handle(self, s: State, n: int) -> State:
        """A participant handles a command: once, and not after its undo."""
        message = message_of(self.journals.states[s.db].outbox[n])
        assert message is not None
        place = place_of(s, message.path)
        if message.command == "do":
            refused = place.state == "tombstone"
            place = place._replace(state="done") if place.state == "no" else place
            told = {"outcome": "rejected", "error": "no"} if refused else {"outcome": "completed", "output": None}
            reply = ("reply", message.path, json.dumps(told))
        else:
            before = "tombstone" if self.scenario.tombstones else "no"
            place = place._replace(state={"no": before, "done": "undone"}.get(place.state, place.state))
            reply = ("undone", message.path, json.dumps({"round": message.round}))
        return with_place(s, place)._replace(delivered=s.delivered | {n}, replies=(*s.replies, reply))

    def _of_time(self, s: State, *, is_idle: bool) -> Iterator[Step]:
        """Time passes while all wait who are not stopped; that it passes sooner is a fault, `slow`."""
        row = self.journals.row(s.db)
        moments = [call.until for call in s.calls if call.stage == "queued" and call.until > s.now]
        if row.owner is None and row.wake_at is not None:
            wake_at = seconds_of(row.wake_at, s.now)
            moments += [wake_at] if wake_at > s.now else []
        if moments and is_idle:
            yield f"{min(moments):g} s", self._at(s, min(moments))
        elif moments and self._may(s, "slow"):
            yield self._fault(self._at(s, min(moments)), "slow", f"nothing happens until {min(moments):g} s")
        if s.now < self.scenario.deadline and self._may(s, "deadline"):
            yield self._fault(self._at(s, self.scenario.deadline), "deadline", "its deadline passes")

    def _at(self, s: State, now: float) -> State:
        """Time passes: what should have settled has, unless its worker is alive and was stopped."""
        s = s._replace(now=now)
        for call in s.calls:
            if call.stage != "begun" or now < call.until:
                continue
            worker = next((w for w in s.workers if self._epoch(w) == call.epoch), None)
            if worker is None:
                s = self._call(s, call, None)
            elif worker.is_leased:
                s = self._ended(s, call, worker, Heard(call.path, "timed out"))
        return s


def needs_other_code(row: Row) -> bool:
    """Whether it was rejected after the pivot: no resume helps."""
    return row.state == "paused" and row.pivoted and any(task.outcome == "rejected" for task in row.tasks)
