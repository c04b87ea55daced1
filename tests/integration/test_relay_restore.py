"""A database that was restored, promoted or copied publishes nothing until it is adopted, and then loses nothing."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import asyncpg
import pytest

import outbox
from outbox import Pool, Relay, RestoreDetected
from outbox.embedded import Databases, Postgres
from outbox.relay import restore
from outbox.settings import Settings
from outbox.upkeep import migrate
from tests.support.clusters import ClusterCopy, dump_and_restore
from tests.support.faults import eventually
from tests.support.history import topic_reader
from tests.support.kafka_server import create_topic
from tests.support.mutations import break_function, broken_statement
from tests.support.relay_process import QUICK
from tests.support.writers import Writers, identify

OWN_SERVERS = pytest.mark.crash


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(url, min_size=1, max_size=8) as pool:
        yield pool


@asynccontextmanager
async def relaying(pool: Pool, servers: str) -> AsyncIterator[Relay]:
    async with Relay(pool, servers, settings=Settings(**QUICK)) as relay:
        yield relay


async def refusal(pool: Pool, servers: str) -> str:
    """What the relay says when it refuses."""
    async with asyncio.timeout(20), relaying(pool, servers) as relay:
        with pytest.raises(RestoreDetected) as refused:
            await relay.run()
    return str(refused.value)


@pytest.fixture
def cluster() -> Iterator[Postgres]:
    """A cluster of the test's own, for stopping and copying."""
    with Postgres() as server:
        yield server


async def workload(pool: Pool, servers: str, topic: str, *, partitions: int = 1) -> Writers:
    await migrate.up(pool)
    await create_topic(servers, topic, partitions=partitions)
    writers = Writers(pool, topic, keys=("a", "b", "c"))
    await writers.set_up()
    return writers


async def publish_all(writers: Writers, pool: Pool, servers: str) -> None:
    async with relaying(pool, servers):
        verdict = await writers.judge(servers)
        assert verdict.valid, verdict.explain()


# ------------------------------------------------------------------------------------------------ identity


async def test_h7_database_copied_from_a_template_is_refused_until_adopted(
    postgres: Databases, database: str, broker: str, topic: str
) -> None:
    """Same system identifier, same timeline, another database: refused; after adoption its new events are published.

    Seen red: `same_database` out of the guard's statement.
    """
    async with connected(database) as pool:
        writers = await workload(pool, broker, topic)
        await writers.burst(3)
        await publish_all(writers, pool, broker)
    name = database.rpartition("/")[2]
    admin = await asyncpg.connect(postgres.dsn())
    try:
        await admin.execute(f"create database {name}_copy template {name}")
        async with connected(postgres.dsn(f"{name}_copy")) as copy:
            assert "another database" in await refusal(copy, broker)
            with broken_statement(restore.SQL, "identity", "l.database_oid = i.database_oid", "true"):
                async with relaying(copy, broker):  # red: the guard no longer sees the difference
                    await writers_see(copy, "select lease_owner is not null from outbox.shards")
            copied = Writers(copy, topic, keys=writers.keys)
            await copied.burst(3)
            adoption = await restore.adopt(copy, broker)
            assert (adoption.restamped, adoption.left_out) == (3, 0)
            await publish_all(copied, copy, broker)
    finally:
        await admin.execute(f"drop database if exists {name}_copy with (force)")
        await admin.close()


async def writers_see(pool: Pool, query: str) -> None:
    await eventually(lambda: pool.fetchval(query), what=query)


@pytest.mark.parametrize(
    "change",
    ["update outbox.logs set system_identifier = 7", "update outbox.logs set timeline = '0000002A'"],
    ids=["system", "timeline"],
)
@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_h7_a_log_window_is_refused_where_the_identity_changed_under_a_running_relay(
    log_pool: Pool, broker: str, topic: str, change: str, rule: str
) -> None:
    """The identity is compared again in the transaction that logs a window, so a promotion during a tenure is seen.

    Seen red: the comparison out of `outbox.lock_shard`.
    """
    if rule == "removed":
        here = "(here.system_identifier, here.database_oid, here.timeline)"
        await break_function(log_pool, "lock_shard", here, here.replace("here.", "known."))
    await create_topic(broker, topic)
    writers = Writers(log_pool, topic)
    await writers.set_up()
    async with relaying(log_pool, broker) as relay:
        await writers.burst(1)
        verdict = await writers.judge(broker)
        assert verdict.valid, verdict.explain()
        await log_pool.execute(change)
        await writers.burst(1)
        if rule == "removed":
            verdict = await writers.judge(broker)
            assert verdict.published == 2, "published as if nothing had changed"
            return
        with pytest.raises(RestoreDetected):
            async with asyncio.timeout(20):
                await relay.run()
    assert await log_pool.fetchval("select count(*) from outbox.events") == 2
    assert await log_pool.fetchval("select max(window_no) from outbox.windows") == 1
    await restore.adopt(log_pool, broker)
    await publish_all(writers, log_pool, broker)


