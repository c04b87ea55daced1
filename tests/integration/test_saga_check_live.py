"""`saga check --live`: what today's code would do with the instances that are in flight, found out without doing it."""

from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from outbox import Pool
from saga import Saga, limits, live
from saga.journal import claim
from saga.live import Report, Trouble, check
from saga.operate import cancel, pause
from tests.integration.test_saga_cli_orders import saga
from tests.support import changed_sagas as changed
from tests.support.mutations import broken_statement
from tests.support.saga_cases import asks, buggy, commands, retries, sleeps, undone
from tests.support.saga_journal import living
from tests.support.saga_worker import Order, effects, reaches, working

TABLES = (
    "workflows",
    "workflow_instances",
    "tasks",
    "saga_compensations",
    "signals",
    "late_results",
    "locks",
    "workers",
)


async def waiting(pool: Pool, key: str = "k") -> UUID:
    """An instance of `asks` that has reserved and waits for its approval; its worker is gone."""
    async with working(pool, asks):
        handle = await asks.start(pool, Order(), key=key)
        await reaches(pool, handle.id, "waiting")
    return handle.id


async def stuck(pool: Pool) -> UUID:
    """An instance of `undone` that is paused on its way back, at the second step of two."""
    async with working(pool, undone):
        handle = await undone.start(pool, Order(fails="unbook fails 99"), key="u")
        await reaches(pool, handle.id, "paused")
    return handle.id


async def trouble(pool: Pool, *code: Saga[Any, Any]) -> Trouble | None:
    """What is said about the only instance."""
    report = await check(pool, code)
    assert report.counts.total() == len(report.troubles) <= 1
    return report.troubles[0] if report.troubles else None


async def written(pool: Pool) -> list[Any]:
    """Every row with the transaction that wrote it and the place where it lies."""
    rows = []
    for table in (*(f"saga.{name}" for name in TABLES), "outbox.events"):
        rows += [tuple(row) for row in await pool.fetch(f"select xmin::text, ctid::text, t::text from {table} t")]
    return rows


@pytest.mark.parametrize(
    ("code", "kind", "expected", "found"),
    [
        (changed.other_step, "diverged", "step reserve#1", "step charge#1"),
        (changed.other_input, "diverged", "step reserve#1", "the same with another input"),
        (changed.other_kind, "diverged", "step reserve#1", "step parallel#1[0]/reserve#1"),
        (changed.shorter, "diverged", "step reserve#1", "the end of the body"),
        (changed.other_result, "unreadable", "a result of another form", "should be a valid integer"),
        (changed.with_bug, "breaks", "what the body got so far", "KeyError: 'price'"),
    ],
)
async def test_a_body_that_does_not_go_on_is_found_and_where(
    saga_pool: Pool, code: Saga[Any, Any], kind: str, expected: str, found: str
) -> None:
    """Red where `_problem` does not begin the execution: nothing is found."""
    instance = await waiting(saga_pool)
    said = await trouble(saga_pool, code)
    assert said is not None
    assert (said.id, said.saga, said.version, said.key, said.state) == (instance, "asks", 1, "k", "waiting")
    assert (said.kind, said.step, said.expected) == (kind, "reserve#1", expected)
    assert found in said.found
    assert said.remedy == live.REMEDIES[said.kind]


async def test_a_request_that_cannot_be_read_any_more_is_found(saga_pool: Pool) -> None:
    await waiting(saga_pool)
    said = await trouble(saga_pool, changed.other_request)
    assert said is not None
    assert (said.kind, said.step, said.expected) == ("unreadable", None, "a request of another form")


@pytest.mark.parametrize("code", [asks, changed.same, changed.longer])
async def test_code_that_comes_by_the_same_way_goes_on(saga_pool: Pool, code: Saga[Any, Any]) -> None:
    await waiting(saga_pool)
    assert await trouble(saga_pool, code) is None


