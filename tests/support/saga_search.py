"""Visits every state of the model of a saga, breadth first, and says what must hold in each.

* The journal only grows, no step is in it twice, and what has been decided about the outcome stays so.
* After the pivot nothing is undone.
* The plan is the reverse of what was called, and is worked off one by one.
* No call is begun by a worker whose lease holds, while another one has the instance (`saga_model`).
* Where nothing happens any more, the saga has ended. Completed: what happened is what the journal says, and nobody had
  cancelled it before. Failed or cancelled: nothing that happened is left, and all of the plan is done.
* From every state such an end can be reached.
"""

from itertools import pairwise
from typing import Final

from saga.state import ENDED
from saga.testing.memory import Row
from tests.support.saga_model import Broken, Model, needs_other_code
from tests.support.saga_states import State

MOST_CHECKPOINTS: Final = 40
"""A history with more of them does not end."""


class Wrong(AssertionError):
    """A state that must not be; the message tells the shortest way to it."""

    def __init__(self, problem: str, path: list[str], row: Row) -> None:
        tasks = [(task.path, task.outcome) for task in row.tasks]
        plan = [(one.path, one.round, one.status) for one in row.plan.values()]
        lines = "\n".join(f"  {n:2}. {step}" for n, step in enumerate(path, 1))
        super().__init__(f"{problem}\n{lines}\n  journal: {row.state} {tasks} {plan} intents {row.intents}")
        self.problem: Final = problem
        self.path: Final = path


class Search:
    """One visit of all states."""

    def __init__(self, model: Model) -> None:
        self._model: Final = model
        first = model.first
        self.states: Final = [first]
        self._numbers: Final = {first: 0}
        self._came_from: Final[list[tuple[int, str]]] = [(0, "")]
        self._before: Final[list[list[int]]] = [[]]
        self._ends: Final[list[int]] = []

    def run(self) -> int:
        """Visit them; how many there are.

        Raises:
            Wrong: in one of them something is not as it must be.
        """
        number = 0
        while number < len(self.states):
            try:
                self._visit(number)
            except Broken as broken:
                raise self._wrong(str(broken), number) from broken
            number += 1
        self._check_all_end()
        return len(self.states)

    def _visit(self, number: int) -> None:
        state = self.states[number]
        is_end = True
        for label, following in self._model.steps(state):
            is_end &= label.startswith("!")
            at = self._numbers.get(following)
            if at is None:
                at = self._numbers[following] = len(self.states)
                self.states.append(following)
                self._came_from.append((number, label))
                self._before.append([])
                if following.db != state.db:
                    problem = _problem_of_change(self._row(state), self._row(following))
                    if problem is not None:
                        raise self._wrong(problem, at)
            self._before[at].append(number)
        if is_end:
            self._ends.append(number)
            problem = _problem_of_end(state, self._row(state))
            if problem is not None:
                raise Broken(problem)

    def _row(self, state: State) -> Row:
        return self._model.journals.row(state.db)

    def _wrong(self, problem: str, number: int) -> Wrong:
        row = self._row(self.states[number])
        path = []
        while number:
            number, label = self._came_from[number]
            path.append(label)
        return Wrong(problem, path[::-1], row)

    def _check_all_end(self) -> None:
        can_end = [False] * len(self.states)
        waiting = list(self._ends)
        while waiting:
            number = waiting.pop()
            if not can_end[number]:
                can_end[number] = True
                waiting += self._before[number]
        if not all(can_end):
            raise self._wrong("it can never end any more", can_end.index(False))


def _problem_of_change(old: Row, new: Row) -> str | None:
    paths = [task.path for task in new.tasks]
    if new.tasks[: len(old.tasks)] != old.tasks or len(set(paths)) < len(paths):
        return "a row of the journal has changed, or a step is in it twice"
    is_decided = old.state == "completed" or old.ending is not None
    if is_decided and new.ending != old.ending:
        return f"it had another outcome before: {old.state} {old.ending}, now {new.state} {new.ending}"
    if (old.state == "completed" and new.state != "completed") or (new.pivoted and new.ending is not None):
        return f"it had completed, or passed its pivot, and is {new.state}"
    if new.no > MOST_CHECKPOINTS:
        return f"it does not come to an end in {MOST_CHECKPOINTS} checkpoints"
    received = [task for task in new.tasks[len(old.tasks) :] if task.kind == "receive" and task.output is None]
    if received and any(mail.kind == "signal" for mail in old.mail):
        return "it has received nothing, and a signal was there"
    return _problem_of_plan(new)


def _problem_of_plan(row: Row) -> str | None:
    first = sorted((one for one in row.plan.values() if one.round == 0), key=lambda one: one.position)
    for one, following in pairwise(first):
        if one.path <= following.path:
            return f"its plan is not in reverse order: {[each.path for each in first]}"
        if following.status != "pending" and one.status != "completed":
            return "a compensation has begun before the one before it was done"
    return None


def _problem_of_end(state: State, row: Row) -> str | None:
    left = sorted(place.path for place in state.world if place.state == "done")
    done = sorted(task.path for task in row.tasks if task.outcome == "completed" and task.kind in ("step", "remote"))
    if row.state == "completed" or needs_other_code(row):
        if left != done or row.plan:
            return f"it is {row.state}; its journal says that {done} happened, and {left} did"
        return "it was cancelled in time, and has completed" if row.cancel_reason and not row.pivoted else None
    if row.state not in ENDED:
        return f"it is left {row.state}: {row.paused_reason or 'nobody wakes it'}"
    if left:
        return f"it has {row.state}, and {left} happened and is not undone"
    is_done = all(one.status == "completed" for one in row.plan.values())
    return None if is_done else "it has ended, and its plan has not"
