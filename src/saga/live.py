"""Whether today's code goes on with the instances that are in flight: `saga check MODULE --live`.

Each instance that has not ended is handed to the decider as a claim would hand it over, and the decider says what it
would do first: the body runs over its journal, and the plan of one that is being undone is read. Then it is let go.
Nothing is carried out: no step, probe or compensation is called, no checkpoint is written, no lease is taken. Instances
are read in pages, each in a read-only transaction of one snapshot, so workers may run meanwhile, with whatever code.

An instance that a worker has is looked at as if that worker were lost now. A paused one is looked at as if it were
resumed, so it tells whether the mended code goes on. One for which a cancel was asked for, or which is past its
deadline, goes back without its body being run, here as in production.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from outbox import Pool, postgres
from outbox.postgres import Record
from saga import limits
from saga.decider import Execution
from saga.definition import Saga
from saga.errors import PayloadError, SagaError
from saga.forward import Diverged, Unreadable
from saga.journal import lease_of
from saga.outcome import brief
from saga.plan import Stuck
from saga.state import Claimed

SQL: Final = postgres.Statements("saga", "live.sql")

Kind = Literal["diverged", "unreadable", "no-undo", "breaks", "no-code"]
REMEDIES: Final[dict[Kind, str]] = {
    "diverged": "keep the old body under its version and declare the changed one with the next one, "
    "@saga(NAME, version=N + 1); or take the change back",
    "unreadable": "let the type read what was written before (a default, an optional field), or declare a new version",
    "no-undo": "bring the step and its compensation back; or undo it by hand, then: "
    "saga resume ID --skip STEP --reason TEXT",
    "breaks": "mend the body: the instance pauses with this error",
    "no-code": "load this version beside the other one until its instances have ended, or keep a worker of the old "
    "code running until then",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """An instance with which the code cannot go on."""

    id: UUID
    saga: str
    version: int
    key: str
    state: str
    kind: Kind
    step: str | None
    """The path of the step where it stops."""
    expected: str
    """What the journal has there."""
    found: str
    """What the code has."""
    remedy: str


@dataclass(slots=True, kw_only=True)
class Report:
    """What the instances in flight say about the code."""

    keep: int
    """So many troubles are kept; all of them are counted."""
    checked: int = 0
    troubles: list[Trouble] = field(default_factory=list)
    counts: Counter[Kind] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)
    """Instances of sagas that the code does not name at all, by name: another module's, so not looked at."""

    def add(self, trouble: Trouble) -> None:
        """Count one more, and keep it where there is room."""
        self.counts[trouble.kind] += 1
        if len(self.troubles) < self.keep:
            self.troubles.append(trouble)


async def check(
    pool: Pool,
    sagas: Iterable[Saga[Any, Any]],
    *,
    name: str | None = None,
    keep: int = 50,
    progress: Callable[[int, int], None] = lambda _seen, _total: None,
) -> Report:
    """Replay every instance that has not ended.

    Args:
        pool: of the sagas' database; a standby will do.
        sagas: the code: every version that would be deployed.
        name: only instances of this saga.
        keep: so many troubles are reported, the others only counted.
        progress: called after each page with how many were seen, and how many there were at the beginning.
    """
    code = {one.workflow_id: one for one in sagas}
    names = {one.name for one in code.values()}
    report = Report(keep=keep)
    total, seen, after = await SQL.count.fetchval(pool, name), 0, UUID(int=0)
    while rows := await _page(pool, code, after, name):
        for row, claimed in rows:
            if claimed is not None:
                report.checked += 1
                trouble = _replayed(code[row["workflow_id"]], claimed, row)
                if trouble is not None:
                    report.add(trouble)
            elif row["name"] in names:
                report.add(_without_code(row, sorted(one.version for one in code.values() if one.name == row["name"])))
            else:
                report.others[row["name"]] += 1
        seen, after = seen + len(rows), rows[-1][0]["id"]
        progress(seen, max(total, seen))
    return report


async def _page(
    pool: Pool, code: dict[UUID, Saga[Any, Any]], after: UUID, name: str | None
) -> list[tuple[Record, Claimed | None]]:
    """Some instances, and the journals of those that there is code for, in one snapshot."""
    async with (
        postgres.acquire(pool) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        rows = await SQL.page.fetch(connection, after, name, limits.CLAIM_MAX_INSTANCES)
        known = [row["id"] for row in rows if row["workflow_id"] in code]
        fresh = [row["id"] for row in rows if row["fresh"]]
        journals = await SQL.journals.fetch(connection, known, fresh) if known else []
    claimed = {row["id"]: lease_of(row).claimed for row in journals}
    return [(row, claimed.get(row["id"])) for row in rows]


def _replayed(saga: Saga[Any, Any], claimed: Claimed, row: Record) -> Trouble | None:
    """What keeps the code from going on with one instance."""
    execution = Execution(saga, claimed)
    try:
        problem = _problem(execution, row["now"])
    finally:
        execution.release()
    return None if problem is None else _trouble(row, *_said(problem, claimed))


def _problem(execution: Execution, now: datetime) -> Exception | None:
    try:
        execution.begin(now)
        if execution.problem is None:
            execution.check_way_back()
    except Exception as error:  # noqa: BLE001 - `Stuck`, or one with which a worker could not go on either; it is told
        return error
    return execution.problem


def _said(problem: Exception, claimed: Claimed) -> tuple[Kind, str | None, str, str]:
    """Kind, step, what the journal has, what the code has."""
    match problem:
        case Diverged():
            return "diverged", problem.path, problem.journal, problem.code
        case Unreadable():
            return "unreadable", problem.path, "a result of another form", str(problem)
        case PayloadError() if problem.field.startswith("request of"):
            return "unreadable", None, "a request of another form", str(problem)
        case Stuck():
            return "no-undo", problem.path, f"{problem.path} has to be undone", str(problem)
        case _:
            last = claimed.tasks[-1].path if claimed.tasks else None
            found = str(problem) if isinstance(problem, SagaError) else brief(problem)
            return "breaks", last, "what the body got so far" if last else "the request", found


def _without_code(row: Record, versions: list[int]) -> Trouble:
    loaded = ", ".join(map(str, versions))
    return _trouble(row, "no-code", None, f"version {row['version']}", f"version {loaded} only")


def _trouble(row: Record, kind: Kind, step: str | None, expected: str, found: str) -> Trouble:
    return Trouble(
        id=row["id"],
        saga=row["name"],
        version=row["version"],
        key=row["key"],
        state=row["state"],
        kind=kind,
        step=step,
        expected=expected,
        found=found,
        remedy=REMEDIES[kind],
    )
