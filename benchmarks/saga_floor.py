"""What durable sagas cannot be faster than: their statements alone, without a body, a decision, or a call.

A round is one group of sagas of three steps: one statement starts them, one claims them, and three write a checkpoint
of each, all on one connection, one after the other. The parameters are made before the clock runs.
"""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID, uuid4

from benchmarks.report import Report
from benchmarks.saga_ground import Ground, Plan, counters
from benchmarks.sagas import THREE, Order
from outbox.postgres import Connection
from saga import journal
from saga.journal import Start
from saga.starting import First
from saga.state import Checkpoint, Intent, TaskRow

_STEPS: Final = 3
_ORDER: Final = Order(order="1234567890/1234")
_INPUT: Final = '{"order": {"order": "1234567890/1234"}, "number": 1}'
_LEASE_SECONDS: Final = 3_600.0


async def floor(ground: Ground, plan: Plan, report: Report) -> None:
    """As many at a time as clients wait for sagas in the other parts."""
    report.section("Floor, 3 steps: bare statements")
    owner = uuid4()
    await journal.SQL.register.execute(ground.pool, owner, "floor", _LEASE_SECONDS, "[]")
    async with ground.pool.acquire() as connection:
        await _round(connection, owner, 50)  # plans, tables
        for concurrent in (1, *plan.concurrent):
            count = max(1, (plan.serial if concurrent == 1 else plan.sagas) // concurrent) * concurrent
            before, whole, alone = await counters(ground.pool), 0.0, 0.0
            for _ in range(count // concurrent):
                started_and_claimed, written = await _round(connection, owner, concurrent)
                whole += started_and_claimed + written
                alone += written
            after = await counters(ground.pool)
            report.add(f"checkpoint_floor_per_second_c{concurrent}", count / whole, "sagas/s", count)
            report.add(f"checkpoint_alone_per_second_c{concurrent}", count / alone, "sagas/s", count)
            if concurrent == 200:
                report.add("floor_commits_per_saga_c200", (after.commits - before.commits) / count, "commits", count)
                report.add(
                    "floor_wal_bytes_per_saga_c200", (after.wal_bytes - before.wal_bytes) / count, "bytes", count
                )


async def _round(connection: Connection, owner: UUID, concurrent: int) -> tuple[float, float]:
    """Seconds of start and claim, and of the checkpoints."""
    starts = [_start() for _ in range(concurrent)]
    beginning = journal._start_arguments(starts, None)  # the bare statements, nothing around them
    ids = [start.id for start in starts]
    checkpoints = [journal._arguments([_checkpoint(of, number) for of in ids]) for number in range(_STEPS)]
    began = time.perf_counter()
    await journal.SQL.start.fetch(connection, *beginning)
    claimed = await journal.SQL.claim.fetch(connection, owner, concurrent, [THREE.workflow_id])
    leased = time.perf_counter()
    for arguments in checkpoints:
        _applied(await journal.SQL.checkpoint.fetch(connection, *arguments))
    ended = time.perf_counter()
    assert len(claimed) == concurrent, f"{len(claimed)} of {concurrent} were claimed"
    return leased - began, ended - leased


def _applied(rows: Sequence[Any]) -> None:
    assert rows[-1]["answer"] == "applied", rows[-1]


def _start() -> Start:
    now, instance_id = datetime.now(UTC), uuid4()
    return Start(
        id=instance_id,
        saga=THREE,
        key=str(instance_id),
        digest=THREE.request.digest(_ORDER),
        request=THREE.request.encode(_ORDER),
        started_at=now,
        deadline_at=now + timedelta(hours=1),
        first=First(intents=(_intent(1, now),)),
    )


def _intent(number: int, now: datetime) -> Intent:
    return Intent(path=f"work#{number}", name="work", kind="step", digest=b"d" * 16, input=_INPUT, started_at=now)


def _checkpoint(instance_id: UUID, number: int) -> Checkpoint:
    """Result `number`, and the intent of the next call or the end; of an instance that was claimed once."""
    now = datetime.now(UTC)
    is_last = number == _STEPS - 1
    row = TaskRow(
        seq=number + 1,
        path=f"work#{number + 1}",
        name="work",
        kind="step",
        outcome="completed",
        digest=b"d" * 16,
        input=_INPUT,
        output='"done 1"',
        started_at=now,
        completed_at=now,
    )
    columns: dict[str, Any] = {"output": '"done 3"'} if is_last else {"next": (_intent(number + 2, now),)}
    return Checkpoint(
        id=instance_id,
        epoch=1,
        no=number,
        seen=0,
        rows=(row,),
        state="completed" if is_last else "running",
        held=not is_last,
        at=now,
        **columns,
    )
