"""Each role of saga's roles.sql can do its work, and not the others'."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from importlib import resources
from urllib.parse import quote, urlsplit

import asyncpg
import pytest

from outbox import Pool
from outbox.upkeep import migrate
from saga import Worker, live
from saga.inspection import find, instances, read
from saga.operate import cancel, pause, resume, settle, signal, skip
from saga.why import why
from tests.support.saga_cases import asks, commands, pivoted, undone
from tests.support.saga_worker import QUICK, SERVICE, Order, Service, reaches

OUTBOX = resources.files("outbox").joinpath("roles.sql").read_text(encoding="utf-8")
SAGA = resources.files("saga").joinpath("roles.sql").read_text(encoding="utf-8")
ROLES = {
    "client": "saga_client, outbox_writer",
    "worker": "saga_worker, outbox_relay",
    "reader": "saga_reader, outbox_reader",
}


@pytest.fixture
def logins(any_database: str) -> Iterator[dict[str, str]]:
    """A login for each kind of service, as URLs."""
    password = uuid.uuid4().hex
    names = {kind: f"{kind}_{uuid.uuid4().hex[:8]}" for kind in ROLES}

    async def run(*statements: str) -> None:
        connection = await asyncpg.connect(any_database)
        for statement in statements:
            await connection.execute(statement)
        await connection.close()

    async def prepare() -> None:
        connection = await asyncpg.connect(any_database)
        await migrate.up(connection)
        await migrate.up(connection, package="saga")
        await connection.close()
        made = [f"create role {names[kind]} login password '{password}' in role {ROLES[kind]}" for kind in ROLES]
        services = [SERVICE, f"grant select, insert on effects to {names['worker']}"]
        await run(OUTBOX, SAGA, SAGA, *made, *services)

    asyncio.run(prepare())
    parts = urlsplit(any_database)
    yield {
        kind: parts._replace(netloc=f"{quote(name)}:{password}@{parts.hostname}:{parts.port}").geturl()
        for kind, name in names.items()
    }
    asyncio.run(run(*(f"drop owned by {name}; drop role {name}" for name in names.values())))


@pytest.fixture
async def client(logins: dict[str, str]) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(logins["client"], min_size=1) as pool:
        yield pool


@pytest.fixture
async def worker(logins: dict[str, str]) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(logins["worker"], min_size=1, max_size=20) as pool:
        yield pool


@pytest.fixture
async def reader(logins: dict[str, str]) -> AsyncIterator[Pool]:
    async with asyncpg.create_pool(logins["reader"], min_size=1) as pool:
        yield pool


async def refused(pool: Pool, *statements: str) -> None:
    for statement in statements:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await pool.execute(statement)


async def test_clients_order_workers_work_and_readers_look(client: Pool, worker: Pool, reader: Pool) -> None:
    sent = await commands.start(client, Order(), key="sent")
    async with Worker(worker, "", asks, undone, pivoted, deps=Service(worker), settings=QUICK):
        approved = await asks.start(client, Order(), key="a")
        failing = await undone.start(client, Order(fails="unbook fails 99"), key="u")
        unsure = await pivoted.start(client, Order(fails="certain lands"), key="p")
        await reaches(reader, approved.id, "waiting")
        assert (await pause(client, approved.id, "lunch")).effect == "paused"
        await signal(client, approved.id, "Approval", "{}", None)
        await resume(client, approved.id, "over")
        assert await approved.result(timeout=20) == "approved"
        await reaches(reader, failing.id, "paused")
        await reaches(reader, unsure.id, "paused")
        assert "saga resume" in (why(await read(reader, await find(reader, "undone/u"))).remedy or "")
        await skip(client, failing.id, "book", "by hand")
        await reaches(reader, failing.id, "failed")
        await settle(client, unsure.id, "certain", '"s"', "seen")
        assert await unsure.result(timeout=20) == "s"
    await pause(client, sent.id, "wait")
    await cancel(client, sent.id, "no")
    await skip(client, sent.id, "stock.reserve", "it never went out")
    assert len(await instances(reader, limit=9)) == 4
    assert (await live.check(reader, [commands])).counts == {}


async def test_none_can_do_what_is_not_its_work(client: Pool, worker: Pool, reader: Pool) -> None:
    await refused(
        client,
        "update saga.tasks set output = '1'",
        "delete from saga.workflow_instances",
        "delete from saga.interventions",
        "insert into saga.workers (id, name, alive_until) values (gen_random_uuid(), 'x', now())",
        "insert into saga.late_results (instance_id, path, epoch) values (gen_random_uuid(), 'x', 1)",
    )
    await refused(worker, "drop table saga.tasks", "create table saga.mine ()")
    await refused(
        reader,
        "update saga.workflow_instances set state = 'completed'",
        "insert into saga.signals (instance_id, no, name, payload) values (gen_random_uuid(), 1, 'x', '1')",
    )
