"""Owners: what a page is, when it is refused, and the way over HTTP."""

import asyncio
import base64
import gzip
import logging
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from outbox import (
    HttpOwner,
    OwnerError,
    OwnerPage,
    OwnerPageInvalid,
    OwnerRequestInvalid,
    OwnerUnavailable,
    Pool,
    SqlOwner,
    limits,
    transaction,
)
from outbox.cache.owner import ComparableOwner
from outbox.embedded import Postgres
from outbox.errors import NotMigrated
from outbox.postgres import open_pool
from outbox.upkeep import migrate
from tests.support.clusters import ClusterCopy

QUERY = "select id as agent_id, name as agent_name, tags from agents"


@pytest_asyncio.fixture
async def agents(log_pool: Pool) -> Pool:
    await log_pool.execute("create table agents (id uuid primary key, name text not null, tags text[] not null)")
    await log_pool.execute(
        "insert into agents select md5(n::text)::uuid, 'agent ' || n, array[n::text] from generate_series(1, 25) n"
    )
    return log_pool


async def whole(owner: SqlOwner | HttpOwner, limit: int) -> list[OwnerPage]:
    pages = [await owner.page(None, limit)]
    while not pages[-1].last:
        pages.append(await owner.page(pages[-1].rows[-1]["agent_id"], limit))
    return pages


def ids(pages: list[OwnerPage]) -> list[str]:
    return [row["agent_id"] for page in pages for row in page.rows]


# ------------------------------------------------------------------------------------------------------------ pages


@pytest.mark.parametrize("limit", [1, 5, 7, 25, 26])
async def test_pages_hold_every_row_once_in_the_order_of_keys(agents: Pool, limit: int) -> None:
    pages = await whole(SqlOwner(agents, QUERY), limit)
    expected = [str(row["id"]) for row in await agents.fetch("select id from agents order by id")]
    assert ids(pages) == expected
    assert [len(page.rows) for page in pages] == [len(expected[n : n + limit]) for n in range(0, 25, limit)]
    assert all(page.log == pages[0].log for page in pages)
    assert pages[0].rows[0].keys() == {"agent_id", "agent_name", "tags"}


async def test_one_row_some_rows_none(agents: Pool) -> None:
    owner = SqlOwner(agents, QUERY)
    key = await agents.fetchval("select id from agents limit 1")
    for form in (key, str(key)):
        page = await owner.get(form)
        assert [row["agent_id"] for row in page.rows] == [str(key)]
        assert page.last
    assert (await owner.get(uuid4())).rows == []
    assert len((await owner.get_many([key, uuid4()])).rows) == 1
    assert isinstance(owner, ComparableOwner)


async def test_text_keys_are_in_byte_order_whatever_the_collation_says(database15: str) -> None:
    """Red with `collate "C"` removed from `compose`: the ICU collation puts a before B."""
    names = ["B", "a", "Z", "ä", "_", "aa", "A", "z", "é", "0"]
    found: list[str] = []
    async with open_pool(database15, max_size=1, application="test") as pool:
        await migrate.up(pool)
        await pool.execute('create table things (name text collate "und-x-icu" primary key)')
        await pool.executemany("insert into things values ($1)", [(name,) for name in names])
        owner = SqlOwner(pool, "select name from things; ")
        page = await owner.page(None, 3)
        while True:
            found += [row["name"] for row in page.rows]
            if page.last:
                break
            page = await owner.page(found[-1], 3)
    assert found == sorted(names, key=str.encode)


