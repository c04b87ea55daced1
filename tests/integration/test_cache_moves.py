"""Events that pass a cache by: it moves to another consumer, or a consumer of the same name does not know it.

What is known to be fresh must not be, until the owner's pages have made up for them.
"""

from uuid import UUID

import pytest
import pytest_asyncio

from outbox import Inbox, Pool
from outbox.consumer.apply import Engine
from outbox.errors import CacheDeclarationError
from tests.support.caching import (
    LOG,
    TABLE,
    TOPIC,
    AgentRenamed,
    consume,
    create_table,
    feed,
    make_cache,
    make_engine,
    numbered,
    rows,
)

AGENT = UUID(int=1)


@pytest_asyncio.fixture
async def pool(log_pool: Pool) -> Pool:
    await create_table(log_pool)
    return log_pool


async def complete(pool: Pool) -> tuple[bool, bool]:
    """Whether the cache's table is taken to have all of the owner's log; whether events passed it by."""
    row = await pool.fetchrow(
        "select complete_log is not null as complete, has_gap from outbox.caches where role = 'live'"
    )
    assert row is not None
    return row["complete"], row["has_gap"]


async def complete_it(pool: Pool) -> None:
    """As a rebuild that has ended does; another one is under way."""
    await pool.execute("update outbox.caches set complete_log = $1, has_gap = false", LOG)
    await pool.execute(
        "insert into outbox.rebuilds (cache, log_id, after_key, pages, worker, lease_until)"
        " select cache, $1, 'k', 3, 'w', now() + interval '1 h' from outbox.caches where role = 'live'"
        " on conflict (cache) do update set after_key = 'k', pages = 3, worker = 'w'",
        LOG,
    )


async def is_begun_again(pool: Pool) -> bool:
    row = await pool.fetchrow("select * from outbox.rebuilds")
    assert row is not None
    return (row["after_key"], row["pages"], row["worker"]) == (None, 0, None)


def renamed(name: str) -> AgentRenamed:
    return AgentRenamed(agent_id=AGENT, agent_name=name)


async def test_a_cache_that_moves_to_a_consumer_that_has_begun_lacks_events(pool: Pool) -> None:
    """Red with the complete log kept in `register`: the row of event 1 would be fresh, and the owner has event 2's."""
    kafka = numbered([renamed("1"), renamed("2")])
    former = await make_engine(pool, make_cache(), name="former")
    await feed(former, await former.claim(TOPIC, 0, 0), kafka.records[:1])
    await complete_it(pool)
    await create_table(pool, "other_cache")
    later = await make_engine(pool, make_cache("other_cache"), name="later")
    await consume(later, kafka)
    await make_engine(pool, make_cache("other_cache"), make_cache(), name="later")
    assert await rows(pool) == {AGENT: ("1", [])}
    found = await pool.fetchrow("select * from outbox.caches where name = $1", TABLE)
    assert found is not None
    assert (found["consumer"], found["complete_log"], found["has_gap"]) == ("later", None, True)
    assert await is_begun_again(pool)


async def test_a_cache_that_moves_to_a_new_consumer_is_complete_when_that_has_its_pages(pool: Pool) -> None:
    await consume(await make_engine(pool, make_cache(), name="former"), numbered([renamed("1")]))
    await complete_it(pool)
    await make_engine(pool, make_cache(), name="later")
    assert await complete(pool) == (False, False)
    assert await is_begun_again(pool)


async def test_two_consumers_do_not_undo_each_others_rows(pool: Pool) -> None:
    """Red with the consumer not asked for in `hold_caches`: the former one, which lags, takes the row back."""
    kafka = numbered([renamed("1"), renamed("2"), renamed("3")])
    former = await make_engine(pool, make_cache(), name="former")
    partition = await former.claim(TOPIC, 0, 0)
    await feed(former, partition, kafka.records[:1])
    await consume(await make_engine(pool, make_cache(), name="later"), kafka)
    with pytest.raises(CacheDeclarationError, match="consumer later feeds"):
        await feed(former, partition, kafka.records[1:2])
    assert await rows(pool) == {AGENT: ("3", [])}
    assert await complete(pool) == (False, False)


@pytest.mark.parametrize("target", ["another cache", "no cache"])
async def test_a_batch_of_a_process_that_does_not_know_the_cache_makes_it_incomplete(pool: Pool, target: str) -> None:
    """While a cache is added to a consumer, or taken out of it, old and new processes share the partitions.

    Red with `outbox.lose_events` not called by `_advance`.
    """
    kafka = numbered([renamed("1"), renamed("2")])
    knows = await make_engine(pool, make_cache())
    await feed(knows, await knows.claim(TOPIC, 0, 0), kafka.records[:1])
    await complete_it(pool)
    await create_table(pool, "other_cache")
    caches = [make_cache("other_cache")] if target == "another cache" else []
    inboxes = [] if caches else [Inbox("effects", topic=TOPIC)]
    ignorant = Engine(pool, "workflow", "test", [*caches, *inboxes])
    await ignorant.prepare()
    await feed(ignorant, await ignorant.claim(TOPIC, 0, 0), kafka.records[1:])
    found = await pool.fetchrow("select * from outbox.caches where name = $1", TABLE)
    assert found is not None
    assert (found["complete_log"], found["has_gap"]) == (None, True)
    assert await is_begun_again(pool)


async def test_a_partition_whose_first_records_are_gone_makes_caches_incomplete(pool: Pool) -> None:
    """The topic has grown, and Kafka has deleted what came first. Red with only the gap noted by `claim`."""
    engine = await make_engine(pool, make_cache())
    await engine.claim(TOPIC, 0, 0)
    await complete_it(pool)
    await engine.claim(TOPIC, 1, 0)
    assert await complete(pool) == (True, False)
    await engine.claim(TOPIC, 2, 300)
    assert await complete(pool) == (False, True)
    assert await is_begun_again(pool)


async def test_a_table_that_took_the_name_of_another_one_is_fed(pool: Pool) -> None:
    """The service renamed the old table and made a new one. Red with `forget_renamed` left out: a unique violation."""
    await consume(await make_engine(pool, make_cache()), numbered([renamed("1")]))
    await complete_it(pool)
    await pool.execute(f"alter table {TABLE} rename to kept_for_a_while")
    await create_table(pool)
    await make_engine(pool, make_cache())
    assert await complete(pool) == (False, True)
    assert await pool.fetchval("select count(*) from outbox.caches") == 1
