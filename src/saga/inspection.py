"""What persons see of sagas: the list, and everything that is known of one instance.

Only what the journal says, so no code of the sagas is needed. Several statements read one instance, in one snapshot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from outbox import Pool, postgres
from outbox.postgres import Record
from saga.errors import NotFound
from saga.state import Intent, intents_from_json, step_key

SQL: Final = postgres.Statements("saga", "inspection.sql")
STATES: Final = ("pending", "running", "waiting", "compensating", "paused", "completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One line of the list."""

    id: UUID
    name: str
    version: int
    key: str
    state: str
    checkpoints: int
    created_at: datetime
    completed_at: datetime | None
    paused_reason: str | None
    error: str | None
    cancel_reason: str | None
    parent_id: UUID | None
    now: datetime
    """Of the database."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One row of the journal."""

    seq: int
    path: str
    name: str
    kind: str
    outcome: str
    input: str | None
    output: str | None
    error: str | None
    attempts: int
    max_attempts: int
    started_at: datetime | None
    completed_at: datetime
    duration_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Undo:
    """One row of the plan."""

    position: int
    path: str
    name: str
    kind: str
    round: int
    action: str
    required: bool
    status: str
    attempts: int
    not_before: datetime | None
    executed_at: datetime | None
    error: str | None
    resolution: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One thing that others told the instance."""

    no: int
    kind: str
    name: str
    payload: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class LateResult:
    """A result whose worker had lost the instance."""

    path: str
    epoch: int
    output: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Lock:
    """A lock that it has, or queues up for."""

    key: str
    path: str
    granted_at: datetime | None
    holder_id: UUID | None
    holder_name: str | None
    holder_key: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """What a person did."""

    action: str
    path: str | None
    reason: str
    database_user: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A saga that is a step of this one."""

    id: UUID
    name: str
    key: str
    state: str
    paused_reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """Everything that is known of one instance."""

    id: UUID
    name: str
    version: int
    key: str
    state: str
    ready_at: datetime | None
    wake_at: datetime | None
    deadline_at: datetime
    lease_owner: UUID | None
    epoch: int
    checkpoints: int
    wakeups: int
    crash_count: int
    pivoted: bool
    ending: str | None
    cancel_reason: str | None
    pause_asked: str | None
    paused_reason: str | None
    waits_for: str | None
    error: str | None
    output: str | None
    parent_id: UUID | None
    parent_path: str | None
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    worker: str | None
    worker_alive_until: datetime | None
    now: datetime
    """Of the database."""
    servers: int
    """Living workers that serve its definition."""
    intents: tuple[Intent, ...]
    tasks: tuple[Task, ...]
    plan: tuple[Undo, ...]
    mail: tuple[Letter, ...]
    late: tuple[LateResult, ...]
    locks: tuple[Lock, ...]
    interventions: tuple[Intervention, ...]
    children: tuple[Child, ...]

    @property
    def called(self) -> str:
        """What people call it."""
        return f"{self.name} {self.key!r}"

    @property
    def open(self) -> tuple[Intent, ...]:
        """Calls whose result the journal does not have."""
        ended = {task.path for task in self.tasks}
        return tuple(intent for intent in self.intents if intent.path not in ended)

    @property
    def undoing(self) -> Undo | None:
        """The compensation that is next, or under way."""
        if self.ending is None:
            return None
        return next((row for row in self.plan if row.status != "completed" and not _given_up(row)), None)


def _given_up(row: Undo) -> bool:
    return row.status == "failed" and not row.required


async def find(pool: Pool, place: str) -> UUID:
    """The id of what a person names: the id itself, or `NAME/KEY`.

    Raises:
        NotFound: there is no such instance.
    """
    try:
        return UUID(place)
    except ValueError:
        name, slash, key = place.partition("/")
    if not slash:
        raise NotFound(f"{place!r} names no instance; give its id, or SAGA/KEY as in place_order/order-42")
    found = await SQL.find.fetchval(pool, name, key)
    if not isinstance(found, UUID):
        raise NotFound(f"no {name} was started under the key {key!r}; see: saga list --saga {name}")
    return found


async def instances(
    pool: Pool,
    *,
    states: Sequence[str] = (),
    name: str | None = None,
    older_than_seconds: float | None = None,
    limit: int,
) -> list[Summary]:
    """Instances, newest first."""
    rows = await SQL.list.fetch(pool, list(states) or None, name, older_than_seconds, limit)
    return [Summary(**dict(row)) for row in rows]


async def read(pool: Pool, instance_id: UUID) -> Instance:
    """One instance, with all that belongs to it.

    Raises:
        NotFound: there is no such instance.
    """
    async with (
        postgres.acquire(pool) as connection,
        connection.transaction(isolation="repeatable_read", readonly=True),
    ):
        row = await SQL.instance.fetchrow(connection, instance_id)
        if row is None:
            raise NotFound(f"there is no instance {instance_id}; see: saga list")
        columns = dict(row)
        intents = intents_from_json(columns.pop("intents"))
        tasks = _made(Task, await SQL.tasks.fetch(connection, instance_id))
        paths = [one.path for one in (*intents, *tasks) if one.kind == "child"]
        children = await SQL.children.fetch(connection, [step_key(instance_id, path) for path in paths])
        return Instance(
            **columns,
            intents=intents,
            tasks=tasks,
            plan=_made(Undo, await SQL.plan.fetch(connection, instance_id)),
            mail=_made(Letter, await SQL.mail.fetch(connection, instance_id)),
            late=_made(LateResult, await SQL.late.fetch(connection, instance_id)),
            locks=_made(Lock, await SQL.locks.fetch(connection, instance_id)),
            interventions=_made(Intervention, await SQL.interventions.fetch(connection, instance_id)),
            children=_made(Child, children),
        )


def _made(kind: Any, rows: Sequence[Record]) -> tuple[Any, ...]:
    return tuple(kind(**dict(row)) for row in rows)