async def test_values_do_not_depend_on_the_session(agents: Pool) -> None:
    """Red with the session's settings removed."""
    query = (
        "select 7 as id, timestamptz '2024-02-29 12:00:00.5+00' as at, interval '-1 day 02:03:04' as span,"
        " '\\x00ff'::bytea as raw, 0.1::float8 + 0.2::float8 as ratio,"
        " 12345678901234567890.1234567890::numeric as amount,"
        " array[1.10, null]::numeric[] as amounts, 'NaN'::float8 as odd, '{\"a\": 1}'::jsonb as doc"
    )
    async with agents.acquire() as connection:
        await connection.execute(
            "set timezone to 'Asia/Kathmandu'; set datestyle to 'German'; set intervalstyle to 'sql_standard';"
            "set bytea_output to 'escape'; set extra_float_digits to -10"
        )
        (row,) = (await SqlOwner(connection, query).page(None, 1)).rows
        assert row == {
            "id": 7,
            "at": "2024-02-29T12:00:00.5+00:00",
            "span": "P-1DT2H3M4S",
            "raw": "\\x00ff",
            "ratio": 0.30000000000000004,
            "amount": "12345678901234567890.1234567890",
            "amounts": ["1.10", None],
            "odd": "NaN",
            "doc": {"a": 1},
        }
        assert await connection.fetchval("show timezone") == "Asia/Kathmandu"
        async with connection.transaction():
            await SqlOwner(connection, query).page(None, 1)
            assert await connection.fetchval("show timezone") == "Asia/Kathmandu"
            assert await connection.fetchval("show transaction_read_only") == "off"
        await connection.execute("reset all")