# ------------------------------------------------------------------------------------------------ adoption


@pytest.mark.parametrize("rule", ["kept", "removed"])
async def test_adoption_reads_a_writer_that_took_its_transaction_id_before_and_emits_after(
    log_pool: Pool, broker: str, topic: str, rule: str
) -> None:
    """The new log's s1 counts every transaction in progress as not yet seen, the newest ones included.

    Seen red: with `greatest(xmax, own id)` as xmax of s1, ids between the two were taken for visible and their events
    were never read.
    """
    await create_topic(broker, topic)
    writers = Writers(log_pool, topic, keys=("a",))
    await writers.set_up()
    async with log_pool.acquire() as connection, outbox.transaction(connection) as tx:
        await tx.execute("select pg_current_xact_id()")
        if rule == "kept":
            await restore.adopt(log_pool, broker)
        else:
            with broken_statement(
                restore.SQL,
                "restart_shards",
                "pg_snapshot_xmax(n.snapshot),\n",
                "greatest(pg_snapshot_xmax(n.snapshot), pg_current_xact_id()),\n",
            ):
                await restore.adopt(log_pool, broker)
        await writers.change(tx, "a")
    unread = await log_pool.fetchval(
        "select count(*) from outbox.events e, outbox.shards s"
        " where not pg_visible_in_snapshot(e.transaction_id, s.start_snapshot)"
    )
    assert unread == (1 if rule == "kept" else 0)
    if rule == "kept":
        await publish_all(writers, log_pool, broker)


# ------------------------------------------------------------------------------------------------ whole clusters


@OWN_SERVERS
async def test_h34_cold_file_copy_is_refused_because_kafka_is_ahead_of_it(
    cluster: Postgres, broker: str, topic: str
) -> None:
    """A copied data directory keeps system identifier, oid and timeline; only Kafka knows that its windows went on.

    Adoption leaves out, by event id, what the original published after the copy was made.
    Seen red: with the ends of the topics taken for known, as is repeated below, nothing refuses; with what is ahead of
    the *retired* log counted as evidence, the adopted copy was refused for ever.
    """
    url = cluster.create_database("shop")
    async with connected(url) as pool:
        writers = await workload(pool, broker, topic)
        await writers.burst(2)
        await publish_all(writers, pool, broker)
        await writers.burst(1, "a")  # committed before the copy, published by the original only
    cluster.shutdown()
    copied = ClusterCopy(cluster)
    copied.start()
    try:
        cluster.start()
        async with connected(url) as pool:
            writers.pool = pool
            await publish_all(writers, pool, broker)
            for _ in range(3):  # a window each: the embedded broker does not tell where a batch of several ends
                await writers.burst(1, "b")
                await publish_all(writers, pool, broker)
        cluster.shutdown()
        async with connected(copied.dsn("shop")) as pool:
            assert "has never logged" in await refusal(pool, broker)
            async with pool.acquire() as connection:
                _, ends = await restore.look_ahead(connection, broker, {topic: 1}, {})
                await restore.guard(connection, broker, {topic: 1}, ends)
            after_copy = Writers(pool, topic, keys=("c",))
            identity_before = await pool.fetchval("select count(*) from outbox.events")
            await after_copy.burst(2)
            adoption = await restore.adopt(pool, broker)
            assert identity_before == 3
            assert (adoption.left_out, adoption.restamped) == (1, 2)
            await publish_new(pool, broker, topic, after_copy)
    finally:
        copied.stop()


async def publish_new(pool: Pool, servers: str, topic: str, writers: Writers) -> None:
    """Relay until every change is on the topic; records of changes that only the original knows are not ours."""
    async with relaying(pool, servers), topic_reader(servers, topic) as reader:
        await writers.published(reader)
        records = await reader.records(identify)
    known = {row["identity"] for row in await pool.fetch("select identity from changes")}
    mine = [record.identity for record in records if record.identity in known]
    assert len(mine) == len(set(mine)), "an event that Kafka had was published again"


