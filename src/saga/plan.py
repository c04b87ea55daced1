"""The plan of a compensation: what has to be undone, in which order, and how often each is tried."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from saga import limits
from saga.definition import Saga
from saga.state import PlanRow, TaskRow
from saga.step import Target

_BRANCH: Final = re.compile(r"(parallel#\d+)\[(\d+)\]/")
_UNDOABLE: Final = ("step", "transactional", "remote", "child")


class Stuck(Exception):
    """Compensation cannot go on without a person.

    Attributes:
        path: what cannot be undone.
    """

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(problem)
        self.path: Final = path


class Retried:
    """How often and how fast a compensation is tried, whatever it is of."""

    def __init__(self, target: Target | None) -> None:
        undo = target.undo if target is not None else None
        self.required: Final = undo.required if undo else True
        self.attempts: Final = undo.retry.attempts if undo else limits.COMPENSATION_ATTEMPTS
        self._retry: Final = undo.retry if undo else None
        self.timeout_seconds: Final = (
            undo.timeout_seconds if undo else target.timeout_seconds if target else limits.STEP_TIMEOUT_SECONDS
        )

    def delay(self, key: UUID, failed: int) -> timedelta:
        """How long to wait after so many failed attempts."""
        chance = jitter(key, failed)
        if self._retry is None:
            ceiling = min(limits.RETRY_MAXIMUM_SECONDS, limits.RETRY_INITIAL_SECONDS * 2.0 ** min(failed - 1, 60))
            return timedelta(seconds=ceiling * (0.5 + chance / 2))
        return timedelta(seconds=self._retry.delay(failed, chance))


def jitter(key: UUID, attempt: int) -> float:
    """From 0 up to 1: other instances wait differently, and the same decision is the same again."""
    seed = key.bytes + attempt.to_bytes(4, "big")
    return int.from_bytes(hashlib.blake2b(seed, digest_size=4).digest(), "big") / (1 << 32)


def make_plan(
    saga: Saga[Any, Any], rows: Sequence[TaskRow], now: datetime, skipped: Mapping[str, PlanRow]
) -> list[PlanRow]:
    """What has to be undone, in the order of undoing: the reverse of the journal, and of the calls of a parallel.

    Args:
        saga: the code.
        rows: the journal, whole.
        now: the time.
        skipped: rows that a person has taken for done, by path; the code need not know their steps any more.

    Raises:
        Stuck: a step's name means nothing any more.
    """
    plan: list[PlanRow] = []
    for row in reversed(in_order_of_calls(rows)):
        if row.kind not in _UNDOABLE or row.outcome == "rejected":
            continue
        if (known := skipped.get(row.path)) is not None:
            plan.append(replace(known, position=len(plan) + 1, task_seq=row.seq))
            continue
        target = None
        if row.kind != "child":
            target = find(saga, row.path, row.name)
            if row.kind != "remote" and target.undo is None:
                continue
        plan.append(
            PlanRow(
                position=len(plan) + 1,
                task_seq=row.seq,
                path=row.path,
                name=row.name,
                kind=row.kind,
                required=Retried(target).required,
                action=_action(row, target),
                data=row.output,
                not_before=_settled_at(row, target, now),
            )
        )
    return plan


def _settled_at(row: TaskRow, target: Target | None, now: datetime) -> datetime | None:
    """Until when a call of the step may still land: an unknown one, or an earlier attempt of one that was tried again.

    A service that forgets a key when it undoes would take such a call for a new one. One that fences refuses it.
    """
    is_certain = row.outcome == "completed" and row.attempts == 1
    if row.kind != "step" or is_certain or target is None or target.fences:
        return None
    settled = row.completed_at + timedelta(seconds=target.settle_seconds)
    return settled if settled > now else None


def _action(row: TaskRow, target: Target | None) -> str:
    if target is not None and target.undo is not None:
        return getattr(target.undo.function, "__name__", row.name)
    return f"{row.name}.undo" if row.kind == "remote" else f"undo saga {row.name}"


def in_order_of_calls(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Journalled rows with the branches of each parallel in the order of the calls."""
    ordered: list[TaskRow] = []
    block: list[tuple[int, TaskRow]] = []
    name = ""
    for row in rows:
        branch = _BRANCH.match(row.path)
        if branch is None or branch[1] != name:
            ordered += [of for _, of in sorted(block, key=lambda item: item[0])]
            block, name = [], branch[1] if branch else ""
        if branch is None:
            ordered.append(row)
        else:
            block.append((int(branch[2]), row))
    return ordered + [of for _, of in sorted(block, key=lambda item: item[0])]


def find(saga: Saga[Any, Any], path: str, name: str) -> Target:
    """The step that a name of the journal stands for.

    Raises:
        Stuck: nothing of that name is left in the code.
    """
    target = saga.find(name)
    if target is None:
        raise Stuck(
            path,
            f"nothing is called {name} in the code of {saga.name} any more, and the journal says that it happened; "
            f"bring the step back, or skip it: saga resume ID --skip {path} --reason ...",
        )
    return target
