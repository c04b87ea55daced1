"""A saga in memory with services that remember what was done to them; for tests of the decider."""

import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid4

from saga import Saga
from saga.outcome import context_of, perform
from saga.starting import First, first_call
from saga.state import Completed, Fact, Refused, Uncertain, Work, step_key
from saga.testing.commands import Message
from saga.testing.faults import Choices, Turn
from saga.testing.machine import EPOCH, Machine
from saga.testing.memory import Row


@dataclass
class Service:
    """What happened outside, by the step's idempotency key: a service counts each key once."""

    done: Counter[str] = field(default_factory=Counter)
    undone: Counter[str] = field(default_factory=Counter)
    calls: list[str] = field(default_factory=list)

    def do(self, key: str) -> None:
        self.done[key] += 1
        self.undone.pop(key, None)

    def net(self) -> list[str]:
        """What is done and not undone."""
        return sorted(key for key in self.done if not self.undone[key])


class Scene:
    """One instance of a saga in a machine of its own."""

    def __init__(
        self, saga: Saga[Any, Any], request: Any, turns: dict[str, Turn] | None = None, *, started: bool = False
    ) -> None:
        self.saga = saga
        self.service = Service()
        self.choices = Choices(turns or {})
        self.script: defaultdict[str, deque[Fact | Callable[[Work], Fact]]] = defaultdict(deque)
        """What the next attempts of a path end with, before the function is called at all."""
        self.machine = Machine(self._perform, self._handle, self.choices)
        self.machine.serve([saga])
        self.id = uuid4()
        first = first_call(saga, self.id, saga.request.encode(request), EPOCH) if started else First()
        text = saga.request.encode(request)
        self.machine.journal.start(saga, self.id, text, EPOCH, intents=first.intents, outbox=first.outbox)
        self.deps: Any = None

    async def run(self) -> Row:
        await self.machine.run()
        return self.row

    @property
    def row(self) -> Row:
        return self.machine.journal.rows[self.id]

    @property
    def journal(self) -> list[tuple[str, str]]:
        """Path and outcome of everything journalled."""
        return [(task.path, task.outcome) for task in self.row.tasks]

    @property
    def plan(self) -> list[tuple[str, str]]:
        """Path and status of the compensations in order."""
        rows = sorted(self.row.plan.values(), key=lambda row: (row.position, row.round))
        return [(row.path, row.status) for row in rows]

    def path_of(self, key: str) -> str:
        """The path that a key of a step stands for."""
        paths = {str(step_key(self.id, task.path)): task.path for task in self.row.tasks}
        return paths.get(key, key)

    def left(self) -> list[str]:
        """Paths of what is done and not undone."""
        return sorted(self.path_of(key) for key in self.service.net())

    def ends(self, path: str, *facts: Fact | Callable[[Work], Fact]) -> None:
        self.script[path].extend(facts)

    def landed(self, path: str) -> None:
        """The next attempt times out, and has had its effect."""

        def land(work: Work) -> Fact:
            self.service.do(str(work.key))
            return Uncertain(path=path, error="timed out")

        self.ends(path, land)

    async def _perform(self, work: Work) -> Fact:
        self.service.calls.append(f"{work.kind} {work.path}")
        scripted = self.script[work.path if work.kind in ("step", "transactional") else f"{work.kind} {work.path}"]
        if scripted:
            fact = scripted.popleft()
            return fact if isinstance(fact, Fact) else fact(work)
        fact = await perform(work, context_of(work, self.deps))
        if isinstance(fact, Completed):
            if work.kind in ("undo", "undo_transactional"):
                self.service.undone[str(step_key(self.id, work.path))] += 1
            elif work.kind != "probe":
                self.service.do(str(work.key))
        return fact

    async def _handle(self, message: Message, _output: str | None) -> Fact:
        key = str(step_key(message.instance_id, message.path))
        self.service.calls.append(f"{message.command} {message.path}")
        scripted = self.script[f"{message.command} {message.path}"]
        if scripted:
            fact = scripted.popleft()
            assert isinstance(fact, Fact)
            return fact
        if message.command == "do":
            self.service.do(key)
        else:
            self.service.undone[key] += 1
        return Completed(path=message.path, output=json.dumps({"shelf": "A1"}))


def rejected(path: str, reason: str = "no") -> Refused:
    return Refused(path=path, reason=reason)


def uncertain(path: str) -> Uncertain:
    return Uncertain(path=path, error="connection lost")


__all__ = ["EPOCH", "UUID", "Scene", "rejected", "replace", "uncertain"]
