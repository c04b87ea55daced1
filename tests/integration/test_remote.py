"""Remote steps over a broker: two services, two databases, two outboxes."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import asyncpg
import pytest
import pytest_asyncio

from outbox import Pool
from outbox.embedded import Databases
from outbox.upkeep import migrate
from saga import limits
from saga.exchange import Exchange
from saga.state import step_key
from tests.support.faults import eventually
from tests.support.kafka_server import RealKafka, create_topic
from tests.support.participants import ReserveStock, create_stock
from tests.support.producing import produce_raw
from tests.support.remote_services import Services, some_stock


@pytest_asyncio.fixture
async def stock_pool(postgres: Databases) -> AsyncIterator[Pool]:
    """The participant's database."""
    name = f"stock_{uuid.uuid4().hex[:12]}"
    async with asyncpg.create_pool(postgres.create_database(name), min_size=1, max_size=20) as pool:
        await migrate.up(pool)
        await migrate.up(pool, package="saga")
        await create_stock(pool)
        yield pool
    postgres.drop_database(name)


@pytest_asyncio.fixture
async def services(saga_pool: Pool, stock_pool: Pool, broker: str) -> Services:
    made = Services(saga_pool, stock_pool, broker, some_stock())
    await made.create_topics()
    return made


async def test_reply_n_and_command_n_plus_1_share_one_checkpoint(services: Services) -> None:
    """The first command goes out with the start; one checkpoint lets go of the instance, each reply costs one."""
    async with services.running():
        handle = await services.shop.start(services.shop_pool, ReserveStock(), key="a")
        assert await handle.result(timeout=30) == ["A1", "A1"]
    assert await services.net() == 2
    assert await services.shop_pool.fetchval("select checkpoint_no from saga.workflow_instances") == 1 + 2
    together = """select count(*) from saga.tasks t join outbox.events e on e.xmin::text = t.xmin::text
                   where t.step_type = 'remote' and e.headers ->> 'saga-command' = 'do'"""
    assert await services.shop_pool.fetchval(together) == 1
    assert await services.shop_pool.fetchval("select count(*) from outbox.events") == 2
    assert await services.stock_pool.fetchval("select count(*) from saga.commands where outcome = 'completed'") == 2


async def test_a_rejected_command_undoes_what_was_done_before(services: Services) -> None:
    async with services.running():
        await services.shop.start(services.shop_pool, ReserveStock(fails="rejects"), key="a")
        assert await services.ends("a") == "failed"
    error = await services.shop_pool.fetchval("select error_message from saga.workflow_instances")
    assert error == "no second one: out of stock"
    assert await services.net() == 0
    assert services.stock.calls[-1] == "undo A1"
    assert [kind for kind, _ in await services.mail("a")] == ["reply", "reply", "undone"]


