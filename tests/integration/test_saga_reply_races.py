"""Replies racing the time-outs of their steps, many times, with two workers; judged by what the participant did."""

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import asyncpg
import pytest
import pytest_asyncio

from outbox import Pool, crash_sites
from outbox.embedded import Databases
from outbox.upkeep import migrate
from saga import Failed, Handle, Run, Saga, calls, ledger, saga
from saga.exchange import Exchange
from tests.support.courier import Courier
from tests.support.mutations import break_function
from tests.support.participants import ReserveStock, Stock, create_stock
from tests.support.saga_worker import HOUR, working

SAGAS: Final = 40
TIMEOUT_SECONDS: Final = 0.6
MOMENTS: Final = ("at once", "just before", "at the timer", "at the claim", "at the write", "behind the undo")
"""When a reply is let go; those in the middle are the race."""
RACING: Final = MOMENTS[1:5]
TIMER, CLAIM, WRITE = "saga.journal.let_timers_go_off", "saga.journal.claim", "saga.journal.checkpoint"
DUE: Final = f"""
select id from saga.workflow_instances
 where id = any ($1::uuid[]) and started_at + interval '{TIMEOUT_SECONDS} s' <= clock_timestamp()
   and (lease_owner is not null or not $2)"""


@pytest_asyncio.fixture
async def stock_pool(postgres: Databases) -> AsyncIterator[Pool]:
    """The participant's database."""
    name = f"stock_{uuid.uuid4().hex[:12]}"
    async with asyncpg.create_pool(postgres.create_database(name), min_size=1, max_size=5) as pool:
        await migrate.up(pool)
        await migrate.up(pool, package="saga")
        await create_stock(pool)
        await pool.execute("insert into stock select n::text, 1 from generate_series(0, $1) n", SAGAS)
        yield pool
    postgres.drop_database(name)


def shop_of(stock: Stock) -> Saga[ReserveStock, str]:
    """A saga of one remote step."""

    @saga("hasty", deadline=HOUR)
    async def hasty(run: Run, order: ReserveStock) -> str:
        return (await run(stock.reserve(order))).shelf

    return hasty


class Moments:
    """Lets each reply go at its saga's moment."""

    def __init__(self, pool: Pool, courier: Courier, chance: random.Random) -> None:
        self._pool, self._courier, self._chance = pool, courier, chance
        self.of: dict[UUID, str] = {}
        courier.on_reply = self._came

    def _came(self, instance: UUID) -> None:
        self.of[instance] = MOMENTS[len(self.of) % len(MOMENTS)]
        if self.of[instance] == "at once":
            self._courier.let_go(instance)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """From both workers' statements it is known when a time-out is about to be seen."""

        async def hook(site: str, side: str) -> None:
            if (site, side) == (TIMER, "before"):
                await asyncio.gather(*[self._courier.let_go(one) for one in await self._due("just before")])
                for one in await self._due("at the timer"):
                    self._courier.let_go(one)
                for _ in range(self._chance.randrange(5)):  # some round trips of a head start
                    await self._pool.fetchval("select 1")
            elif (site, side) == (CLAIM, "after"):
                for one in await self._due("at the claim", leased=True):
                    self._courier.let_go(one)
            elif (site, side) == (WRITE, "before"):
                for one in await self._due("at the write", leased=True):
                    self._courier.let_go(one)

        crash_sites.hook = hook
        try:
            yield
        finally:
            crash_sites.hook = None

    async def _due(self, moment: str, *, leased: bool = False) -> list[UUID]:
        held = [one for one in self._courier.held if self.of[one] == moment]
        due = [row["id"] for row in await self._pool.fetch(DUE, held, leased)] if held else []
        return [one for one in due if one in self._courier.held]  # the other worker looks as well


async def end_of(handle: Handle[str]) -> str:
    try:
        assert await handle.result(timeout=30) == "A1"
    except Failed:
        return "failed"
    return "completed"


