"""`outbox.testing.converges`: good caches pass, and what is wrong with a bad one is told by the smallest plan."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any, LiteralString
from uuid import UUID

import pytest
import pytest_asyncio

from outbox import Cache, Event, Patch, Pool, crash_sites, limits
from outbox.cache import merge
from outbox.consumer import apply
from outbox.postgres import Statements
from outbox.testing import converges
from outbox.testing.run import REMEDY
from tests.support.caching import (
    TABLE,
    TOPIC,
    AgentDeleted,
    AgentIgnored,
    AgentNamePatched,
    AgentRenamed,
    AgentTagged,
    CachedAgent,
    consume,
    create_table,
    make_cache,
    make_engine,
    numbered,
)
from tests.support.mutations import broken_statement

ADA, BOB, CY = (UUID(int=number) for number in (1, 2, 3))
EVENTS: list[Event] = [
    AgentRenamed(agent_id=ADA, agent_name="Ada"),
    AgentTagged(agent_id=ADA, tags=["admin"]),
    AgentRenamed(agent_id=BOB, agent_name="Bob", tags=["new"]),
    AgentNamePatched(agent_id=ADA, agent_name="Ada L."),
    AgentIgnored(agent_id=BOB),
    AgentDeleted(agent_id=BOB),
    AgentRenamed(agent_id=BOB, agent_name="Bob again"),
    AgentDeleted(agent_id=ADA),
]


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> AsyncIterator[Pool]:
    await create_table(log_pool)
    yield log_pool


@pytest.mark.parametrize("owner", [False, True])
async def test_a_good_cache_converges(pool: Pool, *, owner: bool) -> None:
    await converges(pool, make_cache(), EVENTS, owner=owner)


async def test_with_rows_that_the_owner_has_already(pool: Pool) -> None:
    existing = [CachedAgent(agent_id=BOB, agent_name="Bob of old"), CachedAgent(agent_id=UUID(int=3), agent_name="Cy")]
    events: list[Event] = [AgentTagged(agent_id=BOB, tags=["x"]), *EVENTS]
    await converges(pool, make_cache(), events, existing=existing)


async def story_of(pool: Pool, cache: Cache[Any], events: list[Event], **options: Any) -> str:
    with pytest.raises(AssertionError) as raised:
        await converges(pool, cache, events, **options)
    return str(raised.value)


def cache_of_renamed(handler: Any) -> Cache[CachedAgent]:
    cache = Cache(CachedAgent, table=TABLE, key="agent_id", topic=TOPIC)
    cache.on(handler)
    return cache


async def test_a_handler_that_counts_its_calls(pool: Pool) -> None:
    calls = 0

    def counting(event: AgentRenamed) -> CachedAgent:
        nonlocal calls
        calls += 1
        return CachedAgent(agent_id=event.agent_id, agent_name=f"{event.agent_name}, call {calls}")

    story = await story_of(pool, cache_of_renamed(counting), EVENTS)
    assert re.search(r"handler of agent.renamed is no function of its event.*first .*call 4.*then .*call 5", story)


async def test_a_handler_that_depends_on_the_order_of_other_keys(pool: Pool) -> None:
    """Each event alone gives the same row twice; and it converges as long as the keys take turns as they do here."""
    now = before = CY

    def looking_back(event: AgentRenamed) -> CachedAgent:
        nonlocal now, before
        if event.agent_id != now:
            now, before = event.agent_id, now
        return CachedAgent(agent_id=event.agent_id, agent_name=event.agent_name, tags=[f"after {before.int}"])

    events: list[Event] = [
        AgentRenamed(agent_id=agent, agent_name=name) for agent, name in ((ADA, "Ada"), (BOB, "Bob"), (CY, "Cy"))
    ]
    story = await story_of(pool, cache_of_renamed(looking_back), events)
    assert re.search(
        r"expected: agent_id=.*tags=\['after [123]'\]\n  found:    agent_id=.*tags=\['after [123]'\]", story
    )


async def test_a_cache_of_patches_needs_an_owner(pool: Pool) -> None:
    def patching(event: AgentRenamed) -> Patch:
        return Patch(event.agent_id, agent_name=event.agent_name)

    story = await story_of(pool, cache_of_renamed(patching), EVENTS[2:4])
    assert story == "\n".join(
        [
            f"cache {TABLE} does not converge",
            "",
            "the events, in the order that they were published in:",
            f"  1  agent.renamed of {BOB}: agent_name='Bob', tags=['new']",
            f"  2  agent.name_patched of {ADA}: agent_name='Ada L.'",
            "what happened:",
            "  - events 1 to 2 in one batch",
            "",
            f"key {BOB} was parked",
            "  RowMissing: a patch came, but the cache has no row to change; a full row of the key resolves it",
            REMEDY[1:],
        ]
    )
    existing = [CachedAgent(agent_id=key, agent_name="of old") for key in (ADA, BOB)]
    await converges(pool, cache_of_renamed(patching), EVENTS, existing=existing, examples=30)


async def test_the_smallest_plan_is_told(pool: Pool) -> None:
    """Of a merge that does not ask whether a page sees an event."""
    unguarded = "or outbox.page_sees(n.log_id, n.snapshot, x.outbox_log, x.outbox_transaction_id) is not true"
    with (
        broken_statement(merge.SQL, "merge_rows", unguarded, "or true"),
        broken_statement(merge.SQL, "merge_rows", "c.outbox_page is null", "true"),
    ):
        story = await story_of(pool, make_cache(), EVENTS, owner=True)
    assert story == "\n".join(
        [
            f"cache {TABLE} does not converge",
            "",
            "the events, in the order that they were published in:",
            f"  1  agent.renamed of {ADA}: agent_name='Ada', tags=[]",
            f"  2  agent.tagged of {ADA}: tags=['admin']",
            "what happened:",
            "  - the owner's rows of all keys, read after event 2, merged",
            "  - event 1 in one batch",
            "",
            f"row {ADA}",
            f"  expected: agent_id={ADA}, agent_name='Ada', tags=['admin']",
            f"  found:    agent_id={ADA}, agent_name='Ada', tags=[]",
        ]
    )


@pytest.mark.parametrize(
    ("statements", "name", "rule", "without", "words"),
    [
        pytest.param(
            apply.SQL,
            "advance",
            "and p.epoch = $4 and p.next_offset = $5",
            "and (p.epoch = $4 or p.next_offset = $5)",
            "had claimed the partition",
            id="epoch",
        ),
        pytest.param(
            apply.SQL,
            "applied",
            "a.consumer = $1 and a.topic = $2 and a.partition = $3",
            "a.consumer = $1 and a.topic = $2 and a.partition = $3 and false",
            "published once more",
            id="marks",
        ),
    ],
)
async def test_an_engine_without_a_rule_is_found(
    pool: Pool, statements: Statements, name: str, rule: LiteralString, without: LiteralString, words: str
) -> None:
    with broken_statement(statements, name, rule, without):
        assert words in await story_of(pool, make_cache(), EVENTS)


async def test_a_handler_that_raises(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="a bug in the handler"):
        await converges(pool, make_cache(), [AgentRenamed(agent_id=ADA, agent_name="explode")])


async def test_a_row_that_the_table_refuses(pool: Pool) -> None:
    story = await story_of(pool, make_cache(), [AgentRenamed(agent_id=ADA, agent_name="forbidden")])
    assert f"key {ADA} was parked\n  CheckViolationError: " in story


async def test_nothing_is_left_and_the_table_stays_as_it_was(pool: Pool) -> None:
    cache = make_cache()
    await consume(
        await make_engine(pool, cache), numbered([*EVENTS[:4], AgentNamePatched(agent_id=CY, agent_name="x")])
    )
    before = await everything(pool)
    await asyncio.gather(*(converges(pool, cache, EVENTS, owner=True, examples=10, seed=seed) for seed in range(3)))
    await story_of(pool, cache, [AgentRenamed(agent_id=ADA, agent_name="forbidden")])
    await cancel_at_its_first_batch(pool, cache)
    assert await everything(pool) == before
    assert crash_sites.hook is None


async def cancel_at_its_first_batch(pool: Pool, cache: Cache[Any]) -> None:
    begun = asyncio.Event()

    async def tell(site: str, _side: str) -> None:
        if site == "outbox.consumer.apply.advance":
            begun.set()

    crash_sites.hook = tell
    running = asyncio.create_task(converges(pool, cache, EVENTS))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert crash_sites.hook is tell, "a hook that was there before"
    crash_sites.hook = None


async def everything(pool: Pool) -> dict[str, list[Any]]:
    tables = await pool.fetch(
        "select format('%I.%I', schemaname, tablename) as name from pg_tables"
        " where schemaname in ('outbox', 'public') order by 1"
    )
    return {
        row["name"]: [tuple(r) for r in await pool.fetch(f"select * from {row['name']} r order by r::text")]
        for row in tables
    }


@pytest.mark.parametrize("count", [0, limits.TESTING_MAX_EVENTS + 1])
async def test_how_many_events(pool: Pool, count: int) -> None:
    with pytest.raises(ValueError, match="take a few"):
        await converges(pool, make_cache(), [AgentDeleted(agent_id=ADA)] * count)
