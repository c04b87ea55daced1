"""A participant without Kafka: commands by hand, each with its effect once, and always answered."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta

import asyncpg
import pytest
import pytest_asyncio

from outbox import Pool, Transaction, crash_sites
from saga import Participant, SagaDeclarationError, answering, exchange, limits
from saga.answering import FORGOTTEN, TOO_OLD, UNDONE_BEFORE
from saga.serving import ParticipantTarget
from tests.support.caching import parked
from tests.support.faults import eventually
from tests.support.mutations import broken_statement
from tests.support.participants import Desk, ReserveStock, Step, Stock, create_stock, now, put, replies

OK = {"outcome": "completed", "output": {"shelf": "A1"}}


@pytest_asyncio.fixture
async def pool(saga_pool: Pool) -> AsyncIterator[Pool]:
    await create_stock(saga_pool)
    yield saga_pool
    crash_sites.hook = None


@pytest_asyncio.fixture
async def desk(pool: Pool) -> Desk:
    return await Desk.open(pool, Stock())


def step(desk: Desk, fails: str = "") -> Step:
    return Step(desk.stock.reserve, ReserveStock(fails=fails))


async def test_do_and_undo_are_answered_in_the_form_that_the_mailbox_takes(desk: Desk) -> None:
    one = step(desk)
    await desk.send(one.do())
    await desk.send(one.undo(round_no=2))
    assert desk.stock.calls == ["do", "undo A1"]
    done, undone = await replies(desk.pool)
    assert done[1] == OK
    assert undone[1] == {"round": 2}
    assert done[0]["saga-reply"] == "do"
    assert undone[0]["saga-round"] == "2"
    assert {headers["saga-id"] for headers, _ in (done, undone)} == {str(one.instance_id)}
    rows = await desk.pool.fetch("select topic, key, event_type from outbox.events where headers ? 'saga-reply'")
    assert {(row["topic"], row["key"]) for row in rows} == {(one.reply_to, str(one.instance_id))}
    assert await desk.net() == 0


async def test_a_batch_has_every_effect_and_every_answer(desk: Desk) -> None:
    await desk.send(*(step(desk).do() for _ in range(20)))
    assert await desk.net() == 20
    assert await desk.answers() == [OK] * 20
    assert await desk.pool.fetchval("select count(*) from outbox.events where topic = 'stock-moves'") == 20


async def test_a_duplicate_command_is_answered_from_its_row(desk: Desk) -> None:
    """In one batch and in another, as another message. Red with `row.outcome is None` of `_known_do` made true."""
    one = step(desk)
    await desk.send(one.do(), one.do())
    await desk.send(one.do())
    await desk.send(replace(one.undo()), one.undo(), one.undo(attempt=1))
    assert desk.stock.calls == ["do", "undo A1"]
    assert await desk.answers() == [OK] * 3 + [{"round": 0}] * 3
    assert len({headers["saga-answers"] for headers, _ in (await replies(desk.pool))[3:]}) == 2
    assert await desk.net() == 0


async def test_rejected_is_an_answer_and_leaves_nothing(desk: Desk) -> None:
    """The others of its batch are not troubled."""
    one, other = step(desk, "rejects"), step(desk)
    await desk.send(other.do(), one.do(), step(desk).do())
    await desk.send(one.do(), one.undo())
    assert await desk.net() == 2
    assert await desk.pool.fetchval("select count(*) from outbox.events where topic = 'stock-moves'") == 2
    no = {"outcome": "rejected", "error": "out of stock"}
    assert await desk.answers() == [OK, no, OK, no, {"round": 0}]
    assert not await parked(desk.pool, desk.stock.target.name)


async def test_after_a_refusal_batches_are_careful_from_the_start(desk: Desk) -> None:
    await desk.send(step(desk, "rejects").do())
    assert desk.stock.calls == ["do"] * 2
    await desk.send(step(desk, "rejects").do(), step(desk).do())
    assert desk.stock.calls == ["do"] * 4


# ---------------------------------------------------------------------------------------------------- H29


async def test_a_do_after_its_undo_is_rejected(desk: Desk) -> None:
    """H29. Red with `is_undone = x.is_undone` left out of `answer`: see below."""
    one = step(desk)
    await desk.send(one.undo())
    await desk.send(one.do())
    await desk.send(one.do(), one.undo())
    assert desk.stock.calls == []
    no = {"outcome": "rejected", "error": UNDONE_BEFORE}
    assert await desk.answers() == [{"round": 0}, no, no, {"round": 0}]
    assert await desk.net() == 0


async def test_without_the_tombstone_the_effect_stays_for_ever(desk: Desk) -> None:
    """H29 as it would be: the mutation of the test before, which shows that it can fail."""
    one = step(desk)
    with broken_statement(answering.SQL, "answer", "is_undone = x.is_undone, "):
        await desk.send(one.undo())
        await desk.send(one.do())
    assert await desk.net() == 1


async def test_do_and_undo_that_race_on_two_partitions_take_turns(pool: Pool) -> None:
    """A topic got more partitions in between: the undo waits for the row of the do, and finds what it did.

    Red with `take` that inserts nothing: the undo is acknowledged while the do is still open.
    """
    holding, release = asyncio.Event(), asyncio.Event()

    async def hold(tx: Transaction, command: ReserveStock) -> None:
        holding.set()
        await release.wait()

    stock = Stock(on_do=hold)
    first, second = await Desk.open(pool, stock, 0), await Desk.open(pool, stock, 1)
    one = step(first)
    doing = asyncio.create_task(first.send(one.do()))
    await holding.wait()
    undoing = asyncio.create_task(second.send(one.undo()))

    async def waits() -> bool:
        return bool(await pool.fetchval("select exists (select from pg_locks where not granted)"))

    await eventually(waits, what="the undo waits")
    release.set()
    await asyncio.gather(doing, undoing)
    assert stock.calls == ["do", "undo A1"]
    assert await first.net() == 0


async def test_a_do_older_than_the_retention_of_tombstones_is_refused(desk: Desk) -> None:
    """H29. The tombstone has been deleted, and the do is older than it could have become."""
    sent = now() - timedelta(days=limits.COMMAND_MAX_AGE_DAYS, hours=1)
    one = replace(step(desk), sent=sent)
    await desk.send(one.undo())
    await desk.pool.execute("update saga.commands set forget_at = now()")
    assert await exchange.forget(desk.pool) == 1
    await desk.send(one.do())
    assert desk.stock.calls == []
    assert (await desk.answers())[-1] == {"outcome": "rejected", "error": TOO_OLD}


async def test_tombstones_outlive_every_do_that_is_not_refused(desk: Desk) -> None:
    """By a day, for clocks that differ."""
    one = replace(step(desk), sent=now() - timedelta(days=limits.COMMAND_MAX_AGE_DAYS, hours=-1))
    await desk.send(one.undo())
    assert await exchange.forget(desk.pool) == 0
    kept = await desk.pool.fetchval("select extract(epoch from forget_at - now())::float8 from saga.commands")
    assert kept > (limits.COMMAND_MAX_AGE_DAYS + 1) * 86_400 - 60


async def test_what_was_done_can_be_undone_until_long_after_the_sagas_deadline(desk: Desk) -> None:
    one = replace(step(desk), deadline=now() + timedelta(days=100))
    await desk.send(one.do())
    days = "select extract(epoch from forget_at - now())::float8 / 86400 from saga.commands"
    assert await desk.pool.fetchval(days) == pytest.approx(100 + limits.COMMANDS_UNDOABLE_DAYS, abs=0.1)
    await desk.send(one.undo())
    assert await desk.pool.fetchval(days) > 100


async def test_an_undo_of_what_was_forgotten_is_no_success(desk: Desk) -> None:
    """Acknowledging it would be a lie: the stock is still reserved. Red without the age in `_known_undo`."""
    one = replace(step(desk), sent=now() - timedelta(days=200))
    await desk.pool.execute("update stock set available = 99")
    await desk.send(one.undo())
    assert await desk.answers() == [{"round": 0, "error": FORGOTTEN}]


async def test_a_participant_without_compensation_acknowledges_at_once(pool: Pool) -> None:
    desk = await Desk.open(pool, Stock(has_undo=False))
    one, old = step(desk), replace(step(desk), sent=now() - timedelta(days=200))
    await desk.send(one.do(), one.undo(), old.undo())
    assert await desk.answers() == [OK, {"round": 0}, {"round": 0}]
    assert await desk.net() == 1
    days = "select max(extract(epoch from forget_at - now())::float8) / 86400 from saga.commands"
    assert await pool.fetchval(days) < limits.COMMANDS_KEPT_DAYS + 0.1


async def test_forgetting_goes_in_steps_and_only_what_is_due(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await desk.send(*(step(desk).undo() for _ in range(25)))
    await desk.pool.execute(
        "update saga.commands set forget_at = now() where key in (select key from saga.commands limit 21)"
    )
    monkeypatch.setattr(limits, "FORGET_ROWS", 10)
    assert await exchange.forget(desk.pool) == 21
    assert await desk.pool.fetchval("select count(*) from saga.commands") == 4


# ---------------------------------------------------------------------------------------------------- poison


@pytest.mark.parametrize("how", ["breaks", "returns nonsense", "returns much"])
async def test_a_poison_command_is_answered_with_its_failure_and_blocks_nobody(desk: Desk, how: str) -> None:
    """Its saga's later commands wait; everybody else's pass. Red where `_failed` never is the last attempt."""
    poison = step(desk, how)
    behind = replace(step(desk), instance_id=poison.instance_id, path="stock.reserve#2")
    await desk.send(step(desk).do(), poison.do(), behind.do(), step(desk).do())
    assert await desk.answers() == [OK, OK]
    assert await parked(desk.pool, desk.stock.target.name) == {str(poison.instance_id): ["stock.reserve.do"] * 2}
    for attempt in range(2, limits.COMMAND_ATTEMPTS + 1):
        assert len(await desk.answers()) == 2, attempt
        await desk.retry()
    last = (await desk.answers())[2:]
    assert [answer["outcome"] for answer in last] == ["unknown", "completed"]
    assert not await parked(desk.pool, desk.stock.target.name)
    assert await desk.net() == 3
    await desk.send(poison.do(), poison.undo())
    assert (await desk.answers())[4:] == [last[0], {"round": 0}]
    assert await desk.net() == 3


async def test_a_failure_that_goes_away_costs_nothing(desk: Desk) -> None:
    async def fails_twice(tx: Transaction, command: ReserveStock) -> None:
        if len(desk.stock.calls) < 4:  # the first batch is done twice
            raise ConnectionAbortedError("the shelf does not answer")

    desk.stock.on_do = fails_twice
    await desk.send(step(desk).do())
    await desk.retry()
    await desk.retry()
    assert await desk.answers() == [OK]
    assert await desk.net() == 1
    assert await desk.pool.fetchval("select attempts from saga.commands") == 0


async def test_a_do_that_is_not_waited_for_any_more_is_not_tried_again(desk: Desk) -> None:
    """So that the undo behind it has its turn."""
    one = replace(step(desk, "breaks"), sent=now() - timedelta(minutes=5))
    await desk.send(one.do(), one.undo())
    assert [answer.get("outcome") for answer in await desk.answers()] == ["unknown", None]


async def test_many_poison_commands_of_one_saga_are_all_answered(desk: Desk) -> None:
    """Attempts are each command's own. Red where the parked key's attempts go on counting: it waits for a person."""
    poison = step(desk, "breaks")
    steps = [replace(poison, path=f"stock.reserve#{number}") for number in range(1, 6)]
    await desk.send(*(one.do() for one in steps))
    for _ in range(len(steps) * limits.COMMAND_ATTEMPTS):
        await desk.retry()
    assert [answer["outcome"] for answer in await desk.answers()] == ["unknown"] * len(steps)
    assert not await parked(desk.pool, desk.stock.target.name)


async def test_a_failing_compensation_is_tried_again_and_then_answered(desk: Desk) -> None:
    one = step(desk)
    desk.stock.undo_fails = limits.COMMAND_ATTEMPTS + 2  # the first batch is done twice, and one attempt of the next
    await desk.send(one.do())
    await desk.send(one.undo())
    for _ in range(limits.COMMAND_ATTEMPTS):
        await desk.retry()
    assert "the compensation fails" in (await desk.answers())[-1]["error"]
    assert await desk.net() == 1
    await desk.send(one.undo(attempt=1))
    await desk.retry()
    assert (await desk.answers())[-1] == {"round": 0}
    assert await desk.net() == 0


async def test_an_unknown_contract_is_answered(desk: Desk) -> None:
    one = step(desk)
    await desk.send(replace(one.do(), event_type="stock.paint.do"))
    for _ in range(limits.COMMAND_ATTEMPTS):
        await desk.retry()
    (answer,) = await desk.answers()
    assert answer["outcome"] == "unknown"
    assert "has no handler of stock.paint" in answer["error"]
    await desk.send(replace(one.undo(), event_type="stock.paint.undo"))
    assert (await desk.answers())[-1] == {"round": 0}


async def test_a_record_that_nobody_could_answer_is_parked_alone(desk: Desk) -> None:
    one = step(desk)
    broken = replace(one.do(), headers='{"saga-command": "do"}')
    outcome = await desk.send(broken, replace(broken, headers="{}"), one.do())
    assert (outcome.applied, outcome.unknown, outcome.parked) == (1, 1, 1)
    assert await desk.answers() == [OK]
    assert list(await parked(desk.pool, desk.stock.target.name)) == ["offset 0 of partition 0"]
    await desk.retry()
    assert list(await parked(desk.pool, desk.stock.target.name)) == ["offset 0 of partition 0"]


async def struck(desk: Desk, one: Step) -> int:
    """Apply one command and another saga's, until it works; how often the batch was lost."""
    records = [put(desk.kafka, one.do()), put(desk.kafka, step(desk).do())]
    for lost in range(20):
        desk.partition = await desk.engine.claim(desk.stock.target.topic, 0, 0)
        try:
            await desk.engine.apply(desk.partition, records)
        except (asyncpg.PostgresError, OSError, TimeoutError, asyncpg.InterfaceError):
            continue
        return lost
    pytest.fail("the partition stands still")


