"""Replies into mailboxes, without Kafka: once, in order, under the instance's lock, and never dropped."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from outbox import Pool, crash_sites
from outbox.consumer.apply import Engine, Outcome, Partition
from saga import answering, exchange, limits
from saga.envelope import Command, answer_to_do, answer_to_undo, reply
from saga.replies import ReplyTarget
from saga.state import OutboxRow, step_key
from tests.support.caching import Kafka
from tests.support.participants import now, put
from tests.support.saga_journal import begun, checkpoint, kind, row

TOPIC = "saga.shop.replies"


class Desk:
    """An engine that delivers replies."""

    def __init__(self, pool: Pool, engine: Engine, partition: Partition) -> None:
        self.pool, self.engine, self.partition = pool, engine, partition
        self.kafka = Kafka()

    async def deliver(self, *rows: OutboxRow) -> Outcome:
        return await self.engine.apply(self.partition, [put(self.kafka, one) for one in rows])

    async def mail(self, instance_id: UUID) -> list[tuple[str, str, Any]]:
        rows = await self.pool.fetch(
            "select kind, name, payload::text as payload from saga.signals where instance_id = $1 order by no",
            instance_id,
        )
        return [(one["kind"], one["name"], json.loads(one["payload"])) for one in rows]


@pytest_asyncio.fixture
async def desk(saga_pool: Pool) -> AsyncIterator[Desk]:
    engine = Engine(saga_pool, "saga", "test", [ReplyTarget(TOPIC)])
    await engine.prepare()
    yield Desk(saga_pool, engine, await engine.claim(TOPIC, 0, 0))
    crash_sites.hook = None


def done(instance_id: UUID, path: str = "stock.reserve#1", output: str = '{"shelf": "A1"}') -> OutboxRow:
    return reply(command(instance_id, path), answer_to_do("completed", output, None))


def undone(instance_id: UUID, message_id: str, path: str = "stock.reserve#1") -> OutboxRow:
    asked = replace(command(instance_id, path), kind="undo", round=1, message_id=message_id)
    return reply(asked, answer_to_undo(1))


def command(instance_id: UUID, path: str) -> Command:
    return Command(
        kind="do",
        key=step_key(instance_id, path),
        instance_id=instance_id,
        path=path,
        contract="stock.reserve",
        payload=b"{}",
        reply_to=TOPIC,
        sent=now(),
    )


async def waiting(pool: Pool, *keys: str) -> list[UUID]:
    """Instances that wait for a reply."""
    _, leases = await begun(pool, *keys)
    await pool.execute(
        "update saga.workflow_instances set state = 'waiting', lease_owner = null, wake_at = now() + interval '1 h'"
    )
    return [lease.claimed.id for lease in leases]


async def test_replies_wake_those_who_wait_and_keep_their_order(desk: Desk) -> None:
    first, second = await waiting(desk.pool, "a", "b")
    outcome = await desk.deliver(
        done(second), done(first), undone(second, "m1"), undone(second, "m2"), done(second, "stock.reserve#2")
    )
    assert outcome.applied == 5
    assert [(kind_, name) for kind_, name, _ in await desk.mail(second)] == [
        ("reply", "stock.reserve#1"),
        ("undone", "stock.reserve#1"),
        ("undone", "stock.reserve#1"),
        ("reply", "stock.reserve#2"),
    ]
    for instance, count in ((first, 1), (second, 4)):
        found = await row(desk.pool, instance)
        assert (found["wakeups"], found["wake_at"]) == (count, None)
        assert found["ready_at"] is not None


async def test_payloads_arrive_to_the_letter(desk: Desk) -> None:
    (instance,) = await waiting(desk.pool, "a")
    await desk.deliver(done(instance, output='{"price": 1.10, "b": 1, "a": 12345678901234567890123}'))
    text = await desk.pool.fetchval("select payload::text from saga.signals")
    assert text == '{"outcome": "completed", "output": {"price": 1.10, "b": 1, "a": 12345678901234567890123}}'


async def test_what_comes_again_is_dropped(desk: Desk) -> None:
    (instance,) = await waiting(desk.pool, "a")
    await desk.deliver(done(instance), undone(instance, "m1"))
    outcome = await desk.deliver(done(instance, output="null"), undone(instance, "m1"), done(instance))
    assert (outcome.applied, outcome.dropped) == (0, 3)
    assert len(await desk.mail(instance)) == 2
    assert (await row(desk.pool, instance))["wakeups"] == 2


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled", "paused"])
async def test_late_replies_are_kept_and_wake_nobody(desk: Desk, state: str) -> None:
    (instance,) = await waiting(desk.pool, "a")
    await desk.pool.execute("update saga.workflow_instances set state = $1, wake_at = null", state)
    assert (await desk.deliver(done(instance))).applied == 1
    assert len(await desk.mail(instance)) == 1
    found = await row(desk.pool, instance)
    assert (found["state"], found["ready_at"]) == (state, None)


async def test_a_reply_that_comes_before_the_timeout_is_written_wins(desk: Desk) -> None:
    """The worker decided by absence; the reply's lock and wake-up came first, so nothing of its decision is written."""
    _, (lease,) = await begun(desk.pool, "a")
    timed_out = checkpoint(lease.claimed, strict=True, state="compensating", ending="failed")
    await desk.deliver(done(lease.claimed.id))
    assert await kind(desk.pool, timed_out) == "changed"
    assert (await row(desk.pool, lease.claimed.id))["ending"] is None