async def test_an_instance_that_no_worker_ever_had_and_one_that_a_worker_has_are_replayed(saga_pool: Pool) -> None:
    """Their first call is an intent, and the code asks for another one."""
    first = await asks.start(saga_pool, Order(), key="new")
    said = await trouble(saga_pool, changed.other_step)
    assert said is not None
    assert (said.state, said.expected) == ("pending", "step reserve#1, begun")
    await living(saga_pool, owner := uuid4())
    await claim(saga_pool, owner, 9, [asks.workflow_id])
    said = await trouble(saga_pool, changed.other_step)
    assert said is not None
    assert (said.id, said.state, said.kind) == (first.id, "running", "diverged")
    assert await trouble(saga_pool, asks) is None


async def test_a_version_that_is_not_loaded_is_a_kind_of_its_own_and_other_sagas_are_only_counted(
    saga_pool: Pool,
) -> None:
    """Red where an instance without code counts as one that goes on."""
    await waiting(saga_pool)
    await sleeps.start(saga_pool, Order())
    report = await check(saga_pool, [changed.next_version])
    assert [(one.kind, one.expected, one.found) for one in report.troubles] == [
        ("no-code", "version 1", "version 2 only")
    ]
    assert (report.checked, report.others) == (0, {"sleeps": 1})
    both = await check(saga_pool, [changed.next_version, asks])
    assert (both.checked, both.counts.total()) == (1, 0)


async def test_what_is_left_to_undo_is_looked_at_and_not_only_what_is_next(saga_pool: Pool) -> None:
    """Red without `check_way_back`: `reserve` comes after `book`, and is not asked for at first."""
    instance = await stuck(saga_pool)
    gone = await trouble(saga_pool, changed.without_step)
    assert gone is not None
    assert (gone.id, gone.state, gone.kind, gone.step) == (instance, "paused", "no-undo", "book#1")
    assert "nothing is called book" in gone.found
    later = await trouble(saga_pool, changed.without_undo)
    assert later is not None
    assert (later.kind, later.step) == ("no-undo", "reserve#1")
    assert "reserve has no compensation" in later.found
    assert await trouble(saga_pool, undone) is None


async def test_an_instance_that_is_being_undone_does_not_ask_its_body(saga_pool: Pool) -> None:
    """As in production: a body that has changed does not keep a cancelled instance from being undone."""
    instance = await waiting(saga_pool)
    await cancel(saga_pool, instance, "the customer called")
    assert await trouble(saga_pool, changed.other_step) is None


async def test_a_paused_instance_tells_whether_the_mended_code_goes_on(saga_pool: Pool) -> None:
    """Red where every pause counts as trouble, whatever the reason: also the one that a person asked for."""
    async with working(saga_pool, buggy):
        handle = await buggy.start(saga_pool, Order())
        await reaches(saga_pool, handle.id, "paused")
    still = await trouble(saga_pool, buggy)
    assert still is not None
    assert (still.kind, still.state, still.step) == ("breaks", "paused", "reserve#1")
    instance = await waiting(saga_pool)
    await pause(saga_pool, instance, "a deployment")
    report = await check(saga_pool, [changed.other_step])
    assert [(one.id, one.state, one.kind) for one in report.troubles] == [(instance, "paused", "diverged")]
    await saga_pool.execute("update saga.workflow_instances set pause_asked = 'x' where id = $1", instance)
    assert (await check(saga_pool, [changed.other_step])).counts == {"diverged": 1}
    assert (await check(saga_pool, [asks])).counts == {}


async def test_a_journal_that_breaks_the_decider_itself_does_not_hide_the_others(saga_pool: Pool) -> None:
    """Red where only what the decider pauses for is told: the first such instance ends the whole check."""
    broken = await commands.start(saga_pool, Order(), key="broken")
    await saga_pool.execute(
        "insert into saga.signals (instance_id, no, kind, name, payload) values ($1, 1, 'reply', $2, '{}')",
        broken.id,
        "stock.reserve#1",
    )
    fine = await commands.start(saga_pool, Order(), key="fine")
    report = await check(saga_pool, [commands])
    assert [(one.id, one.kind, one.found) for one in report.troubles] == [(broken.id, "breaks", "KeyError: 'outcome'")]
    assert (report.checked, fine.id != broken.id) == (2, True)


