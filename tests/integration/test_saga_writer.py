"""Group commit: who is held up by whom, what is sent again, and who pauses."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from outbox import Pool, crash_sites
from saga import journal, writer
from saga.journal import Written
from saga.state import Checkpoint
from saga.writer import ValueRefusedError, Writer
from tests.support.faults import Fault, Injector, eventually
from tests.support.saga_journal import begun, checkpoint, message, row, task
from tests.support.saga_worker import Order, effects, journal_of, reaches, shop, working


@asynccontextmanager
async def writing(pool: Pool) -> AsyncIterator[Writer]:
    made = Writer(pool)
    running = asyncio.create_task(made.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_checkpoints_that_arrive_meanwhile_share_a_commit(saga_pool: Pool) -> None:
    _, leases = await begun(saga_pool, *(f"k{n}" for n in range(50)))
    async with writing(saga_pool) as made:
        answers = await asyncio.gather(*(made.submit(checkpoint(lease.claimed, rows=(task(1),))) for lease in leases))
    assert {answer.kind for answer in answers} == {"applied"}
    assert (made.checkpoints, made.groups) == (50, 1)


async def test_of_many_that_wait_half_are_sent_at_a_time(saga_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the server and the deciders have something to do at the same time. Red where all of them are sent."""
    monkeypatch.setattr("saga.limits.GROUP_SPLIT_INSTANCES", 5)
    _, leases = await begun(saga_pool, *(f"k{n}" for n in range(20)))
    sizes: list[int] = []
    real = journal.write

    async def counts(db: Any, checkpoints: Sequence[Checkpoint], **options: Any) -> list[Written]:
        sizes.append(len(checkpoints))
        return await real(db, checkpoints, **options)

    monkeypatch.setattr(journal, "write", counts)
    async with writing(saga_pool) as made:
        answers = await asyncio.gather(*(made.submit(checkpoint(lease.claimed, rows=(task(1),))) for lease in leases))
    assert {answer.kind for answer in answers} == {"applied"}
    assert sizes == [10, 5, 5]