async def test_a_poison_command_is_answered_and_undone(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COMMAND_ATTEMPTS", 2)
    async with services.running():
        await services.shop.start(services.shop_pool, ReserveStock(fails="breaks"), key="a")
        handle = await services.shop.start(services.shop_pool, ReserveStock(), key="b")
        assert await handle.result(timeout=30) == ["A1", "A1"]
        assert await services.ends("a") == "failed"
    assert await services.net() == 2
    mail = await services.mail("a")
    assert [payload.get("outcome") for _, payload in mail] == ["completed", "unknown", None, None]


async def test_an_undo_that_failed_is_sent_again(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red where the mailbox is not told what each error answers: see `Compensating._told_by_mail`."""
    monkeypatch.setattr(limits, "COMMAND_ATTEMPTS", 1)
    services.stock.undo_fails = 2
    async with services.running():
        await services.shop.start(services.shop_pool, ReserveStock(fails="rejects"), key="a")
        assert await services.ends("a") == "failed"
    assert await services.net() == 0
    assert services.stock.calls[-3:] == ["undo A1"] * 3
    assert [payload.get("error") is None for kind, payload in await services.mail("a") if kind == "undone"] == [
        False,
        False,
        True,
    ]


async def test_a_reply_that_comes_too_late_is_recorded_and_changes_nothing(
    saga_pool: Pool, stock_pool: Pool, broker: str
) -> None:
    """The step times out, its undo follows it; the participant wakes up and answers both."""
    services = Services(saga_pool, stock_pool, broker, some_stock(timeout=0.5))
    await services.create_topics()
    async with services.running(stock=False):
        await services.shop.start(services.shop_pool, ReserveStock(), key="a")

        async def undo_sent() -> bool:
            query = "select exists (select from outbox.events where headers ->> 'saga-command' = 'undo')"
            return bool(await services.shop_pool.fetchval(query))

        await eventually(undo_sent, what="the step has timed out and is undone")
        async with services.serving():
            assert await services.ends("a") == "failed"
    mail = await services.mail("a")
    assert mail[0] == ("reply", {"outcome": "completed", "output": {"shelf": "A1"}})
    assert {kind for kind, _ in mail[1:]} == {"undone"}
    assert await services.shop_pool.fetchval("select outcome from saga.tasks where seq = 1") == "unknown"
    assert services.stock.calls == ["do", "undo A1"]
    assert await services.net() == 0


async def test_commands_that_are_published_twice_have_one_effect_and_one_reply_counts(services: Services) -> None:
    """As another message of the log, as after an adoption. Red without the mailbox's unique index."""
    async with services.running():
        handle = await services.shop.start(services.shop_pool, ReserveStock(), key="a")
        await handle.result(timeout=30)
        again = """insert into outbox.events (shard, topic, key, event_id, event_type, schema_version, headers, payload)
                   select shard, topic, key, gen_random_uuid(), event_type, schema_version, headers, payload
                     from outbox.events"""
        await services.shop_pool.execute(again)

        async def answered() -> bool:
            count = await services.stock_pool.fetchval(
                "select count(*) from outbox.events where headers ? 'saga-reply'"
            )
            offset = await services.shop_pool.fetchval("select max(next_offset) from outbox.positions")
            return bool(count == 4 and offset >= 4)

        await eventually(answered, what="every command is answered again")
    assert services.stock.calls == ["do", "do"]
    assert len(await services.mail("a")) == 2
    assert await services.net() == 2


async def test_replies_that_fit_nothing_are_kept(services: Services) -> None:
    """Of an instance that is not there, with another step's key, unreadable: the saga's own go on behind them."""
    known, unknown = uuid4(), uuid4()

    def headers(instance: UUID, key: UUID) -> list[tuple[str, bytes | None]]:
        plain = {"saga-reply": "do", "saga-id": str(instance), "saga-path": "p#1", "saga-key": str(key)}
        return [(name, text.encode()) for name, text in plain.items()]

    ok = json.dumps({"outcome": "completed", "output": 1}).encode()
    records: list[tuple[bytes, bytes, list[tuple[str, bytes | None]]]] = [
        (b"k", ok, headers(unknown, step_key(unknown, "p#1"))),
        (b"k", ok, headers(known, unknown)),
        (b"k", b"{", headers(unknown, step_key(unknown, "p#1"))),
        (b"k", b'{"outcome": "perhaps"}', headers(unknown, step_key(unknown, "p#1"))),
        (b"k", b"\xff", [("saga-reply", b"do"), ("saga-id", b"\xff\x00")]),
        (b"k", b"no reply at all", []),
    ]
    await produce_raw(services.broker, services.shop.reply_topic, records)
    async with services.running():
        handle = await services.shop.start(services.shop_pool, ReserveStock(), key="a")
        assert await handle.result(timeout=30) == ["A1", "A1"]
    rows = await services.shop_pool.fetch("select reason, instance_id from saga.stray_replies order by id")
    assert len(rows) == 5
    assert sum(row["instance_id"] == unknown for row in rows) == 1
    assert sum("no such saga" in row["reason"] for row in rows) == 1


async def test_many_sagas_on_apache_kafka(saga_pool: Pool, stock_pool: Pool, real_kafka: RealKafka) -> None:
    services = Services(saga_pool, stock_pool, real_kafka.bootstrap_servers, some_stock())
    await services.create_topics(partitions=3)
    with contextlib.suppress(AssertionError):  # it exists
        await create_topic(services.broker, "stock-moves")
    async with services.running():
        keys = {f"{number}": "rejects" if number % 5 == 4 else "" for number in range(30)}
        for key, fails in keys.items():
            await services.shop.start(saga_pool, ReserveStock(fails=fails), key=key)
        for key, fails in keys.items():
            assert await services.ends(key) == ("failed" if fails else "completed")
    assert await services.net() == 2 * 24
    assert await services.stock_pool.fetchval("select count(*) from outbox.parked_events") == 0


async def test_a_saga_that_turns_out_to_send_commands_has_its_replies_read(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its contract is an attribute, which its code does not name by itself. Red without the look for changes."""
    looking = asyncio.Event()
    until_others = Exchange._until_others

    async def look(self: Exchange, topics: list[str]) -> None:
        if not topics:
            looking.set()
        await until_others(self, topics)

    monkeypatch.setattr(Exchange, "_until_others", look)
    assert not services.shop.has_remotes
    async with services.running():
        await looking.wait()
        handle = await services.shop.start(services.shop_pool, ReserveStock(), key="a")
        assert services.shop.has_remotes
        assert await handle.result(timeout=30) == ["A1", "A1"]
