"""Every history of a saga in which one thing goes wrong, or two.

At every step, every compensation, every command and every write of the journal: the step rejects; the worker crashes
before, or after; the call times out and has not had its effect, or has had it; it lands after its worker was given up;
a reply comes twice, or too late; the answer of a write is lost; a cancel arrives, or the next of the lab's signals,
right before a write; a compensation fails, once or for good. Histories with one fault come first, then those with two,
so the first counterexample is a shortest one.

What must hold after each:

* The saga has ended: completed, failed or cancelled; or it waits for a person, because a compensation failed, or a step
  after the pivot. Where a compensation fails for good, those that come after it have not begun; one that is not
  required is left out, and its step's effect stays.
* Completed: what happened is what the journal says, and the world is as after a run in which nothing goes wrong. The
  world is not compared where the body caught a rejection: it went another way.
* Failed or cancelled: everything that was done and has a compensation was undone, and the world is as it was before.
  The world is not compared where an irreversible step was done.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from saga.errors import Rejected, SagaError
from saga.state import ENDED, PlanRow
from saga.testing.faults import Choices, Fault, Turn

if TYPE_CHECKING:
    from saga.testing.lab import Lab, Run

_LOG_LINES: Final = 60
_EFFECTFUL: Final = ("step", "transactional", "remote")


class Counterexample(AssertionError):
    """A history after which not everything is as it must be.

    Attributes:
        faults: what went wrong in it, in order.
        problem: what is not as it must be.
        log: what happened.
    """

    def __init__(self, faults: tuple[Fault, ...], problem: str, log: tuple[str, ...]) -> None:
        told = "\n".join(f"  {n}. {fault}" for n, fault in enumerate(faults, 1)) or "  nothing goes wrong"
        lines = "\n".join(f"  {line}" for line in log[-_LOG_LINES:])
        super().__init__(f"{problem}\n\nWhat goes wrong:\n{told}\n\nWhat happens:\n{lines}")
        self.faults: Final = faults
        self.problem: Final = problem
        self.log: Final = log


async def explore(
    lab: "Lab[Any, Any]", request: Any, world: Callable[[], object], *, depth: int, histories: int
) -> int:
    """Try the histories, shortest first; returns how many there were.

    Raises:
        Counterexample: the first one after which not everything is as it must be.
        SagaError: a run without any fault does not end.
    """
    happy = await lab.attempt(request, Choices(), world())
    if happy.row.state not in ENDED:
        raise SagaError(f"without any fault the saga is left {happy.row.state}: {happy.outcome.reason}")
    _check((), happy, happy, world)
    tried = 1
    level: list[tuple[dict[str, Turn], dict[str, tuple[Turn, ...]]]] = [({}, happy.machine.choices.seen)]
    for _ in range(depth):
        following: list[tuple[dict[str, Turn], dict[str, tuple[Turn, ...]]]] = []
        for turns, seen in level:
            for site, turn in _after(turns, seen):
                if tried >= histories:
                    return tried
                tried += 1
                run = await _attempt(lab, request, {**turns, site: turn}, world)
                if run is not None:
                    _check(tuple(run.machine.choices.taken), run, happy, world)
                    following.append(({**turns, site: turn}, run.machine.choices.seen))
        level = following
    return tried


async def _attempt(
    lab: "Lab[Any, Any]", request: Any, turns: dict[str, Turn], world: Callable[[], object]
) -> "Run[Any] | None":
    try:
        return await lab.attempt(request, Choices(turns), world())
    except Rejected:
        return None  # at its start, before anything was there


def _after(turns: dict[str, Turn], seen: dict[str, tuple[Turn, ...]]) -> list[tuple[str, Turn]]:
    """What else could have gone wrong, at sites that were come by after the last fault."""
    sites = list(seen)
    start = max((sites.index(site) for site in turns if site in seen), default=-1)
    return [(site, turn) for site in sites[start + 1 :] for turn in seen[site]]


def _check(faults: tuple[Fault, ...], run: "Run[Any]", happy: "Run[Any]", world: Callable[[], object]) -> None:
    problem = _problem(faults, run, happy, world)
    if problem is not None:
        raise Counterexample(faults, problem, run.outcome.log)


def _problem(faults: tuple[Fault, ...], run: "Run[Any]", happy: "Run[Any]", world: Callable[[], object]) -> str | None:
    row = run.row
    if row.state not in ENDED:
        reason = run.outcome.reason or "it waits for what does not come"
        if not _waits_for_a_person(faults, run):
            return f"the saga is left {row.state}: {reason}"
        return _problem_of_blocked(run)
    if row.state == "completed":
        return _problem_of_completed(faults, run, happy)
    given_up = {planned.path for planned in row.plan.values() if _is_given_up(planned)}
    undoable = {path for path in run.effects.left() if _has_compensation(run, path)} - given_up
    if undoable:
        return f"the saga has {row.state}, and {', '.join(sorted(undoable))} was done and not undone"
    return None if _has_irreversible(run) or given_up else _difference(run, world())


def _problem_of_blocked(run: "Run[Any]") -> str | None:
    """The way back is a way: what comes after a compensation that failed has not begun."""
    plan = sorted(run.row.plan.values(), key=lambda planned: planned.position)
    blocked = next((planned.position for planned in plan if planned.status == "failed" and planned.required), None)
    if blocked is None:
        return None
    begun = [planned.path for planned in plan if planned.position > blocked and planned.status != "pending"]
    return f"a compensation failed, and {', '.join(begun)} after it was undone nevertheless" if begun else None


def _problem_of_completed(faults: tuple[Fault, ...], run: "Run[Any]", happy: "Run[Any]") -> str | None:
    rows = [task for row in run.machine.journal.rows.values() for task in row.tasks if task.kind in _EFFECTFUL]
    if run.row.plan:
        return "the saga has completed, and something was undone"
    completed = sorted(task.path for task in rows if task.outcome == "completed")
    if run.effects.left() != completed:
        return f"the saga has completed, its journal says that {completed} happened, and {run.effects.left()} did"
    other_way = any(task.outcome == "rejected" for task in rows) or any(fault.turn == "signal" for fault in faults)
    return None if other_way else _difference(run, happy.deps)


def _waits_for_a_person(faults: tuple[Fault, ...], run: "Run[Any]") -> bool:
    """Where that is the way it is meant: a compensation fails, or something fails that cannot be undone any more."""
    if run.outcome.blocked_on is not None:
        return any(fault.turn in ("fails", "fails for good") for fault in faults)
    return run.row.state == "paused" and run.row.pivoted and bool(faults)


def _difference(run: "Run[Any]", expected: object) -> str | None:
    if _same(run.deps, expected):
        return None
    return f"the saga has {run.row.state}, and the world is\n  {run.deps!r}\ninstead of\n  {expected!r}"


def _is_given_up(planned: PlanRow) -> bool:
    return planned.status == "failed" and not planned.required


def _has_compensation(run: "Run[Any]", path: str) -> bool:
    target = run.target(path)
    return target is not None and (target.undo is not None or target.kind == "remote")


def _has_irreversible(run: "Run[Any]") -> bool:
    targets = (run.target(path) for path in run.effects.done.values())
    return any(target is not None and target.irreversible for target in targets)


def _same(one: object, other: object) -> bool:
    """Equal; objects that do not say what that means are equal if what they hold is."""
    if type(one) is type(other) and type(one).__eq__ is object.__eq__ and hasattr(one, "__dict__"):
        return vars(one) == vars(other)
    return one == other