async def test_a_page_that_would_be_too_large_has_fewer_rows(agents: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OWNER_PAGE_MAX_BYTES", 500)
    owner = SqlOwner(agents, QUERY)
    pages = await whole(owner, 25)
    assert len(ids(pages)) == 25
    assert len(pages) > 5
    monkeypatch.setattr(limits, "OWNER_PAGE_MAX_BYTES", 50)
    with pytest.raises(OwnerError, match="large columns"):
        await owner.page(None, 25)


async def test_the_limit_is_bounded(agents: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OWNER_PAGE_MAX_ROWS", 3)
    owner = SqlOwner(agents, QUERY)
    assert len((await owner.page(None, 1_000_000)).rows) == 3
    assert len((await owner.page(None, -5)).rows) == 1


@pytest.mark.parametrize(
    ("query", "key", "says"),
    [
        ("select id, name from nowhere", None, "relation .* correct it"),
        ("select 1.5 as id", None, "cast it"),
        ("select 1 as id, 2 as id", None, "twice"),
        ("select 1 as id", "key", "no column 'key'"),
        ("select $1::int as id", None, "parameters"),
        ("select 1 / 0 as id from agents", None, "division by zero"),
        ("select nextval('outbox.parked_events_id_seq') as id", None, "read-only"),
    ],
)
async def test_a_query_that_will_not_do_is_explained(agents: Pool, query: Any, key: str | None, says: str) -> None:
    with pytest.raises(OwnerError, match=says):
        await SqlOwner(agents, query, key=key).page(None, 5)


async def test_a_database_without_log_is_explained(database: str) -> None:
    async with open_pool(database, max_size=1, application="test") as pool:
        with pytest.raises(NotMigrated, match="migrate up"):
            await SqlOwner(pool, "select 1 as id").page(None, 5)


async def test_a_key_of_another_kind_is_refused(agents: Pool) -> None:
    with pytest.raises(OwnerRequestInvalid, match="no uuid"):
        await SqlOwner(agents, QUERY).page("not a key", 5)
    with pytest.raises(OwnerRequestInvalid, match="no bigint"):
        await SqlOwner(agents, "select 1::int as id").get(2**63)
    assert (await SqlOwner(agents, "select 1::int as id").get(2**62)).rows == []


# -------------------------------------------------------------------------------------------------------- hazard H32


async def test_a_transaction_that_has_written_gives_no_page(agents: Pool) -> None:
    """H32. Red with `_check`'s second rule removed: the page shows a row that nobody else ever sees."""
    async with agents.acquire() as connection:
        begun = connection.transaction()
        await begun.start()
        owner = SqlOwner(connection, QUERY)
        assert len((await owner.page(None, 100)).rows) == 25, "reading first is allowed"
        await connection.execute("delete from agents")
        with pytest.raises(OwnerUnavailable, match="has written already"):
            await owner.page(None, 100)
        with pytest.raises(OwnerUnavailable, match="has written already"):
            await owner.get(uuid4())
        await begun.rollback()
    async with transaction(agents) as tx:
        await tx.execute("savepoint mine; update agents set name = name; rollback to mine")
        with pytest.raises(OwnerUnavailable, match="has written already"):
            await SqlOwner(tx, QUERY).page(None, 100)
        assert await tx.fetchval("select count(*) from agents") == 25, "the caller's transaction goes on"


async def test_a_transaction_that_keeps_an_old_snapshot_gives_no_page(agents: Pool) -> None:
    """Its rows may be an hour old, and count as fresh, or as read after a partition was set free."""
    async with agents.acquire() as connection:
        owner = SqlOwner(connection, QUERY)
        async with connection.transaction():
            assert (await owner.page(None, 1)).rows
        async with connection.transaction(isolation="repeatable_read"):
            with pytest.raises(OwnerUnavailable, match="read from the pool"):
                await owner.page(None, 1)
        await connection.execute("set default_transaction_isolation = 'repeatable read'")
        assert (await owner.page(None, 1)).rows, "one of its own is as new as its page"


async def test_a_standby_and_a_copy_give_no_page() -> None:
    """H32, and H7 for pages. Red with `_check`'s first rule removed, and with its last one."""
    with Postgres() as original:
        async with open_pool(original.create_database("shop"), max_size=1, application="test") as pool:
            await migrate.up(pool)
            await pool.execute("create table agents (id uuid primary key, name text not null, tags text[] not null)")
        original.shutdown()
        with ClusterCopy(original, standby=True) as standby:
            async with open_pool(standby.dsn("shop"), max_size=1, application="test") as pool:
                with pytest.raises(OwnerUnavailable, match="standby"):
                    await SqlOwner(pool, QUERY).page(None, 5)
                await pool.fetchval("select pg_promote()")
                with pytest.raises(OwnerUnavailable, match="restored, promoted or copied"):
                    await SqlOwner(pool, QUERY).page(None, 5)


async def test_rows_and_snapshot_are_of_one_moment(agents: Pool) -> None:
    """H32. A transaction commits between any two statements of a page; the page shows both or neither.

    Red with an owner that reads its rows and then its snapshot (`_rows_first` below): the snapshot sees a transaction
    whose row the page lacks.
    """
    assert await _missed(agents, SqlOwner(agents, QUERY).page) == 0


async def test_rows_first_and_snapshot_second_loses_rows(agents: Pool) -> None:
    """Negative control of the test before."""

    async def rows_first(after: object | None, limit: int) -> OwnerPage:
        page = await SqlOwner(agents, QUERY).page(after, limit)
        await agents.execute("select 1")
        return page.model_copy(update={"snapshot": await agents.fetchval("select pg_current_snapshot()::text")})

    assert await _missed(agents, rows_first) > 0


async def _missed(agents: Pool, page: Any) -> int:
    """How many rows a page lacks although its snapshot sees who wrote them."""
    written: dict[str, int] = {}
    stopping = asyncio.Event()

    async def write() -> None:
        while not stopping.is_set():
            async with agents.acquire() as connection, connection.transaction():
                key = uuid4()
                await connection.execute("insert into agents values ($1, 'new', '{}')", key)
                written[str(key)] = await connection.fetchval("select pg_current_xact_id()::text::bigint")

    writers = [asyncio.create_task(write()) for _ in range(3)]
    missed = 0
    try:
        for _ in range(40):
            found = await page(None, 50_000)
            present = set(ids([found]))
            seen = await agents.fetch(
                "select k from unnest($1::text[], $2::text[]) x(k, id)"
                " where pg_visible_in_snapshot(id::xid8, $3::text::pg_snapshot)",
                list(written),
                [str(xid) for xid in written.values()],
                found.snapshot,
            )
            committed = {str(row["id"]) for row in await agents.fetch("select id from agents")}
            missed += sum(row["k"] in committed and row["k"] not in present for row in seen)
    finally:
        stopping.set()
        await asyncio.gather(*writers)
    return missed


# -------------------------------------------------------------------------------------------------------------- HTTP


def fastapi_app(owner: SqlOwner) -> FastAPI:
    app = FastAPI()

    @app.get("/agents")
    async def agents(request: Request) -> OwnerPage:
        return await owner.serve(request.query_params)

    return app


def starlette_app(owner: SqlOwner) -> Starlette:
    async def agents(request: Request) -> Response:
        page = await owner.serve(request.query_params)
        return Response(page.model_dump_json(), media_type="application/json")

    return Starlette(routes=[Route("/agents", agents)])


def http_owner(app: Any, **options: Any) -> HttpOwner:
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app, raise_app_exceptions=False))
    return HttpOwner("http://owner.test/agents", client=client, **options)