async def test_a_reply_that_nobody_can_store_is_kept_aside_and_the_others_go_on(desk: Desk) -> None:
    first, second = await waiting(desk.pool, "a", "b")
    await desk.pool.execute(
        f"""create function refuse() returns trigger language plpgsql as $$ begin
              if new.instance_id = '{first}' then raise exception 'refused'; end if; return new; end $$;
            create trigger refuse before insert on saga.signals for each row execute function refuse()"""
    )
    outcome = await desk.deliver(done(first), done(second))
    assert outcome.applied == 2
    assert len(await desk.mail(second)) == 1
    stray = await desk.pool.fetchrow("select * from saga.stray_replies")
    assert stray is not None
    assert (stray["instance_id"], stray["path"]) == (first, "stock.reserve#1")
    assert "refused" in stray["reason"]
    assert json.loads(stray["payload"]) == {"outcome": "completed", "output": {"shelf": "A1"}}


@pytest.mark.parametrize("output", ['"\\u0000"', '["\\ud800"]', "NaN", '{"price": 1e400}'])
async def test_a_reply_that_the_journal_could_not_hold_is_kept_aside(desk: Desk, output: str) -> None:
    """Red where `envelope` does not look: the mailbox takes it, and each claim of the saga pauses it again."""
    first, second = await waiting(desk.pool, "a", "b")
    outcome = await desk.deliver(done(first, output=output), done(second))
    assert outcome.applied == 2
    assert await desk.mail(first) == []
    assert len(await desk.mail(second)) == 1
    assert await desk.pool.fetchval("select count(*) from saga.stray_replies") == 1


@pytest.mark.parametrize("side", ["before", "after"])
async def test_a_lost_batch_leaves_nothing_and_is_delivered_once(desk: Desk, side: str) -> None:
    (instance,) = await waiting(desk.pool, "a")
    broken = 0

    async def lose(at: str, on: str) -> None:
        nonlocal broken
        if (at, on) == ("saga.replies.deliver", side) and not broken:
            broken += 1
            raise asyncpg.AdminShutdownError("injected")

    crash_sites.hook = lose
    records = [put(desk.kafka, done(instance)), put(desk.kafka, done(uuid4()))]
    with pytest.raises(asyncpg.AdminShutdownError):
        await desk.engine.apply(desk.partition, records)
    assert not await desk.mail(instance)
    await desk.engine.apply(await desk.engine.claim(TOPIC, 0, 0), records)
    assert len(await desk.mail(instance)) == 1
    assert await desk.pool.fetchval("select count(*) from saga.stray_replies") == 1


@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_stray_replies_go_when_they_are_old_or_too_many(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """The oldest first, in steps. Red where nobody forgets them: seen with `removed`."""
    monkeypatch.setattr(limits, "FORGET_ROWS", 4)
    monkeypatch.setattr(limits, "STRAYS_MAX", 10 if rule == "kept" else 1_000)
    monkeypatch.setattr(limits, "STRAYS_KEPT_DAYS", 30 if rule == "kept" else 1_000)
    await desk.pool.execute(
        """insert into saga.stray_replies (topic, reason, headers, came_at)
           select 't', n::text, '{}', now() - make_interval(days => n) from generate_series(36, 25, -1) n"""
    )
    await desk.deliver(*(done(uuid4()) for _ in range(7)))
    assert await exchange.forget(desk.pool) == (9 if rule == "kept" else 0)
    left = await desk.pool.fetch("select reason from saga.stray_replies order by id")
    expected = ["27", "26", "25", *["no such saga in this database"] * 7]
    assert ([row["reason"] for row in left] == expected) == (rule == "kept")


async def test_no_statement_reads_a_whole_table(desk: Desk) -> None:
    """With many commands kept, those of a batch and those to be forgotten are found by their indexes."""
    await desk.pool.execute(
        """insert into saga.commands (participant, key, instance_id, path, contract, forget_at)
           select 'stock', gen_random_uuid(), gen_random_uuid(), 'p', 'c', now() + n * interval '1 s'
             from generate_series(-100, 50000) n"""
    )
    await desk.pool.execute("analyze saga.commands")
    keys = [uuid4() for _ in range(10)]
    texts = ["x"] * 10
    plans = {
        "take": await explain(desk.pool, "take", "stock", keys, keys, texts, texts, [now() + timedelta(1)] * 10, 7, 30),
        "answer": await explain(
            desk.pool, "answer", "stock", keys, ["completed"] * 10, ["1"] * 10, texts, [False] * 10, [0] * 10,
            [], [], [], [], [], [],
        ),
        "forget": await explain(desk.pool, "forget", 100),
    }  # fmt: skip
    for name, plan in plans.items():
        assert "Seq Scan on commands" not in plan, f"{name}:\n{plan}"


async def explain(pool: Pool, name: str, *arguments: object) -> str:
    statement = getattr(answering.SQL, name)
    rows = await pool.fetch(f"explain {statement.text}", *arguments)
    return "\n".join(one[0] for one in rows)
