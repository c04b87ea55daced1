"""Hazards of sagas on PostgreSQL, each with its rule kept and with its rule removed, so that the test is seen red."""

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from outbox import Pool, crash_sites, transaction
from saga import limits, writer
from saga.journal import claim, start, write
from tests.integration.test_saga_journal import waits_for_a_lock
from tests.integration.test_saga_writer import writing
from tests.support.faults import Fault, Injector, eventually
from tests.support.mutations import break_function
from tests.support.saga_journal import begun, checkpoint, living, message, row, starts, task
from tests.support.saga_journal import shop as journalled
from tests.support.saga_worker import Order, effects, packed, reaches, shop, working

RULE = pytest.mark.parametrize("rule", ["kept", "removed"])

# ------------------------------------------------------------------------------------------------ H3

SKIPS = "for no key update skip locked"
READS_LATER = "return query select * from saga.read_claimed(taken, coalesce(unused, '{}'));"
TAKES = """taken := taken || array(
            select i.id from saga.workflow_instances i
             where i.workflow_id = w and i.ready_at is not null
             order by i.ready_at limit p_limit - cardinality(taken) for no key update skip locked);"""
TAKES_AND_READS = """select array_agg(c.id), array_agg(c.journal) into taken, journals
      from (select ids.id, (select j from saga.read_claimed(array[ids.id], '{}') j) as journal
              from (select i.id from saga.workflow_instances i
                     where i.workflow_id = w and i.ready_at is not null
                     order by i.ready_at limit p_limit for no key update) ids) c;"""
READS_WITH_IT = """return query select (jsonb_populate_record(j, jsonb_build_object(
        'epoch', i.lease_epoch, 'wakeups', i.wakeups, 'checkpoint_no', i.checkpoint_no))).*
      from unnest(journals) j join saga.workflow_instances i on i.id = j.id;"""


async def read_in_the_statement_that_locks(pool: Pool) -> None:
    await break_function(pool, "claim", "unused uuid[];", "unused uuid[]; journals saga.claimed[];", schema="saga")
    await break_function(pool, "claim", TAKES, TAKES_AND_READS, schema="saga")
    await break_function(pool, "claim", READS_LATER, READS_WITH_IT, schema="saga")


async def only_wait(pool: Pool) -> None:
    await break_function(pool, "claim", SKIPS, "for no key update", schema="saga")


@pytest.mark.parametrize("rule", ["kept", "waits, and reads later", "waits, and reads at once"])
async def test_h3_a_claim_that_meets_an_open_wake_up_shows_its_mail_or_does_not_know_of_it(
    saga_pool: Pool, rule: str
) -> None:
    """Red where the journal is read in the statement that takes the lease, and that statement waits: it would name a
    wake-up as seen whose mail it has not read.
    """  # noqa: D205 - one thought
    if rule == "waits, and reads later":
        await only_wait(saga_pool)
    elif rule == "waits, and reads at once":
        await read_in_the_statement_that_locks(saga_pool)
    (made,) = starts("k")
    await start(saga_pool, [made])
    owner = uuid4()
    await living(saga_pool, owner)
    async with saga_pool.acquire() as somebody:
        signal = somebody.transaction()
        await signal.start()
        await somebody.execute("select saga.tell($1, 'signal', 'Go', null, '{}')", made.id)
        claiming = asyncio.create_task(claim(saga_pool, owner, 1, [journalled.workflow_id]))
        if rule == "kept":
            assert await claiming == []
        else:
            await waits_for_a_lock(saga_pool)
        await signal.commit()
        (lease,) = await claiming or await claim(saga_pool, owner, 1, [journalled.workflow_id])
    mailbox = lease.claimed.mailbox
    assert (len(mailbox.mail) == mailbox.wakeups) == (rule != "waits, and reads at once")


# ------------------------------------------------------------------------------------------------ H4, H45

COMPARES_NUMBER = "where e = epoch and n = no and"


@RULE
async def test_h4_a_group_that_is_sent_again_has_its_messages_once(saga_pool: Pool, rule: str) -> None:
    """The reply of COMMIT is lost, and the writer sends the same bytes. Red where the number is not compared."""
    if rule == "removed":
        await break_function(saga_pool, "checkpoint", COMPARES_NUMBER, "where e = epoch and", schema="saga")
    _, leases = await begun(saga_pool, *(f"k{n}" for n in range(20)))
    crash_sites.hook = Injector(Fault("saga.journal.checkpoint", "after", "disconnect"))
    try:
        async with writing(saga_pool) as made:
            each = (made.submit(checkpoint(lease.claimed, outbox=(message("m"),))) for lease in leases)
            await asyncio.gather(*each)
    finally:
        crash_sites.hook = None
    assert await saga_pool.fetchval("select count(*) from outbox.events") == (20 if rule == "kept" else 40)