@pytest.mark.parametrize("make_app", [fastapi_app, starlette_app])
async def test_a_route_answers_as_the_query_does(agents: Pool, make_app: Any) -> None:
    local = SqlOwner(agents, QUERY)
    remote = http_owner(make_app(local))
    assert isinstance(remote, ComparableOwner)
    found = await whole(remote, 7)
    expected = await whole(local, 7)
    assert [(page.log, page.rows, page.last) for page in found] == [(p.log, p.rows, p.last) for p in expected]
    key = found[0].rows[3]["agent_id"]
    assert (await remote.get(UUID(key))).rows == [found[0].rows[3]]
    assert (await remote.get(uuid4())).rows == []
    keys = [UUID(row["agent_id"]) for row in found[1].rows]
    assert len((await remote.get_many([*keys, uuid4()])).rows) == 7
    columns = ["agent_id", "agent_name"]
    digests = await remote.digests(columns)
    assert digests.rows == (await local.digests(columns)).rows
    assert sum(row["count"] for row in digests.rows) == 25
    buckets = sorted(row["bucket"] for row in digests.rows)[:5]
    part = await remote.bucket_keys(columns, buckets, "", 3)
    assert len(part.rows) == 3
    assert not part.last
    rest = await remote.bucket_keys(columns, buckets, part.rows[-1]["key"], 100)
    assert rest.last
    assert 5 <= len(part.rows) + len(rest.rows) == sum(r["count"] for r in digests.rows if r["bucket"] in buckets)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"limit": "many"}, "limit"),
        ({"limit": "0"}, "limit"),
        ({"after": "no uuid"}, "key"),
        ({"key": "no uuid"}, "key"),
        ({"keys": "no json"}, "keys"),
        ({"keys": "[1]"}, "keys"),
        ({"columns": '["secret"]'}, "columns"),
        ({"columns": "[]", "buckets": "[1024]"}, "buckets"),
    ],
)
async def test_a_request_that_cannot_be_read_is_explained(agents: Pool, params: dict[str, str], field: str) -> None:
    with pytest.raises(OwnerRequestInvalid) as caught:
        await SqlOwner(agents, QUERY).serve(params)
    assert caught.value.field == field


GOOD = {"log": "18c2a3b4d5e-ab12", "snapshot": "10:12:10,11", "rows": [], "last": True}


def answering(*answers: httpx.Response | Exception) -> tuple[httpx.AsyncClient, list[httpx.Request]]:
    """A client whose server gives these answers one after the other."""
    left = list(answers)
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        found = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(found, Exception):
            raise found
        return found

    return httpx.AsyncClient(transport=httpx.MockTransport(answer)), asked


