"""Emitting from Python: what commits, what is refused, and what a receipt says."""

import asyncio
import json
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any, Final

import asyncpg
import pytest
import pytest_asyncio

import outbox
from outbox import EmitError, Event, Key, Pool, RecordTooLarge, Transaction, crash_sites, limits
from outbox.errors import ReceiptUnavailable, TransactionClosed
from outbox.postgres import Record
from outbox.upkeep import migrate
from tests.support.mutations import broken_statement

SQL: Final = sys.modules["outbox.transaction"].SQL


class OrderEvent(Event, topic="orders"):
    order_id: Key[Any]


class Placed(OrderEvent, type="order.placed", schema_version=2):
    data: Any = None


class UndoError(Exception):
    """Rolls a block back."""


@pytest_asyncio.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(database, min_size=1, max_size=3) as pool:
        await migrate.up(pool)
        await pool.execute("create table orders (id text primary key)")
        yield pool


async def place(tx: Transaction, order: str) -> None:
    await tx.execute("insert into orders values ($1)", order)
    tx.emit(Placed(order_id=order))


async def keys(pool: Pool) -> list[str]:
    """Keys of the log; the rows of `orders` are the same."""
    events = [row["key"] for row in await pool.fetch("select key from outbox.events order by position")]
    orders = {row["id"] for row in await pool.fetch("select id from orders")}
    assert set(events) == orders, "an event if and only if its business row"
    return events


async def logged(pool: Pool) -> list[Record]:
    return await pool.fetch("select *, headers::text as header_text from outbox.events order by position")


async def test_an_event_as_it_is_stored(pool: Pool) -> None:
    order = uuid.uuid4()
    async with outbox.transaction(pool) as tx:
        tx.emit(Placed(order_id=order, data=[1]), headers={"traceparent": "00-1-2-01"})
        tx.emit()
    [row] = await logged(pool)
    assert (row["topic"], row["key"], row["event_type"], row["schema_version"]) == (
        "orders",
        str(order),
        "order.placed",
        2,
    )
    assert json.loads(row["header_text"]) == {"traceparent": "00-1-2-01"}
    assert json.loads(row["payload"]) == {"order_id": str(order), "data": [1]}
    assert row["event_id"].version == 7
    assert row["transaction_id"] is not None


