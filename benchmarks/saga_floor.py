"""The bare checkpoint statement: no body, no decision, no call; what durable sagas cannot be faster than."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from benchmarks.report import Report
from benchmarks.sagas import THREE, Ground, Order, Plan
from saga import journal
from saga.journal import Lease, Start
from saga.starting import First
from saga.state import Checkpoint, Intent, TaskRow

_STEPS = 3
_INPUT = '{"order": {"order": "1234567890/1234"}, "number": 1}'


async def floor(ground: Ground, plan: Plan, report: Report) -> None:
    """As many checkpoints as three-step sagas need, by one connection, for as many instances at a time."""
    report.section("Floor: the checkpoint statement alone")
    for concurrent in plan.concurrent:
        rounds = max(1, plan.sagas // concurrent)
        seconds = 0.0
        for _ in range(rounds):
            seconds += await _round(ground, concurrent)
        rate = rounds * concurrent / seconds
        report.add(f"checkpoint_floor_per_second_c{concurrent}", rate, "sagas/s", rounds * concurrent)


async def _round(ground: Ground, concurrent: int) -> float:
    """Seconds for the checkpoints of so many sagas; they are started and claimed before the clock runs."""
    owner = uuid4()
    await _claimed(ground, owner, concurrent)
    leases: list[Lease] = []
    while len(leases) < concurrent:
        leases += await journal.claim(ground.pool, owner, concurrent, [THREE.workflow_id])
    statements = [
        journal._arguments([_checkpoint(lease, number) for lease in leases])  # the bare statement, nothing around it
        for number in range(_STEPS)
    ]
    async with ground.pool.acquire() as connection:
        began = time.perf_counter()
        for arguments in statements:
            rows = await journal.SQL.checkpoint.fetch(connection, *arguments)
            assert rows[-1]["answer"] == "applied", rows[-1]
        return time.perf_counter() - began


async def _claimed(ground: Ground, owner: UUID, count: int) -> None:
    await journal.SQL.register.execute(ground.pool, owner, "floor", 3_600.0, "[]")
    now = datetime.now(UTC)
    order = Order(order="x")
    starts = [
        Start(
            id=(instance_id := uuid4()),
            saga=THREE,
            key=str(instance_id),
            digest=THREE.request.digest(order),
            request=THREE.request.encode(order),
            started_at=now,
            deadline_at=now + timedelta(hours=1),
            first=First(),
        )
        for _ in range(count)
    ]
    await journal.start(ground.pool, starts)


def _checkpoint(lease: Lease, number: int) -> Checkpoint:
    """Result `number`, and the intent of the next call or the end."""
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
    following = Intent(
        path=f"work#{number + 2}", name="work", kind="step", digest=b"d" * 16, input=_INPUT, started_at=now
    )
    columns: dict[str, Any] = {"output": '"done 3"'} if is_last else {"next": (following,)}
    return Checkpoint(
        id=lease.claimed.id,
        epoch=lease.claimed.epoch,
        no=lease.claimed.checkpoint_no + number,
        seen=lease.claimed.mailbox.wakeups,
        rows=(row,),
        state="completed" if is_last else "running",
        held=not is_last,
        at=now,
        **columns,
    )