async def test_what_may_get_better_is_asked_again() -> None:
    failures = [httpx.Response(503), httpx.Response(429), httpx.ConnectError("no"), httpx.ReadTimeout("late")]
    client, asked = answering(*failures, httpx.Response(200, json=GOOD))
    page = await HttpOwner("https://owner.test/agents", client=client).page(None, 5)
    assert page == OwnerPage(log=str(GOOD["log"]), snapshot=str(GOOD["snapshot"]), rows=[], last=True)
    assert len(asked) == 5


@pytest.mark.parametrize("failure", [httpx.Response(500), httpx.ConnectError("secret"), httpx.ReadError("")])
async def test_after_a_bounded_time_the_owner_is_unavailable(failure: Any) -> None:
    client, asked = answering(failure)
    owner = HttpOwner("https://owner.test/agents?token=secret", client=client, timeout=0.2, retry_for=0.3)
    with pytest.raises(OwnerUnavailable, match=r"https://owner\.test/agents does not|status") as caught:
        await owner.page(None, 5)
    assert "secret" not in str(caught.value)
    assert len(asked) > 1
    assert "token" in asked[0].url.params


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
async def test_what_will_not_get_better_is_raised_at_once(status: int) -> None:
    client, asked = answering(httpx.Response(status))
    with pytest.raises(OwnerError, match=f"status {status}; give") as caught:
        await HttpOwner("https://owner.test/agents", client=client).get(1)
    assert not isinstance(caught.value, OwnerUnavailable)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({**GOOD, "log": "else"}, "log"),
        ({**GOOD, "snapshot": "1:2"}, "snapshot"),
        ({**GOOD, "rows": [1]}, "rows.0"),
        ({"log": GOOD["log"], "snapshot": GOOD["snapshot"], "rows": []}, "last"),
        ("<html>", "body"),
    ],
)
async def test_an_answer_that_is_no_page_is_explained(answer: Any, field: str) -> None:
    text = answer if isinstance(answer, str) else None
    client, _ = answering(httpx.Response(200, text=text) if text else httpx.Response(200, json=answer))
    with pytest.raises(OwnerPageInvalid, match=r"https://owner.test/agents answer with") as caught:
        await HttpOwner("https://owner.test/agents", client=client).page(None, 5)
    assert caught.value.field == field


async def test_an_answer_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OWNER_ANSWER_MAX_BYTES", 1_000)
    bomb = gzip.compress(b" " * 5_000_000)
    client, _ = answering(httpx.Response(200, content=bomb, headers={"content-encoding": "gzip"}))
    with pytest.raises(OwnerError, match="more than 1000 bytes"):
        await HttpOwner("https://owner.test/agents", client=client).page(None, 5)


async def test_no_password_is_ever_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client, asked = answering(httpx.Response(401))
    owner = HttpOwner("https://me:hunt%40er2@owner.test/agents", client=client, headers={"x-key": "hunter3"})
    with pytest.raises(OwnerError) as caught:
        await owner.page("a key", 5)
    assert asked[0].headers["authorization"] == "Basic " + base64.b64encode(b"me:hunt@er2").decode()
    assert asked[0].headers["x-key"] == "hunter3"
    assert dict(asked[0].url.params) == {"limit": "5", "after": "a key"}
    assert "hunt" not in str(caught.value) + repr(owner) + caplog.text


@pytest.mark.parametrize("url", ["", "owner.test/agents", "ftp://owner.test", "https://"])
def test_a_url_that_is_none_is_explained(url: str) -> None:
    with pytest.raises(OwnerError, match="https://host/path"):
        HttpOwner(url)


async def test_connections_of_its_own_are_closed(broker: str) -> None:
    host = broker.rpartition(":")[2]
    async with HttpOwner(f"http://127.0.0.1:{host}/", timeout=0.5) as owner:
        with pytest.raises(OwnerUnavailable):
            await owner.get(1)
    assert owner._clients == {}