REFUSED: Final[dict[str, tuple[list[Any], Any, str]]] = {
    "payload": ([Placed(order_id="a", data={"deep": [float("nan")]})], None, "payload"),
    "key": ([Placed(order_id="")], None, "key"),
    "headers": ([Placed(order_id="a")], {"ob-pos": "forged"}, "headers"),
    "type": ([OrderEvent(order_id="a")], None, "type"),
    "size": ([Placed(order_id="a", data="x" * limits.RECORD_MAX_BYTES)], None, "payload"),
    "second of two": ([Placed(order_id="a"), Placed(order_id=None)], None, "key"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_a_refused_emit_leaves_the_transaction_usable_and_writes_nothing_of_it(pool: Pool, case: str) -> None:
    events, headers, field = REFUSED[case]
    async with outbox.transaction(pool) as tx:
        await place(tx, "before")
        with pytest.raises(EmitError) as error:
            tx.emit(*events, headers=headers)
        assert error.value.field == field
        assert isinstance(error.value, ValueError)
        await place(tx, "after")
    assert await keys(pool) == ["before", "after"]


async def test_too_many_events(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EMIT_MAX_EVENTS", 3)
    async with outbox.transaction(pool) as tx:
        await place(tx, "1")
        with pytest.raises(EmitError) as error:
            tx.emit(*(Placed(order_id=str(n)) for n in range(3)))
        assert error.value.field == "events"
        await place(tx, "2")
        await place(tx, "3")
        with pytest.raises(EmitError):
            tx.emit(Placed(order_id="4"))
    assert await keys(pool) == ["1", "2", "3"]


async def test_the_topics_own_limit_rolls_everything_back(pool: Pool) -> None:
    """Only the database knows it, so the flush says so; seen red without the join on outbox.topics."""
    await pool.execute(
        "insert into outbox.topics (topic, partition_count, max_message_bytes) values ('orders', 1, 700)"
    )

    async def unit() -> None:
        async with outbox.transaction(pool) as tx:
            await place(tx, "small")
            await tx.execute("insert into orders values ('large')")
            tx.emit(Placed(order_id="large", data="x" * 200))

    with pytest.raises(RecordTooLarge, match=r"topic orders needs [0-9]+ bytes, the topic takes 700") as error:
        await unit()
    assert error.value.field == "payload"
    assert await keys(pool) == []
    with broken_statement(SQL, "flush", "t.max_message_bytes)", "null)"):
        await unit()
    assert await keys(pool) == ["small", "large"]


async def test_python_and_sql_measure_alike(pool: Pool) -> None:
    """What `emit` lets through the flush takes: the largest record, headers and key that Python accepts."""
    room = limits.RECORD_MAX_BYTES - limits.RECORD_OVERHEAD_BYTES - len('{"order_id":"é","data":""}é'.encode())
    headers = {"q": '"' * 8_000, "c": "\x01" * 50, "é": "🙂"}
    size = len(json.dumps(headers, ensure_ascii=False).encode())
    async with outbox.transaction(pool) as tx:
        tx.emit(Placed(order_id="é", data="x" * room))
        tx.emit(Placed(order_id="é", data="x" * (room - size)), headers=headers)
        tx.emit(Placed(order_id="🙂" * (limits.KEY_MAX_BYTES // 4)))
        tx.emit(Placed(order_id="h"), headers={"q": "x" * (limits.HEADERS_MAX_BYTES - len('{"q": ""}'))})
    assert len(await logged(pool)) == 4


HOSTILE: Final = [
    "'; drop schema outbox cascade; --",
    '"; rollback; --',
    "$$ $q$ $1 %s {0} :name",
    "\\'; \\x00 \\u0000 \\",
    "\r\nSet-Cookie: a=b\r\n\r\n",
    "\u202egnp.exe\u2066\u200b\ufeff",
    "\x1b[2J\x07\x01\x7f\x9b",
    "🙂👨‍👩‍👧‍👦é" + "e\u0301" + "\U0010ffff\ufffe",
    "{}[]:,null true",
    "savepoint a; rollback to a; commit",
    " leading and trailing ",
    "../../etc/passwd",
]


async def test_hostile_text_is_stored_verbatim(any_database: str) -> None:
    async with asyncpg.create_pool(any_database, min_size=1, max_size=1) as pool:
        await migrate.up(pool)
        megabyte = "".join(HOSTILE) * 1_500
        async with outbox.transaction(pool) as tx:
            for text in HOSTILE:
                tx.emit(Placed(order_id=text, data={text: [text]}), headers={f"h{text}": text})
            tx.emit(Placed(order_id="large", data=megabyte))
        *rows, large = await logged(pool)
        assert [row["key"] for row in rows] == HOSTILE
        for text, row in zip(HOSTILE, rows, strict=True):
            assert json.loads(row["payload"]) == {"order_id": text, "data": {text: [text]}}
            assert json.loads(row["header_text"]) == {f"h{text}": text}
        assert json.loads(large["payload"])["data"] == megabyte
        assert await pool.fetchval("select count(*) from outbox.events where shard = 0") == len(HOSTILE) + 1


class TestClosed:
    async def test_after_the_block(self, pool: Pool) -> None:
        async with outbox.transaction(pool) as tx:
            pass
        with pytest.raises(TransactionClosed):
            tx.emit(Placed(order_id="late"))
        with pytest.raises(TransactionClosed):
            async with outbox.transaction(tx):
                pass

    async def test_after_a_rollback(self, pool: Pool) -> None:
        kept: list[Transaction] = []
        with pytest.raises(UndoError):
            await self.undone(pool, kept)
        with pytest.raises(TransactionClosed):
            kept[0].emit(Placed(order_id="late"))
        assert await keys(pool) == []

    @staticmethod
    async def undone(pool: Pool, kept: list[Transaction]) -> None:
        async with outbox.transaction(pool) as tx:
            kept.append(tx)
            await place(tx, "undone")
            raise UndoError

    async def test_while_the_block_commits(self, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
        """An event that would miss the flush is refused, not lost."""
        late: list[str] = []

        async def hook(site: str, side: str) -> None:
            if (site, side) == ("outbox.transaction.flush", "after"):
                try:
                    tx.emit(Placed(order_id="late"))
                except TransactionClosed:
                    late.append("refused")

        async with outbox.transaction(pool) as tx:
            await place(tx, "1")
            monkeypatch.setattr(crash_sites, "hook", hook)
        assert late == ["refused"]
        assert await keys(pool) == ["1"]

    @pytest.mark.parametrize("ending", ["rollback", "commit", "end", "abort"])
    async def test_a_block_that_ends_its_own_transaction(self, pool: Pool, ending: str) -> None:
        """Its events cannot commit with their rows any more; they are dropped and the block says so."""

        async def unit() -> None:
            async with outbox.transaction(pool) as tx:
                tx.emit(Placed(order_id="phantom"))
                await tx.execute(ending)

        with pytest.raises(TransactionClosed, match="leave COMMIT and ROLLBACK"):
            await unit()
        assert await keys(pool) == []


class TestJoining:
    async def test_the_callers_rollback_drops_all(self, pool: Pool) -> None:
        async def caller(connection: outbox.Connection) -> None:
            async with connection.transaction():
                async with outbox.transaction(connection) as tx:
                    await place(tx, "1")
                assert await connection.fetchval("select count(*) from outbox.events") == 1, (
                    "flushed at the block's end"
                )
                raise UndoError

        async with pool.acquire() as connection:
            with pytest.raises(UndoError):
                await caller(connection)
        assert await keys(pool) == []

    @pytest.mark.parametrize("begin", ["asyncpg", "text"])
    async def test_a_block_that_raised_keeps_nothing_of_a_caller_that_goes_on(self, pool: Pool, begin: str) -> None:
        async def unit(connection: outbox.Connection, order: str, error: Exception | None = None) -> None:
            async with outbox.transaction(connection) as tx:
                await place(tx, order)
                async with outbox.transaction(tx):
                    await place(tx, f"{order} nested")
                if error:
                    raise error

        async def caller(connection: outbox.Connection) -> None:
            await unit(connection, "1")
            with pytest.raises(UndoError):
                await unit(connection, "undone", UndoError())
            await unit(connection, "2")

        async with pool.acquire() as connection:
            if begin == "text":
                await connection.execute("begin")
                await caller(connection)
                await connection.execute("commit")
            else:
                async with connection.transaction():
                    await caller(connection)
        assert await keys(pool) == ["1", "1 nested", "2", "2 nested"]

    async def test_a_connection_without_a_transaction_gets_one(self, pool: Pool) -> None:
        async with pool.acquire() as connection:
            async with outbox.transaction(connection) as tx:
                await place(tx, "1")
            assert not connection.is_in_transaction()
        assert await keys(pool) == ["1"]


async def test_a_commit_that_is_refused_keeps_nothing(pool: Pool) -> None:
    await pool.execute("create table lines (id text references orders deferrable initially deferred)")

    async def unit() -> None:
        async with outbox.transaction(pool) as tx:
            await place(tx, "1")
            await tx.execute("insert into lines values ('nobody')")

    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await unit()
    assert await keys(pool) == []


async def test_a_cancelled_block_keeps_nothing_and_gives_the_pool_back(pool: Pool) -> None:
    reached = asyncio.Event()

    async def unit() -> None:
        async with outbox.transaction(pool) as tx:
            await place(tx, "1")
            reached.set()
            await tx.execute("select pg_sleep(60)")

    task = asyncio.create_task(unit())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.TaskGroup() as group:
        for n in range(6):
            group.create_task(_place(pool, str(n)))
    assert sorted(await keys(pool)) == [str(n) for n in range(6)]


async def _place(pool: Pool, order: str) -> None:
    async with outbox.transaction(pool) as tx:
        await place(tx, order)


class TestReceipts:
    async def test_a_receipt_names_each_keys_last_position(self, pool: Pool) -> None:
        async with outbox.transaction(pool) as tx:
            tx.emit(Placed(order_id="a"), Placed(order_id="b"), Placed(order_id="a"))
            with pytest.raises(ReceiptUnavailable, match="not committed yet"):
                _ = tx.receipt
        rows = {row["key"]: row["position"] for row in await logged(pool)}
        assert {key: tx.receipt.position("orders", key) for key in "ab"} == rows
        assert tx.receipt.position("orders", "c") is None
        assert tx.receipt.log_id == await pool.fetchval("select log_id from outbox.logs where is_current")

    async def test_there_is_none_after_a_rollback_or_without_an_event(self, pool: Pool) -> None:
        kept: list[Transaction] = []
        with pytest.raises(UndoError):
            await TestClosed.undone(pool, kept)
        with pytest.raises(ReceiptUnavailable, match="rolled back"):
            _ = kept[0].receipt
        async with outbox.transaction(pool) as tx:
            pass
        with pytest.raises(ReceiptUnavailable, match="emitted nothing"):
            _ = tx.receipt

    async def test_there_is_none_for_more_keys_than_it_can_name(self, pool: Pool) -> None:
        async with outbox.transaction(pool) as tx:
            tx.emit(*(Placed(order_id=n) for n in range(limits.RECEIPT_MAX_KEYS + 1)))
        with pytest.raises(ReceiptUnavailable, match="at most 100"):
            _ = tx.receipt
        assert len(await logged(pool)) == limits.RECEIPT_MAX_KEYS + 1
