"""The migrations of schema saga on each supported PostgreSQL: there and back, on top of those of the outbox."""

import re
from collections.abc import AsyncIterator

import asyncpg
import pytest

from outbox import postgres
from outbox.upkeep import migrate
from outbox.upkeep.scripts import split
from saga import answering, replies
from saga.journal import SQL
from tests.support.catalogue import catalogue

Connection = asyncpg.Connection
NUMBERS = [1, 2]


@pytest.fixture
async def db(any_database: str) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(any_database)
    await migrate.up(connection)
    yield connection
    await connection.close()


async def test_up_down_and_up_again_end_where_they_began(db: Connection) -> None:
    before = await catalogue(db)
    assert [m.number for m in await migrate.up(db, package="saga")] == NUMBERS
    full = await catalogue(db)
    assert len(full) > len(before)
    assert [m.number for m in await migrate.down(db, package="saga", to=0)] == NUMBERS[::-1]
    assert await catalogue(db) == before
    await migrate.up(db, package="saga")
    assert await catalogue(db) == full


async def test_the_outbox_can_go_only_after_the_sagas(db: Connection) -> None:
    await migrate.up(db, package="saga")
    await migrate.down(db, package="saga", to=0)
    await migrate.down(db, to=0)
    assert await db.fetchval("select to_regnamespace('saga') is null and to_regnamespace('outbox') is null")


async def test_printed_statements_leave_the_same_database(db: Connection) -> None:
    await migrate.up(db, package="saga")
    expected = await catalogue(db)
    await migrate.down(db, package="saga", to=0)
    async with db.transaction():
        for statement in migrate.statements("saga"):
            await db.execute(statement)
    assert await catalogue(db) == expected
    assert {row.state for row in await migrate.status(db, package="saga")} == {"applied"}


async def test_every_statement_can_be_prepared(db: Connection) -> None:
    await migrate.up(db, package="saga")
    for statement in (*SQL, *answering.SQL, *replies.SQL):
        await db.prepare(statement.text)


async def test_tables_have_the_columns_states_and_checks_that_others_know(db: Connection) -> None:
    await migrate.up(db, package="saga")
    columns = {
        "workflows": "id name description version status definition created_at updated_at created_by",
        "workflow_instances": "id workflow_id current_step_index state context started_at completed_at error_message"
        " created_by",
        "tasks": "id instance_id step_id step_type status input output error_message attempt_count max_attempts"
        " started_at completed_at duration_ms",
        "saga_compensations": "id instance_id task_id compensation_action compensation_data executed_at status"
        " error_message",
    }
    for table, names in columns.items():
        found = {
            row["column_name"]
            for row in await db.fetch(
                "select column_name from information_schema.columns where table_schema = 'saga' and table_name = $1",
                table,
            )
        }
        assert found >= set(names.split()), table
    states = {
        "workflows_status_check": "draft active deprecated",
        "workflow_instances_state_check": "pending running paused completed failed cancelled",
        "tasks_status_check": "pending running completed failed skipped",
        "saga_compensations_status_check": "pending executing completed failed",
    }
    for name, values in states.items():
        text = await db.fetchval("select pg_get_constraintdef(oid) from pg_constraint where conname = $1", name)
        assert set(re.findall(r"'(\w+)'", text)) >= set(values.split()), name


async def test_every_table_and_function_says_what_it_is_for(db: Connection) -> None:
    await migrate.up(db, package="saga")
    silent = await db.fetch(
        """select c.oid::regclass::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
            where n.nspname = 'saga' and c.relkind = 'r' and obj_description(c.oid, 'pg_class') is null
           union all
           select p.oid::regprocedure::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace
            where n.nspname = 'saga' and obj_description(p.oid, 'pg_proc') is null"""
    )
    assert [row[0] for row in silent] == []


def test_the_script_is_cut_into_statements_that_each_end() -> None:
    for migration in migrate.shipped("saga"):
        assert all(statement.count("$$") in (0, 2) for statement in split(migration.up))
    assert isinstance(SQL, postgres.Statements)
