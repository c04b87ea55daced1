"""Transactional steps: exactly once, whatever becomes of the connection, and with the events that they emit."""

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from pydantic import BaseModel, field_serializer

from outbox import Event, Key, Pool, Transaction
from saga import Failed, Run, limits, operate, saga, step, transactional
from tests.support.faults import eventually
from tests.support.saga_worker import HOUR, Order, effects, journal_of, reaches, recorded, reserve, working

RECORDS = "create table records (sku text)"


class Recorded(Event, topic="records", type="record.made"):
    sku: Key[str]


@step(transactional=True)
async def announce(tx: Transaction, order: Order) -> None:
    await tx.execute("insert into records (sku) values ($1)", order.sku)
    tx.emit(Recorded(sku=order.sku))


@saga("announced", deadline=HOUR)
async def announced(run: Run, order: Order) -> str:
    await run(announce(order))
    return await run(reserve(order))


async def records(pool: Pool) -> int:
    return int(await pool.fetchval("select count(*) from records"))


async def test_what_it_emits_commits_with_it(saga_pool: Pool) -> None:
    await saga_pool.execute(RECORDS)
    async with working(saga_pool, announced):
        handle = await announced.start(saga_pool, Order())
        assert await handle.result(timeout=20) == "A1"
    rows = await saga_pool.fetch(
        "select e.key, e.xmin = r.xmin as together from outbox.events e join records r on r.sku = e.key"
    )
    assert [(row["key"], row["together"]) for row in rows] == [("x", True)]
    task = "select t.xmin = r.xmin from saga.tasks t, records r where t.path = 'announce#1'"
    assert await saga_pool.fetchval(task)


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Loses the reply to the next COMMIT of a transactional step, before or after PostgreSQL has carried it out."""
    real: Any = asyncpg.transaction.Transaction.commit
    lost: list[str] = []

    async def commit(self: Any) -> None:
        if not lost or self._isolation != "read_committed":
            await real(self)
            return
        how = lost.pop()
        if how == "after":
            await real(self)
        self._connection.terminate()
        raise ConnectionResetError(f"injected {how} COMMIT")

    monkeypatch.setattr(asyncpg.transaction.Transaction, "commit", commit)
    return lost.append


@pytest.mark.parametrize("how", ["before", "after"])
async def test_a_commit_whose_reply_is_lost_counts_once(
    saga_pool: Pool, commits: Callable[[str], None], how: str
) -> None:
    """H4 for transactional steps."""
    await saga_pool.execute(RECORDS)
    commits(how)
    async with working(saga_pool, recorded):
        handle = await recorded.start(saga_pool, Order())
        assert await handle.result(timeout=20) == 1
    assert await records(saga_pool) == 1
    assert [path for path, _ in await journal_of(saga_pool, handle.id)] == ["reserve#1", "record#1", "ship#1"]


async def test_without_reading_what_became_of_it_a_step_would_count_twice(
    saga_pool: Pool, commits: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule of the test above, removed: red there."""

    async def undone(*_: object) -> None:
        return None

    monkeypatch.setattr(transactional, "_fate", undone)
    await saga_pool.execute(RECORDS)
    commits("after")
    async with working(saga_pool, recorded):
        handle = await recorded.start(saga_pool, Order())

        async def went_wrong() -> bool:
            return await records(saga_pool) != 1 or await saga_pool.fetchval(
                "select crash_count > 0 or state = 'paused' from saga.workflow_instances where id = $1", handle.id
            )

        await eventually(went_wrong, what="a second copy, or an instance that cannot go on")


@step(transactional=True)
async def conflicting(tx: Transaction, order: Order) -> int:
    tries = TRIES[order.sku] = TRIES.get(order.sku, 0) + 1
    await tx.execute("insert into records (sku) values ($1)", order.sku)
    if tries < 3:
        await tx.execute("do $$ begin raise exception using errcode = '40001', message = 'try again'; end $$")
    return tries


TRIES: dict[str, int] = {}


@saga("conflicted", deadline=HOUR)
async def conflicted(run: Run, order: Order) -> int:
    return await run(conflicting(order))


async def test_a_conflict_is_tried_again(saga_pool: Pool) -> None:
    await saga_pool.execute(RECORDS)
    async with working(saga_pool, conflicted):
        assert await (await conflicted.start(saga_pool, Order())).result(timeout=20) == 3
    assert await records(saga_pool) == 1


async def test_a_bug_in_it_pauses_and_leaves_nothing(saga_pool: Pool) -> None:
    async with working(saga_pool, announced):  # there is no table
        handle = await announced.start(saga_pool, Order())
        await reaches(saga_pool, handle.id, "paused")
    assert "records" in await saga_pool.fetchval("select paused_reason from saga.workflow_instances")
    assert await effects(saga_pool) == []


async def test_a_signal_beside_it_neither_stops_nor_doubles_it(saga_pool: Pool) -> None:
    """News while the transaction is open: the result is written, what follows is decided again."""
    await saga_pool.execute(RECORDS)
    inside, go_on = asyncio.Event(), asyncio.Event()
    waiting["inside"], waiting["go_on"] = inside, go_on
    async with working(saga_pool, patient):
        handle = await patient.start(saga_pool, Order())
        await asyncio.wait_for(inside.wait(), 20)
        await saga_pool.execute("select saga.wake($1)", handle.id)
        go_on.set()
        assert await handle.result(timeout=20) == "A1"
    assert await records(saga_pool) == 1