async def test_nothing_is_written_and_nothing_is_called(saga_pool: Pool) -> None:
    """Every state there is. Red where the replay claims what it reads: PostgreSQL refuses it."""
    async with working(saga_pool, retries) as service:
        retried = await retries.start(saga_pool, Order())
        await reaches(saga_pool, retried.id, "waiting")
    await waiting(saga_pool)
    await stuck(saga_pool)
    await asks.start(saga_pool, Order(), key="pending")
    before, done, calls = await written(saga_pool), await effects(saga_pool), service.counts.copy()
    for code in ([asks, undone, retries], [changed.other_step, changed.without_step]):
        report = await check(saga_pool, code)
        assert report.checked >= 3
    assert await written(saga_pool) == before
    assert (await effects(saga_pool), service.counts) == (done, calls)
    served = "array(select i.workflow_id from saga.workflow_instances i where i.id = any ($1::uuid[]))"
    claiming = f"saga.claim(($1::uuid[])[1], array_length($2::uuid[], 1), {served})"
    with (
        broken_statement(live.SQL, "journals", "saga.read_claimed($1, $2)", claiming),
        pytest.raises(asyncpg.ReadOnlySQLTransactionError),
    ):
        await check(saga_pool, [asks])


async def test_instances_are_read_in_pages_and_all_of_them(saga_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red where a page does not begin after the last one, or does not end."""
    monkeypatch.setattr(limits, "CLAIM_MAX_INSTANCES", 2)
    for number in range(5):
        await asks.start(saga_pool, Order(), key=str(number))
    ended = await asks.start(saga_pool, Order(), key="ended")
    await saga_pool.execute("update saga.workflow_instances set state = 'completed' where id = $1", ended.id)
    seen: list[tuple[int, int]] = []
    report: Report = await check(
        saga_pool, [changed.other_step], keep=3, progress=lambda *figures: seen.append(figures)
    )
    assert (report.checked, report.counts, len(report.troubles)) == (5, {"diverged": 5}, 3)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert (await check(saga_pool, [changed.other_step], name="nothing")).checked == 0


async def test_the_command_says_which_instance_which_step_what_and_what_to_do(saga_pool: Pool, database: str) -> None:
    instance = await waiting(saga_pool)
    await sleeps.start(saga_pool, Order())
    await undone.start(saga_pool, Order())
    said = await saga(database, "check", "tests.support.deployment", "--live", status=1)
    for text in (
        "asks/k",
        "waiting",
        "diverged",
        "reserve#1",
        "charge#1",
        "declare the changed one",
        "undone (1)",
    ):
        assert text in said.out
    assert "2 in flight replayed, the code goes on with 1" in said.out
    whole = (await saga(database, "check", "tests.support.deployment", "--live", "--json", status=1)).json
    assert [(one["id"], one["step"]) for one in whole["troubles"]] == [(str(instance), "reserve#1")]
    assert (whole["checked"], whole["counts"], whole["more"]) == (2, {"diverged": 1}, False)
    fine = await saga(database, "check", "tests.support.deployment", "--live", "--saga", "sleeps")
    assert fine.out == "1 in flight replayed, the code goes on with 1\n"


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["tests.support.deployment", "--live", "--saga", "nothing"], 2, "has no saga nothing"),
        (["tests.support.deployment", "--saga", "asks"], 2, "go with --live"),
        (["tests.support.pages", "--live"], 2, "has no saga at all"),
    ],
)
async def test_what_is_wrong_is_one_line(
    saga_pool: Pool, database: str, arguments: list[str], status: int, text: str
) -> None:
    said = await saga(database, "check", *arguments, status=status)
    assert text in said.err
    assert len(said.err.splitlines()) == 1