@pytest.mark.parametrize("how", ["deadlock", "hangs in a statement", "loses its connection"])
async def test_a_handler_that_takes_its_batch_with_it_does_so_a_few_times_only(pool: Pool, how: str) -> None:
    """An error of the database is nobody's fault, unless it is always the same command's. Red without strikes."""

    async def fail(tx: Transaction, command: ReserveStock) -> None:
        if command.fails == "":
            return
        if how == "deadlock":
            await tx.execute("do $$ begin raise exception using errcode = '40P01'; end $$")
        elif how == "hangs in a statement":
            await tx.execute("select pg_sleep(60)")
        else:
            await tx.execute("select pg_terminate_backend(pg_backend_pid())")

    desk = await Desk.open(pool, Stock(on_do=fail, timeout=0.2))
    lost = await struck(desk, step(desk, "strikes"))
    assert limits.COMMAND_STRIKES <= lost <= limits.COMMAND_STRIKES + 1
    assert [answer["outcome"] for answer in await desk.answers()] == ["unknown", "completed"]
    assert await desk.net() == 1


# ---------------------------------------------------------------------------------------------------- crashes


SITES = [
    "saga.answering.take",
    "saga.answering.answer",
    "outbox.transaction.flush",
    "outbox.consumer.handling.end_event",
    "outbox.consumer.apply.advance",
]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("side", ["before", "after"])
async def test_an_error_at_any_line_leaves_nothing_and_the_next_try_everything(
    desk: Desk, site: str, side: str
) -> None:
    one, other = step(desk), step(desk, "rejects")
    records = [put(desk.kafka, row) for row in (one.do(), other.do(), one.undo())]
    broken = 0

    async def lose(at: str, on: str) -> None:
        nonlocal broken
        if (at, on) == (site, side) and not broken:
            broken += 1
            raise asyncpg.AdminShutdownError("injected")

    crash_sites.hook = lose
    with pytest.raises(asyncpg.AdminShutdownError):
        await desk.engine.apply(desk.partition, records)
    assert broken == 1
    assert await desk.answers() == []
    assert await desk.pool.fetchval("select count(*) from saga.commands") == 0
    desk.partition = await desk.engine.claim(desk.stock.target.topic, 0, 0)
    await desk.engine.apply(desk.partition, records)
    assert await desk.answers() == [OK, {"outcome": "rejected", "error": "out of stock"}, {"round": 0}]
    assert await desk.net() == 0


def test_a_participant_without_handlers_is_refused() -> None:
    with pytest.raises(SagaDeclarationError, match="has no handlers"):
        ParticipantTarget(Participant("stock"))