@OWN_SERVERS
async def test_h34_promoted_standby_is_refused_by_the_timeline_of_its_wal(
    cluster: Postgres, broker: str, topic: str
) -> None:
    """A standby is refused as such; promoted, it is refused because its WAL has another timeline, and then adopted.

    Seen red: the timeline read from the control file (`pg_control_checkpoint`), which showed the old one until the next
    checkpoint had ended; that is too short a time to repeat it here reliably.
    """
    url = cluster.create_database("shop")
    async with connected(url) as pool:
        writers = await workload(pool, broker, topic)
        await writers.burst(2)
        await publish_all(writers, pool, broker)
    cluster.shutdown()
    copied = ClusterCopy(cluster, standby=True)
    copied.start()
    try:
        async with connected(copied.dsn("shop")) as pool:
            writers.pool = pool
            with pytest.raises(RestoreDetected, match="standby"):
                await restore.check_identity(pool)
            assert await pool.fetchval("select pg_promote()")
            assert "another timeline" in await refusal(pool, broker)
            await writers.burst(2)
            assert (await restore.adopt(pool, broker)).restamped == 2
            await publish_all(writers, pool, broker)
    finally:
        copied.stop()


RULES_OF_ADOPTION = {
    "all": ((), (3, 4)),
    "restamp": (("restamp", "e.transaction_id <> '3'", "false"), (3, 0)),
    "horizon": (("restamp", "or e.position > c.horizon", ""), (3, 2)),
    "settle_unfinished": (("settle_unfinished", "w.window_no > s.done_through", "false"), (0, 4)),
    "settle_finished": (("settle_finished", "e.transaction_id <> pg_current_xact_id()", "false"), (3, 6)),
}
"""Without which rule how many events are replayed under the old log and read by the new one."""


@OWN_SERVERS
@pytest.mark.parametrize("without", RULES_OF_ADOPTION)
async def test_h35_dump_and_restore_into_a_cluster_whose_transaction_ids_start_lower(
    cluster: Postgres, database: str, broker: str, topic: str, without: str
) -> None:
    """Refused until adopted; then every event that was not published is, once, and none of the others.

    The dump holds events of four kinds: published; in a window that was logged and not done; not yet logged; and,
    written to the restored database before it was adopted, with transaction ids that look older than everything.
    Seen red: each of the four rules of the adoption taken out. Without `settle_finished` the relay published the first
    kind for ever, without `horizon` the last kind was lost.
    """
    url = cluster.create_database("shop")
    async with connected(url) as pool:
        writers = await workload(pool, broker, topic)
        await pool.execute(SPEND_TRANSACTION_IDS)
        await writers.burst(2)
        await publish_all(writers, pool, broker)
        await writers.burst(3)
        await log_without_publishing(pool)
        await writers.burst(2)
        dumped_at = await pool.fetchval("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
    dump_and_restore(url, database)
    async with connected(database) as pool:
        writers.pool = pool
        assert await pool.fetchval("select pg_snapshot_xmax(pg_current_snapshot())::text::bigint") < dumped_at
        await writers.burst(2)
        assert "another cluster" in await refusal(pool, broker)
        rule, outcome = RULES_OF_ADOPTION[without]
        if rule:
            with broken_statement(restore.SQL, *rule):
                await restore.adopt(pool, broker)
            assert await pool.fetchrow(TO_REPLAY_AND_READ) == outcome
            return
        assert (await restore.adopt(pool, broker)).restamped == 4
        assert await pool.fetchrow(TO_REPLAY_AND_READ) == outcome
        await writers.burst(2)
        await publish_all(writers, pool, broker)


TO_REPLAY_AND_READ = """
select (select count(*) from outbox.windows w
         cross join lateral outbox.window_rows(w.shard, w.s1, w.s2, w.after_position, w.through_position)
         where w.window_no > s.done_through),
       (select count(*) from outbox.events e where e.transaction_id >= pg_snapshot_xmax(s.start_snapshot)
                                               or e.transaction_id in (select pg_snapshot_xip(s.start_snapshot)))
  from outbox.shards s
"""


async def log_without_publishing(pool: Pool) -> None:
    """What a relay leaves that is killed between logging a window and publishing it."""
    await pool.execute("update outbox.shards set lease_epoch = lease_epoch + 1")
    await pool.fetchval(
        """select outbox.log_window(0::smallint, s.lease_epoch, s.done_through, '{}', w.window_no + 1, w.s2,
                                    pg_current_snapshot(), 0, null)
             from outbox.shards s, (select * from outbox.windows order by window_no desc limit 1) w"""
    )


SPEND_TRANSACTION_IDS = """
create temp table spent (n integer);
do $$ begin
    for n in 1..20000 loop
        begin insert into spent values (n); exception when others then raise; end;
    end loop;
end $$
"""
