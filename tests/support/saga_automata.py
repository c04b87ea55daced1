"""The decider and the journal as automata, for a model that visits every state: `tests.support.saga_model`.

Both are the code itself, `saga.decider.Execution` and `saga.testing.memory.MemoryJournal` (which answers as the one on
PostgreSQL does: `test_saga_memory`). An execution cannot be copied, but it is a pure function of what it was claimed
with and told since, so that history is its state; a journal's state is what it holds. Each gets a number, and what
follows from a state and one thing more is worked out once.
"""

from copy import copy
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

from saga import Saga
from saga.decider import Execution
from saga.starting import first_call
from saga.state import Answer, Checkpoint, Claimed, Decision, Fact, Late, Mailbox
from saga.testing.commands import message_of
from saga.testing.machine import EPOCH
from saga.testing.memory import MemoryJournal, Row

ID: Final = UUID(int=1)


def moment(seconds: float) -> datetime:
    """A time of the model."""
    return EPOCH + timedelta(seconds=seconds)


class Told(NamedTuple):
    """One thing that an execution is told, as a key; `what` is the thing itself."""

    kind: str
    key: object
    now: float
    what: Any

    @property
    def as_key(self) -> tuple[str, object, float]:
        return self.kind, self.key, self.now


@dataclass(slots=True)
class Node:
    """One state of an execution."""

    claimed: Claimed
    history: tuple[Told, ...]
    decision: Decision

    @property
    def epoch(self) -> int:
        return self.claimed.epoch


class Deciders:
    """Every state of an execution that was come by."""

    def __init__(self, saga: Saga[Any, Any]) -> None:
        self._saga: Final = saga
        self.nodes: Final[list[Node]] = []
        self._ids: Final[dict[object, int]] = {}
        self._live: Final[dict[int, Execution]] = {}
        """Executions that nobody has told anything more yet: they need not be made again."""

    def begin(self, db: int, claimed: Claimed, now: float) -> int:
        """After a claim that left the journal in state `db`."""
        return self._reach(("begin", db, now), claimed, (), Told("begin", None, now, None))

    def tell(self, node: int, told: Told) -> int:
        """What it becomes by that."""
        known = self.nodes[node]
        return self._reach((node, told.as_key), known.claimed, known.history, told, node)

    def late(self, node: int, fact: Fact) -> Late | None:
        """What it has to record of a call that ended after it was fenced."""
        known = self.nodes[node]
        return self._again(known.claimed, known.history).late(fact)

    def _reach(
        self, key: object, claimed: Claimed, history: tuple[Told, ...], told: Told, node: int | None = None
    ) -> int:
        found = self._ids.get(key)
        if found is not None:
            return found
        execution = self._live.pop(node, None) if node is not None else None
        if execution is None:
            execution = self._again(claimed, history)
        decision = _tell(execution, told)
        self._ids[key] = number = len(self.nodes)
        self.nodes.append(Node(claimed, (*history, told), decision))
        self._live[number] = execution
        return number

    def _again(self, claimed: Claimed, history: tuple[Told, ...]) -> Execution:
        execution = Execution(self._saga, claimed)
        for told in history:
            _tell(execution, told)
        return execution


def _tell(execution: Execution, told: Told) -> Decision:
    now = moment(told.now)
    match told.kind:
        case "begin":
            return execution.begin(now)
        case "fact":
            return execution.fact(told.what, now)
        case "answer":
            return execution.answered(told.what, now)
        case _:
            return execution.mail(told.what, now)


@dataclass(slots=True)
class Held:
    """One state of the journal."""

    row: Row
    outbox: tuple[Any, ...]
    shelf: dict[UUID, tuple[int, int]]


class Journals:
    """Every state of the journal that was come by."""

    def __init__(self, kind: type[MemoryJournal], saga: Saga[Any, Any], *, driven: bool) -> None:
        """Of a journal with one instance in it, started under `ID`; `driven`: with its first intent."""
        self._kind: Final = kind
        self.states: Final[list[Held]] = []
        self._ids: Final[dict[str, int]] = {}
        self._done: Final[dict[object, tuple[int, Any]]] = {}
        journal = kind()
        request = saga.request.encode(None)
        first = first_call(saga, ID, request, EPOCH) if driven else None
        journal.start(
            saga,
            ID,
            request,
            EPOCH,
            intents=first.intents if first else (),
            outbox=first.outbox if first else (),
        )
        self.first: Final = self._intern(journal)

    def row(self, db: int) -> Row:
        """The instance, to look at."""
        return self.states[db].row

    def claim(self, db: int) -> tuple[int, Claimed]:
        """A worker takes it."""
        return self._do(db, "claim", lambda journal: journal.claim(ID, "worker"))

    def take_over(self, db: int) -> int:
        """Its owner is gone."""
        return self._do(db, "take over", lambda journal: journal.take_over(ID))[0]

    def write(self, db: int, node: int, checkpoint: Checkpoint) -> tuple[int, Answer]:
        """The checkpoint that execution `node` wants to write."""
        return self._do(db, ("write", node), lambda journal: journal.write(checkpoint))

    def look(self, db: int) -> Mailbox:
        """The mail."""
        mailbox: Mailbox = self._do(db, "look", lambda journal: journal.look(ID))[1]
        return mailbox

    def tell(self, db: int, kind: str, name: str, payload: str, now: float) -> int:
        """Something comes by mail."""
        at = moment(now)
        return self._do(
            db, ("tell", kind, name, payload, now), lambda journal: journal.tell(ID, kind, name, payload, at)
        )[0]

    def cancel(self, db: int) -> int:
        """Somebody wants it to be undone."""
        return self._do(db, "cancel", lambda journal: journal.cancel(ID, "cancelled"))[0]

    def resume(self, db: int) -> int:
        """A person lets it go on."""
        return self._do(db, "resume", lambda journal: journal.resume(ID))[0]

    def due(self, db: int, now: float) -> int:
        """Its timer goes off."""
        return self._do(db, ("due", now), lambda journal: journal.due(moment(now)))[0]

    def record_late(self, db: int, epoch: int, late: Late) -> int:
        """A fenced worker reports what it holds."""
        key = ("late", epoch, late.path, late.output)
        return self._do(db, key, lambda journal: journal.record_late(ID, epoch, late))[0]

    def _do(self, db: int, what: object, act: Any) -> tuple[int, Any]:
        key = (db, what)
        if key not in self._done:
            journal = self._open(db)
            answer = act(journal)
            self._done[key] = self._intern(journal), answer
        return self._done[key]

    def _open(self, db: int) -> MemoryJournal:
        held = self.states[db]
        row = held.row
        journal = self._kind()
        journal.rows[ID] = replace(
            row,
            tasks=copy(row.tasks),
            epochs=copy(row.epochs),
            plan=copy(row.plan),
            mail=copy(row.mail),
            late=copy(row.late),
            late_known=copy(row.late_known),
        )
        journal.outbox.extend(held.outbox)
        journal._shelf.update(held.shelf)
        return journal

    def _intern(self, journal: MemoryJournal) -> int:
        messages = [message_of(row) for row in journal.outbox]
        key = f"{journal.rows[ID]!r} {messages!r} {journal._shelf!r}"
        if key not in self._ids:
            self._ids[key] = len(self.states)
            self.states.append(Held(journal.rows[ID], tuple(journal.outbox), dict(journal._shelf)))
        return self._ids[key]