async def violations(shop: Pool, stock: Pool, ends: dict[UUID, str]) -> list[str]:
    """What is not as it must be, in the databases of both."""
    found = []
    for sku, (instance, end) in enumerate(ends.items()):
        row = await shop.fetchrow(
            """select i.state, i.error_message as error,
                      (select array_agg(outcome) from saga.tasks where instance_id = i.id and seq > 0) as outcomes,
                      (select array_agg(s.kind order by s.no) from saga.signals s where s.instance_id = i.id) as mail,
                      (select array_agg(c.status) from saga.saga_compensations c where c.instance_id = i.id) as undone
                 from saga.workflow_instances i where i.id = $1""",
            instance,
        )
        assert row is not None
        seen = {**row, "mail": list(dict.fromkeys(row["mail"] or ()))}  # a slow undo may be sent, and answered, again
        rows = await stock.fetch("select change from moves where sku = $1 order by id", f"{sku}")
        moves = [one["change"] for one in rows]
        if end == "completed":
            right: dict[str, Any] = {"outcomes": ["completed"], "mail": ["reply"], "undone": None, "error": None}
        else:
            right = {"outcomes": ["unknown"], "mail": ["reply", "undone"], "undone": ["completed"]}
            right["error"] = "stock.reserve#1 is unknown: no reply in time"
        if moves != ([-1] if end == "completed" else [-1, 1]):
            found.append(f"effect: {sku} has {end}, and the stock moved {moves}")
        found += [f"{what}: {sku} has {end}, {seen[what]}" for what, it in right.items() if seen[what] != it]
        if row["state"] != end:
            found.append(f"state: {sku} has {end}, {row['state']}")
    if await shop.fetchval("select count(*) from saga.stray_replies"):
        found.append("stray: a reply fits nothing")
    return found


def timeouts_are_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a command without a reply for one that has not happened."""
    real = ledger.Ended

    def ended(**given: Any) -> Any:
        return real(**(given | {"outcome": "rejected"} if given.get("error") == "no reply in time" else given))

    monkeypatch.setattr(calls, "Ended", ended)


@pytest.mark.parametrize(
    ("seed", "without"), [(0, None), (1, None), (2, None), (3, "late replies"), (4, "unknown time-outs")]
)
async def test_a_reply_that_races_its_time_out(
    saga_pool: Pool, database: str, stock_pool: Pool, monkeypatch: pytest.MonkeyPatch, seed: int, without: str | None
) -> None:
    """One outcome, the effect kept or undone, and the late reply in the mailbox.

    Red where late replies are thrown away, and where a time-out is taken for a refusal.
    """
    monkeypatch.setattr(Exchange, "_reply_topics", lambda _: [])  # the courier delivers
    if without == "late replies":
        late = "p_kind = 'reply' and i.state = 'compensating' or "
        await break_function(saga_pool, "tell", "if p_kind", f"if {late}p_kind", schema="saga")
    elif without == "unknown time-outs":
        timeouts_are_refusals(monkeypatch)
    stock = Stock(timeout=TIMEOUT_SECONDS)
    hasty = shop_of(stock)
    async with (
        asyncpg.create_pool(database, min_size=1, max_size=8) as mail_pool,
        Courier.running(mail_pool, stock_pool, stock, hasty.reply_topic) as courier,
    ):
        moments = Moments(mail_pool, courier, random.Random(seed))
        async with working(saga_pool, hasty), working(saga_pool, hasty):
            with moments.watching():
                handles = [await hasty.start(saga_pool, ReserveStock(sku=f"{n}")) for n in range(SAGAS)]
                ended = await asyncio.gather(*map(end_of, handles))
        await courier.delivered()
    ends = {handle.id: end for handle, end in zip(handles, ended, strict=True)}
    raced = Counter((moments.of[one], end) for one, end in ends.items())
    found = await violations(saga_pool, stock_pool, ends)
    if without is not None:
        kinds = {"mail"} if without == "late replies" else {"effect", "outcomes", "mail", "undone", "error"}
        assert {one.split(":")[0] for one in found} == kinds
        return
    assert found == []
    assert {end for moment, end in raced if moment in RACING} == {"completed", "failed"}, raced
    assert {end for moment, end in raced if moment == "behind the undo"} == {"failed"}