@RULE
async def test_h45_a_writer_does_not_take_its_own_first_copy_for_somebody_elses(saga_pool: Pool, rule: str) -> None:
    """Red where the answer is `broken` whenever the number has moved on."""
    if rule == "removed":
        await break_function(saga_pool, "checkpoint", "when own.n = x.no + 1 then", "when false then", schema="saga")
    _, (lease,) = await begun(saga_pool, "k")
    crash_sites.hook = Injector(Fault("saga.journal.checkpoint", "after", "disconnect"))
    try:
        async with writing(saga_pool) as made:
            answer = await made.submit(checkpoint(lease.claimed, rows=(task(1),)))
    finally:
        crash_sites.hook = None
    assert answer.kind == ("applied" if rule == "kept" else "broken")


# ------------------------------------------------------------------------------------------------ H48

PLAN = "), plan as ("
LOCKS_IN_IT = """), locked as (
        insert into saga.locks (key, instance_id, path, granted_at)
        select t.name, ok.id, t.path, clock_timestamp()
          from unnest($14::uuid[], $16::text[], $17::text[], $18::text[]) as t(instance_id, path, name, kind)
          join ok on ok.id = t.instance_id where t.kind = 'lock'
    ), plan as ("""


@RULE
async def test_h48_a_contended_lock_stalls_no_group(saga_pool: Pool, rule: str) -> None:
    """Red where the rows of locks are inserted by the checkpoint: the whole group waits for their unique key."""
    if rule == "removed":
        await break_function(saga_pool, "checkpoint", PLAN, LOCKS_IN_IT, schema="saga")
    _, leases = await begun(saga_pool, "a", "b", "c")
    a, b, c = (lease.claimed for lease in leases)
    lock = task(1, path="lock#1", name="the printer", kind="lock", output=None)
    group = [checkpoint(b, rows=(lock,)), checkpoint(c, rows=(task(1),))]
    async with saga_pool.acquire() as other:
        slow = other.transaction()
        await slow.start()
        if rule == "kept":
            await other.execute("select saga.acquire($1, $2, 'the printer', 'lock#1')", a.id, a.epoch)
        else:
            await write(other, [checkpoint(a, rows=(lock,))])
        writing_it = asyncio.create_task(write(saga_pool, group))
        if rule == "removed":
            await waits_for_a_lock(saga_pool)
            await slow.rollback()
        written = await writing_it
        assert {one.answer and one.answer.kind for one in written} == {"applied"}
        if rule == "kept":
            await slow.rollback()


# ------------------------------------------------------------------------------------------------ H50


@RULE
async def test_h50_a_refused_value_is_not_left_out(saga_pool: Pool, rule: str) -> None:
    """An error, and nothing of the group is written. Red where what cannot be read is written as null."""
    if rule == "removed":
        without = "case when t.output like '%}' then t.output::json end"
        await break_function(saga_pool, "checkpoint", "t.output::json", without, schema="saga")
    _, leases = await begun(saga_pool, "good", "bad")
    good, bad = (lease.claimed for lease in leases)
    group = [checkpoint(good, rows=(task(1),)), checkpoint(bad, rows=(task(1, output="{"),))]
    (refused,) = await asyncio.gather(write(saga_pool, group), return_exceptions=True)
    assert (isinstance(refused, Exception) and writer.is_refusal(refused)) == (rule == "kept")
    assert (await row(saga_pool, good.id))["checkpoint_no"] == (0 if rule == "kept" else 1)


# ------------------------------------------------------------------------------------------------ what kills workers


@RULE
async def test_an_instance_that_was_lost_twice_runs_alone(
    saga_pool: Pool, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """It may be what kills workers, so it waits for the others to end. Red without `ALONE_CRASH_COUNT`."""
    if rule == "removed":
        monkeypatch.setattr(limits, "ALONE_CRASH_COUNT", 100)
    async with saga_pool.acquire() as connection, transaction(connection) as tx:
        suspect = await packed.start(tx, Order(sku="suspect"))
    await saga_pool.execute("update saga.workflow_instances set ready_at = null, crash_count = 2")
    async with working(saga_pool, shop, packed) as service:
        service.gates["ship"], service.reached["ship"] = asyncio.Event(), asyncio.Event()
        other = await shop.start(saga_pool, Order(sku="other"))
        await asyncio.wait_for(service.reached["ship"].wait(), 20)
        await saga_pool.execute("update saga.workflow_instances set ready_at = now() where id = $1", suspect.id)
        await saga_pool.execute("select saga.call_worker()")

        async def claimed() -> Any:
            return (await row(saga_pool, suspect.id))["lease_epoch"] > 0

        await eventually(claimed, what="the suspect is claimed")
        if rule == "removed":
            await reaches(saga_pool, suspect.id, "completed")
        service.gates["ship"].set()
        assert await other.result(timeout=20) == "A1 paid sent"
        await reaches(saga_pool, suspect.id, "completed")
    order = await effects(saga_pool)
    assert (order.index("ship") < order.index("pack")) == (rule == "kept")