async def test_a_cancel_beside_it_undoes_it(saga_pool: Pool) -> None:
    await saga_pool.execute(RECORDS)
    inside, go_on = asyncio.Event(), asyncio.Event()
    waiting["inside"], waiting["go_on"] = inside, go_on
    async with working(saga_pool, patient):
        handle = await patient.start(saga_pool, Order())
        await asyncio.wait_for(inside.wait(), 20)
        await handle.cancel("no more")
        go_on.set()
        with pytest.raises(Failed, match="no more"):
            await handle.result(timeout=20)
    assert await records(saga_pool) == 0


waiting: dict[str, asyncio.Event] = {}


@step(transactional=True)
async def wait_inside(tx: Transaction, order: Order) -> None:
    await tx.execute("insert into records (sku) values ($1)", order.sku)
    waiting["inside"].set()
    await waiting["go_on"].wait()


@wait_inside.compensation
async def undo_inside(tx: Transaction, done: object, order: Order) -> None:
    await tx.execute("delete from records where sku = $1", order.sku)


@saga("patient", deadline=HOUR)
async def patient(run: Run, order: Order) -> str:
    await run(wait_inside(order))
    return await run(reserve(order))


async def test_a_fenced_transactional_step_leaves_nothing(saga_pool: Pool) -> None:
    await saga_pool.execute(RECORDS)
    inside, go_on = asyncio.Event(), asyncio.Event()
    waiting["inside"], waiting["go_on"] = inside, go_on
    async with working(saga_pool, patient):
        handle = await patient.start(saga_pool, Order())
        await asyncio.wait_for(inside.wait(), 20)
        await take_away(saga_pool, handle.id)
        go_on.set()
        assert await handle.result(timeout=20) == "A1"
    assert await records(saga_pool) == 1
    assert await saga_pool.fetchval("select lease_epoch from saga.workflow_instances") > 2


async def take_away(pool: Pool, instance_id: UUID) -> None:
    await pool.execute(
        "update saga.workflow_instances set lease_epoch = lease_epoch + 1, lease_owner = null, ready_at = now()"
        " where id = $1",
        instance_id,
    )


class Odd(BaseModel):
    """What it is written as cannot be read."""

    count: int

    @field_serializer("count")
    def _in_words(self, count: int) -> str:
        return f"the number {count}"


@step(transactional=True)
async def odd(tx: Transaction, order: Order) -> Odd:
    await tx.execute("insert into records (sku) values ($1)", order.sku)
    waiting["inside"].set()
    return Odd(count=1)


@saga("odd_one", deadline=HOUR)
async def odd_one(run: Run, order: Order) -> int:
    return (await run(odd(order))).count


@saga("odd_pair", deadline=HOUR)
async def odd_pair(run: Run, order: Order) -> None:
    await run.parallel(odd(order), reserve(order))


@pytest.mark.parametrize("kind", [odd_one, odd_pair])
async def test_what_is_not_in_the_checkpoint_is_not_committed(saga_pool: Pool, kind: Any) -> None:
    """The result cannot be read back, so it pauses.

    Red where `Runner._finish` commits a step with any checkpoint: each resume does it once more.
    """
    await saga_pool.execute(RECORDS)
    inside = waiting["inside"] = asyncio.Event()
    async with working(saga_pool, kind) as service:
        gate = service.gates["reserve"] = asyncio.Event()
        handle = await kind.start(saga_pool, Order())
        for _ in range(2):
            await asyncio.wait_for(inside.wait(), 20)
            gate.set()
            await reaches(saga_pool, handle.id, "paused")
            assert await records(saga_pool) == 0
            inside.clear()
            await operate.resume(saga_pool, handle.id, "try again")
    reason, epoch = await saga_pool.fetchrow("select paused_reason, lease_epoch from saga.workflow_instances")
    assert epoch <= 4  # the start, two claims, the hand-over: nothing was given back
    assert reason is None or "odd#1 was rolled back, and its result cannot be read back" in reason


async def test_a_row_that_somebody_has_for_long_does_not_pause_it(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red where every conflict counts, also one for the instance's row."""
    monkeypatch.setattr(limits, "LOCKED_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(limits, "TRANSACTIONAL_ATTEMPTS", 3)
    await saga_pool.execute(RECORDS)
    inside, go_on = asyncio.Event(), asyncio.Event()
    waiting["inside"], waiting["go_on"] = inside, go_on
    tried = 0

    async def many_times() -> bool:
        nonlocal tried
        tried += inside.is_set()
        inside.clear()
        return tried > 5

    async with working(saga_pool, patient):
        handle = await patient.start(saga_pool, Order())
        await asyncio.wait_for(inside.wait(), 20)
        async with saga_pool.acquire() as connection, connection.transaction():
            await connection.execute("select from saga.workflow_instances for no key update")
            go_on.set()
            await eventually(many_times, what="several attempts")
        assert await handle.result(timeout=20) == "A1"
    assert await records(saga_pool) == 1
