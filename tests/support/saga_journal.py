"""Instances on PostgreSQL, and checkpoints of them by hand; for tests of the journal's statements."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from pydantic import BaseModel

from outbox import Connection, Pool
from saga import Run, Saga, StepContext, saga, step
from saga.decider import Execution
from saga.journal import Lease, Start, claim, look, start, write
from saga.outcome import context_of, perform
from saga.starting import First, first_call
from saga.state import Answer, Asked, Checkpoint, Claimed, Completed, Fact, Granted, Intent, OutboxRow, TaskRow, Work

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Order(BaseModel):
    sku: str = "x"


@step
async def charge(ctx: StepContext[Any], order: Order) -> str:
    return "paid"


@charge.compensation
async def refund(ctx: StepContext[Any], done: object, order: Order) -> None: ...


@step
async def ship(ctx: StepContext[Any], order: Order) -> str:
    return "sent"


@saga("shop", deadline=timedelta(days=10_000))
async def shop(run: Run, order: Order) -> str:
    await run(charge(order))
    return await run(ship(order))


def starts(
    *keys: str, order: Order | None = None, of: Saga[Any, Any] = shop, now: datetime = NOW, first: bool = False
) -> list[Start]:
    """Starts of a saga under these keys."""
    order = order or Order()
    made = []
    for key in keys:
        instance_id = uuid4()
        request = of.request.encode(order)
        made.append(
            Start(
                id=instance_id,
                saga=of,
                key=key,
                digest=of.request.digest(order),
                request=request,
                started_at=now,
                deadline_at=now + timedelta(seconds=of.deadline_seconds),
                first=first_call(of, instance_id, request, now) if first else First(),
            )
        )
    return made


async def begun(db: Pool | Connection, *keys: str, of: Saga[Any, Any] = shop) -> tuple[UUID, list[Lease]]:
    """Start instances and claim them; the worker's id and the leases in the order of the keys."""
    made = starts(*keys, of=of)
    await start(db, made)
    owner = uuid4()
    await living(db, owner)
    leases = {lease.claimed.id: lease for lease in await claim(db, owner, len(keys), [of.workflow_id])}
    return owner, [leases[one.id] for one in made]


async def living(db: Pool | Connection, owner: UUID, seconds: float = 60) -> None:
    await db.execute(
        "insert into saga.workers (id, name, alive_until) values ($1, 'w', clock_timestamp() + $2::interval)",
        owner,
        timedelta(seconds=seconds),
    )


def checkpoint(claimed: Claimed, **columns: Any) -> Checkpoint:
    """A checkpoint after a claim: keeps the instance and changes nothing, unless told otherwise."""
    usual: dict[str, Any] = {
        "id": claimed.id,
        "epoch": claimed.epoch,
        "no": claimed.checkpoint_no,
        "seen": claimed.mailbox.wakeups,
        "state": "running",
        "held": True,
        "at": NOW,
    }
    return Checkpoint(**{**usual, **columns})


def task(seq: int, **columns: Any) -> TaskRow:
    usual = {"seq": seq, "path": f"charge#{seq}", "name": "charge", "kind": "step", "outcome": "completed"}
    return TaskRow(**{**usual, "output": '"paid"', "completed_at": NOW, **columns})


def intent(name: str) -> Intent:
    return Intent(path=f"{name}#1", name=name, kind="step", digest=b"d" * 16, input="{}")


def message(text: str, *, is_next: bool = True) -> OutboxRow:
    return OutboxRow(
        topic="t",
        key="k",
        event_id=uuid4(),
        event_type="e",
        headers='{"saga-command": "do"}',
        payload=text.encode(),
        is_next=is_next,
    )


async def answer(db: Pool | Connection, given: Checkpoint, *, wait: bool = False) -> Answer | None:
    """The answer to one checkpoint."""
    (written,) = await write(db, [given], wait=wait)
    return written.answer


async def kind(db: Pool | Connection, given: Checkpoint) -> str:
    """The kind of the answer, or `locked`."""
    found = await answer(db, given)
    return found.kind if found is not None else "locked"


async def row(db: Pool | Connection, instance_id: UUID) -> Any:
    return await db.fetchrow("select * from saga.workflow_instances where id = $1", instance_id)


async def drive(db: Pool, sagas: Sequence[Saga[Any, Any]], *, now: datetime = NOW, limit: int = 100) -> int:
    """A worker of a few lines: claim what is ready, and run each to where it lets go; how many it claimed."""
    owner = uuid4()
    await living(db, owner)
    known = {one.workflow_id: one for one in sagas}
    leases = await claim(db, owner, limit, list(known))
    await asyncio.gather(*(_drive(db, known[lease.workflow_id], lease.claimed, now) for lease in leases))
    return len(leases)


async def _drive(db: Pool, one: Saga[Any, Any], claimed: Claimed, now: datetime) -> None:
    execution = Execution(one, claimed)
    decision = execution.begin(now)
    flying: list[Work] = []
    while not decision.released:
        flying += decision.start
        if decision.checkpoint is not None:
            (written,) = await write(db, [decision.checkpoint], wait=True)
            assert written.answer is not None
            decision = execution.answered(written.answer, now)
        elif decision.look:
            decision = execution.mail(await look(db, claimed.id), now)
        else:
            work = flying.pop(0)
            decision = execution.fact(await _perform(db, claimed, work), now)
    for chore in decision.chores:
        await db.execute(f"select saga.{chore}($1)", claimed.id)


async def _perform(db: Pool, claimed: Claimed, work: Work) -> Fact:

    if work.kind == "lock":
        got = await db.fetchval(
            "select saga.acquire($1, $2, $3, $4)", claimed.id, claimed.epoch, work.lock_key, work.path
        )
        return Granted(path=work.path) if got == "granted" else Asked(path=work.path)
    if work.kind == "undo_child":
        got = await db.fetchval("select saga.undo_child($1)", work.child_id)
        return Completed(path=work.path) if got == "undone" else Asked(path=work.path)
    return await perform(work, context_of(work, None))