@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_a_locked_instance_holds_up_nobody_and_is_written_when_it_is_free(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """H20. Red where the group waits for locked rows: seen with `removed`."""
    if rule == "removed":
        real = journal.write

        async def waits(db: Any, checkpoints: Sequence[Checkpoint], **_: Any) -> list[Written]:
            return await real(db, checkpoints, wait=True)

        monkeypatch.setattr(journal, "write", waits)
    _, (first, second) = await begun(saga_pool, "a", "b")
    async with writing(saga_pool) as made, saga_pool.acquire() as somebody:
        cancel = somebody.transaction()
        await cancel.start()
        await somebody.execute("select saga.cancel('shop', 'a', 'why')")
        locked = made.submit(checkpoint(first.claimed, rows=(task(1),)))
        free = made.submit(checkpoint(second.claimed, rows=(task(1),)))
        done, _ = await asyncio.wait([free], timeout=10 if rule == "kept" else 1)
        assert bool(done) == (rule == "kept")
        assert not locked.done()
        await cancel.commit()
        assert (await locked).kind == "news"
        assert (await free).kind == "applied"


async def test_a_locked_instance_does_not_hold_up_those_who_come_later(saga_pool: Pool) -> None:
    """H20. Red where `Writer.run` keeps it in the group that it sends again: nothing else is written any more."""
    _, (first, second) = await begun(saga_pool, "a", "b")
    async with writing(saga_pool) as made, saga_pool.acquire() as somebody:
        async with somebody.transaction():
            await somebody.execute("select saga.cancel('shop', 'a', 'why')")
            locked = made.submit(checkpoint(first.claimed, rows=(task(1),)))

            async def waits() -> bool:
                return bool(made.alone)

            await eventually(waits, what="it waits alone")
            groups = made.groups
            free = await asyncio.wait_for(made.submit(checkpoint(second.claimed, rows=(task(1),))), 10)
            assert free.kind == "applied"
            assert (made.groups, made.alone) == (groups + 1, 1)
        assert (await locked).kind == "news"


async def test_locked_instances_are_tried_again_after_lock_timeout(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H20: no connection waits for a row for ever."""
    monkeypatch.setattr("saga.limits.LOCKED_WAIT_SECONDS", 0.05)
    timeouts = asyncio.Event()
    monkeypatch.setattr(writer.log, "info", lambda *_: timeouts.set())
    _, (first,) = await begun(saga_pool, "a")
    async with writing(saga_pool) as made, saga_pool.acquire() as somebody:
        async with somebody.transaction():
            await somebody.execute("select from saga.workflow_instances for update")
            locked = made.submit(checkpoint(first.claimed, rows=(task(1),)))
            await asyncio.wait_for(timeouts.wait(), 20)
        assert (await locked).kind == "applied"


@pytest.mark.parametrize("side", ["before", "after"])
async def test_a_group_whose_reply_is_lost_is_sent_again_and_applied_once(saga_pool: Pool, side: Any) -> None:
    """H4, H45. Red where the group is not sent again; that it counts once: test_saga_journal."""
    _, leases = await begun(saga_pool, *(f"k{n}" for n in range(20)))
    crash_sites.hook = Injector(Fault("saga.journal.checkpoint", side, "disconnect"))
    try:
        async with writing(saga_pool) as made:
            each = (made.submit(checkpoint(lease.claimed, rows=(task(1),), outbox=(message("m"),))) for lease in leases)
            answers = await asyncio.gather(*each)
    finally:
        crash_sites.hook = None
    assert {answer.kind for answer in answers} == {"applied"}
    assert await saga_pool.fetchval("select count(*) from outbox.events") == 20


@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_one_refused_value_stops_one_instance(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """H50. Red where a group is not taken apart: seen with `removed`."""
    _, leases = await begun(saga_pool, *(f"k{n}" for n in range(9)))
    made_of = [
        checkpoint(lease.claimed, rows=(task(1, output="{}" if n != 4 else '"\\u'),)) for n, lease in enumerate(leases)
    ]
    if rule == "removed":

        async def gives_up(_self: Writer, _connection: Any, group: Any) -> None:
            for entry in group:
                entry.fail(ValueRefusedError())

        monkeypatch.setattr(Writer, "_halve", gives_up)
    async with writing(saga_pool) as made:
        each = [made.submit(one) for one in made_of]
        answers = await asyncio.gather(*each, return_exceptions=True)
    refused = [n for n, answer in enumerate(answers) if isinstance(answer, ValueRefusedError)]
    assert (refused == [4]) == (rule == "kept")


async def test_an_instance_whose_result_is_refused_pauses_and_others_go_on(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H50."""
    real: Any = journal._arguments

    def spoils(checkpoints: Sequence[Checkpoint]) -> list[Any]:
        arguments = real(checkpoints)
        arguments[21] = [
            '"\\u' if "bad" in (given or "") else output for given, output in zip(*arguments[20:22], strict=True)
        ]
        return list(arguments)

    monkeypatch.setattr(journal, "_arguments", spoils)
    async with working(saga_pool, shop):
        good, bad = await asyncio.gather(shop.start(saga_pool, Order()), shop.start(saga_pool, Order(sku="bad")))
        assert await good.result(timeout=20) == "A1 paid sent"
        await reaches(saga_pool, bad.id, "paused")
    assert "refuses a value" in (await row(saga_pool, bad.id))["paused_reason"]
    assert await journal_of(saga_pool, bad.id) == []
    assert len(await effects(saga_pool)) == 4


async def test_a_database_that_is_away_for_a_moment_loses_nothing(saga_pool: Pool) -> None:
    async with working(saga_pool, shop) as service:
        service.gates, service.reached = {"charge": asyncio.Event()}, {"charge": asyncio.Event()}
        handles = [await shop.start(saga_pool, Order(sku=str(n))) for n in range(10)]

        async def all_there() -> bool:
            return service.counts["charge"] == 10

        await eventually(all_there, what="all sagas are in their second step")
        async with saga_pool.acquire() as killer:
            await killer.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where datname = current_database() and pid <> pg_backend_pid()"
            )
        service.gates["charge"].set()
        for handle in handles:
            assert await handle.result(timeout=30) == "A1 paid sent"
    assert sorted(await effects(saga_pool)) == ["charge"] * 10 + ["reserve"] * 10 + ["ship"] * 10
