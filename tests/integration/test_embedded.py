"""The embedded servers do what every other test relies on."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from outbox import embedded
from outbox.embedded import Broker, Databases, EmbeddedServerError, Postgres
from outbox.embedded.kafka import answers_kafka
from outbox.embedded.process import free_port
from tests.support.kafka_server import RealKafka, create_topic

DEADLINE_SECONDS = 20.0


@pytest.fixture
def server() -> Iterator[Postgres]:
    with Postgres() as own:
        yield own


async def execute(dsn: str, statement: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_a_database_is_fresh_and_takes_the_name_it_was_given(postgres: Databases) -> None:
    dsn = postgres.create_database('Ord%ers "2"')
    try:
        assert await execute(dsn, "select current_database()") == 'Ord%ers "2"'
        assert await execute(dsn, "select count(*) from pg_tables where schemaname = 'public'") == 0
        with pytest.raises(EmbeddedServerError, match="already exists"):
            postgres.create_database('Ord%ers "2"')
    finally:
        postgres.drop_database('Ord%ers "2"')
    with pytest.raises(asyncpg.InvalidCatalogNameError):
        await asyncpg.connect(dsn)


async def test_a_database_is_dropped_under_its_connections(postgres: Databases, topic: str) -> None:
    connection = await asyncpg.connect(postgres.create_database(topic))
    postgres.drop_database(topic)
    with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
        await connection.fetchval("select 1")
    connection.terminate()


async def test_each_supported_version_answers(any_database: str) -> None:
    assert await execute(any_database, "select current_setting('synchronous_commit')") == "on"
    assert await execute(any_database, "select current_setting('fsync')") == "on"
    assert await execute(any_database, "select current_setting('max_prepared_transactions')") == "10"


async def test_strangers_are_kept_out(server: Postgres) -> None:
    url = urlsplit(server.dsn())
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(url._replace(netloc=f"postgres:guess@127.0.0.1:{url.port}").geturl())
    assert server.data_directory.stat().st_mode & 0o077 == 0


@pytest.mark.crash
async def test_a_kill_keeps_what_was_committed(server: Postgres) -> None:
    dsn = server.create_database("ledger")
    await execute(dsn, "create table entries (id int primary key)")
    survivor = await asyncpg.connect(dsn)
    doomed = await asyncpg.connect(dsn)
    await survivor.execute("insert into entries values (1)")
    await doomed.execute("begin; insert into entries values (2)")
    children = psutil.Process(server.pid).children(recursive=True)
    assert len(children) >= 2, "backends are children of the postmaster"

    server.kill()

    assert not server.running
    assert all(not child.is_running() or child.status() == psutil.STATUS_ZOMBIE for child in children)
    for connection in (survivor, doomed):
        with pytest.raises((asyncpg.PostgresError, asyncpg.InterfaceError, OSError)):
            await connection.fetchval("select 1")
        connection.terminate()
    server.start()
    assert await execute(dsn, "select array_agg(id) from entries") == [1]


async def test_a_restart_keeps_the_port_and_the_data(server: Postgres) -> None:
    dsn, pid = server.create_database("ledger"), server.pid
    server.restart()
    assert server.pid != pid
    assert await execute(dsn, "select current_database()") == "ledger"


@pytest.mark.crash
@pytest.mark.parametrize("end", ["stop", "kill, then stop"])
def test_nothing_is_left_behind(end: str) -> None:
    server = Postgres()
    server.start()
    directory, pid = server.data_directory.parent, server.pid
    if end != "stop":
        server.kill()
    server.stop()
    server.stop()  # stopping twice is harmless
    assert not directory.exists()
    assert not psutil.pid_exists(pid)
    with pytest.raises(EmbeddedServerError, match="not been started"):
        _ = server.pid


def test_two_servers_run_side_by_side(server: Postgres) -> None:
    with Postgres(settings={"max_connections": "20"}) as other:
        assert other.port != server.port
        assert asyncio.run(execute(other.dsn(), "show max_connections")) == "20"
        assert asyncio.run(execute(server.dsn(), "show max_connections")) == "200"


def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(EmbeddedServerError, match="no_such_setting"):
        Postgres(settings={"no_such_setting": "1"}).start()


def test_programs_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="lacks postgres"):
        Postgres(bin_dir=tmp_path).start()


async def test_records_come_back_from_the_broker(broker: str, topic: str) -> None:
    await create_topic(broker, topic, partitions=3)
    async with AIOKafkaProducer(bootstrap_servers=broker, enable_idempotence=False) as producer:
        sent = await producer.send_and_wait(topic, b"value", key=b"key", headers=[("h", b"1")])
    # Tansu lets half a session timeout pass before it lets anybody into a group, so that others can join too.
    async with AIOKafkaConsumer(
        topic,
        bootstrap_servers=broker,
        group_id=topic,
        auto_offset_reset="earliest",
        session_timeout_ms=1000,
        heartbeat_interval_ms=300,
    ) as consumer:
        record = await asyncio.wait_for(consumer.getone(), DEADLINE_SECONDS)
    assert (record.key, record.value, record.headers) == (b"key", b"value", (("h", b"1"),))
    assert (record.partition, record.offset) == (sent.partition, 0)


def test_the_broker_comes_back_on_its_port() -> None:
    with Broker() as own:
        servers, pid = own.bootstrap_servers, own.pid
        own.kill()
        assert not own.running
        own.start()
        assert (own.bootstrap_servers, own.running) == (servers, True)
        assert own.pid != pid
        own.restart()
        assert own.bootstrap_servers == servers


def test_a_silent_port_is_no_broker() -> None:
    assert not answers_kafka(free_port())


def test_the_environment_names_servers_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(embedded.DATABASE_URL, "postgresql://me:secret@db.example:6432/app?sslmode=require")
    monkeypatch.setenv(embedded.KAFKA_BOOTSTRAP_SERVERS, "one:9092,two:9092")
    with embedded.stack() as stack:
        assert stack.database_url() == "postgresql://me:secret@db.example:6432/app?sslmode=require"
        assert stack.database_url("a/b") == "postgresql://me:secret@db.example:6432/a%2Fb?sslmode=require"
        assert stack.kafka == "one:9092,two:9092"
        assert (stack.embedded_postgres, stack.embedded_broker) == (None, None)
        assert stack.running, "nothing was started, so nothing can have ended"


async def test_databases_are_created_on_a_server_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, server: Postgres, broker: str
) -> None:
    monkeypatch.setenv(embedded.DATABASE_URL, server.dsn())
    monkeypatch.setenv(embedded.KAFKA_BOOTSTRAP_SERVERS, broker)
    async with embedded.stack() as stack:
        assert await execute(stack.create_database("shop"), "select current_database()") == "shop"
        stack.drop_database("shop")


async def test_a_stack_starts_both_and_stops_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(embedded.DATABASE_URL, raising=False)
    monkeypatch.delenv(embedded.KAFKA_BOOTSTRAP_SERVERS, raising=False)
    async with embedded.stack() as stack:
        assert stack.running
        assert await execute(stack.create_database("shop"), "select 1") == 1
        assert answers_kafka(int(stack.kafka.rpartition(":")[2]))
        owned = stack.embedded_postgres, stack.embedded_broker
    assert all(server is not None and not server.running for server in owned)


@pytest.mark.crash
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_leaves_nothing_behind(number: signal.Signals) -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {embedded.DATABASE_URL, embedded.KAFKA_BOOTSTRAP_SERVERS}
    }
    command = [sys.executable, "-m", "outbox.embedded"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as program:
        assert program.stdout is not None
        printed = dict(program.stdout.readline().strip().split("=", 1) for _ in range(2))
        servers = [child for child in psutil.Process(program.pid).children() if child.name() != "python"]
        program.send_signal(number)
        status = program.wait(DEADLINE_SECONDS)
    assert list(printed) == ["DATABASE_URL", "KAFKA_BOOTSTRAP_SERVERS"]
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    assert len(servers) >= 2
    deadline = time.monotonic() + DEADLINE_SECONDS
    while any(server.is_running() and server.status() != psutil.STATUS_ZOMBIE for server in servers):
        assert time.monotonic() < deadline, f"{servers} outlive the program"
        os.sched_yield()


@pytest.mark.crash
async def test_apache_kafka_keeps_idempotent_records_over_a_kill(real_kafka: RealKafka, topic: str) -> None:
    servers = real_kafka.bootstrap_servers
    await create_topic(servers, topic)
    async with AIOKafkaProducer(bootstrap_servers=servers, enable_idempotence=True) as producer:
        for number in range(10):
            await producer.send_and_wait(topic, str(number).encode())
    await asyncio.to_thread(real_kafka.crash_restart)
    async with AIOKafkaConsumer(bootstrap_servers=servers, auto_offset_reset="earliest") as consumer:
        consumer.assign([TopicPartition(topic, 0)])
        records = [await asyncio.wait_for(consumer.getone(), DEADLINE_SECONDS) for _ in range(10)]
        assert [record.value for record in records] == [str(number).encode() for number in range(10)]
        assert (await consumer.end_offsets([TopicPartition(topic, 0)])) == {TopicPartition(topic, 0): 10}
