"""How many rows the engine's statements touch: those of the instances that they are about, never what was ever done.

As in `test_plans`: 20,000 instances that have ended, with their tasks, beside 60 that have not, in three situations. A
plan is kept, so one that was made on an empty table has to be right later.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any, Final
from uuid import UUID, uuid4

import asyncpg
import pytest

from outbox import Connection
from outbox.upkeep import migrate
from saga import Run, journal, saga, tenure
from saga import results as results_of
from saga.journal import Lease, claim, start, write
from tests.support.plans import counted
from tests.support.saga_journal import Order, charge, checkpoint, intent, living, shop, starts, task

ENDED: Final = 20_000
HELD: Final = 30
READY: Final = 30
UNSERVED: Final = 300
SITUATIONS: Final = ("planned while empty", "stale statistics", "fresh statistics")
INSTANCES: Final = "saga.workflow_instances"

FILL: Final = (
    """insert into saga.workflow_instances (id, workflow_id, workflow_name, workflow_version, key, state,
                                            deadline_at, input_digest, lease_epoch, checkpoint_no, completed_at,
                                            parent_id, parent_path, parent_told)
       select gen_random_uuid(), $1, 'shop', 1, 'old' || n, 'completed', now(), '\\x00', 1, 3, now(),
              case when n % 10 = 0 then gen_random_uuid() end, case when n % 10 = 0 then 'child#1' end, true
         from generate_series(1, $2) n""",
    """insert into saga.tasks (id, instance_id, seq, path, step_id, step_type, output)
       select gen_random_uuid(), i.id, s, 'charge#' || s, 'charge', 'step', '1'
         from saga.workflow_instances i cross join generate_series(0, 3) s where i.key like 'old%'""",
)


@saga("unserved", deadline=timedelta(days=10_000))
async def unserved(run: Run, order: Order) -> str:
    return await run(charge(order))


class Scene:
    """One connection, whose plans are kept, and instances in each state."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.owner = uuid4()
        self.leases: list[Lease] = []

    async def warm(self) -> None:
        """Run every statement often enough for its plan to be kept."""
        for _ in range(8):
            for _, act, _ in STATEMENTS:
                await act(self)

    async def fill(self) -> None:
        await self.connection.execute(FILL[0], shop.workflow_id, ENDED)
        await self.connection.execute(FILL[1])

    async def begin(self) -> None:
        """Some instances are held, some are ready, some wait."""
        await living(self.connection, self.owner)
        await start(self.connection, starts(*(f"held{n}" for n in range(HELD))))
        self.leases = await claim(self.connection, self.owner, HELD, [shop.workflow_id])
        await start(self.connection, starts(*(f"unserved{n}" for n in range(UNSERVED)), of=unserved))
        await start(self.connection, starts(*(f"ready{n}" for n in range(READY))))


async def checkpoints(scene: Scene) -> Any:
    given = [checkpoint(lease.claimed, rows=(task(1),), next=(intent("ship"),)) for lease in scene.leases] or [
        _unknown(uuid4()) for _ in range(HELD)
    ]
    return await write(scene.connection, given)


def _unknown(instance_id: UUID) -> Any:
    from saga.state import Checkpoint
    from tests.support.saga_journal import NOW

    return Checkpoint(id=instance_id, epoch=1, no=0, seen=0, state="running", held=True, at=NOW, rows=(task(1),))


async def claims(scene: Scene) -> Any:
    return await claim(scene.connection, scene.owner, 10, [shop.workflow_id])


async def takeovers(scene: Scene) -> Any:
    return await journal.SQL.take_over.fetch(scene.connection, 10)


async def timers(scene: Scene) -> Any:
    return await journal.SQL.let_timers_go_off.fetchval(scene.connection, 10)


async def sweeps(scene: Scene) -> Any:
    return await journal.SQL.sweep.fetchval(scene.connection, 10)


async def looks(scene: Scene) -> Any:
    one = scene.leases[0].claimed.id if scene.leases else uuid4()
    return await journal.SQL.look.fetch(scene.connection, one)


async def signals(scene: Scene) -> Any:
    return await journal.SQL.signal.fetchval(scene.connection, "shop", "ready1", "S", None, "{}")


async def cancels(scene: Scene) -> Any:
    return await journal.SQL.cancel.fetchval(scene.connection, "shop", "ready2", "why")


async def results(scene: Scene) -> Any:
    return await journal.SQL.result.fetch(scene.connection, "shop", "old7")


async def standings(scene: Scene) -> Any:
    return await results_of.SQL.standing.fetch(scene.connection, ["shop"] * 10, [f"old{n}" for n in range(10)])


async def next_timers(scene: Scene) -> Any:
    return await tenure.SQL.next_timer.fetchval(scene.connection)


async def forgotten_workers(scene: Scene) -> Any:
    return await tenure.SQL.forget_workers.execute(scene.connection)


async def late_results(scene: Scene) -> Any:
    one = scene.leases[0].claimed.id if scene.leases else uuid4()
    return await journal.SQL.record_late.fetchval(scene.connection, one, "ship#1", 1, '"x"')


async def new_starts(scene: Scene) -> Any:
    if scene.leases:
        return await start(scene.connection, starts(*(f"new{n}" for n in range(10)), "old1"))
    return await start(scene.connection, [])


Act = Callable[[Scene], Awaitable[Any]]
STATEMENTS: Final[tuple[tuple[str, Act, int], ...]] = (
    ("checkpoint", checkpoints, 6 * HELD),
    ("claim", claims, 120),
    ("take_over", takeovers, 80),
    ("let_timers_go_off", timers, 20),
    ("sweep", sweeps, 20),
    ("look", looks, 10),
    ("signal", signals, 12),
    ("cancel", cancels, 12),
    ("result", results, 4),
    ("standing", standings, 30),
    ("next_timer", next_timers, 4),
    ("forget_workers", forgotten_workers, 2 * HELD),
    ("record_late", late_results, 20),
    ("start", new_starts, 100),
)
"""What it does, and how many rows of instances and tasks it may take from tables and indexes."""


IDLE: Final = ("take_over", "let_timers_go_off", "sweep", "next_timer", "forget_workers")
"""Nothing is there for them to do."""


@pytest.fixture(params=SITUATIONS, ids=lambda name: name.replace(" ", "_"))
async def scene(database: str, request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    connection = await asyncpg.connect(database)
    await migrate.up(connection)
    await migrate.up(connection, package="saga")
    await connection.execute("analyze")
    made = Scene(connection)
    if request.param == "planned while empty":
        await made.warm()
        await connection.execute("delete from saga.workers")
    await made.fill()
    if request.param == "fresh statistics":
        await connection.execute("analyze")
    await made.begin()
    await connection.execute(
        "insert into saga.workers (id, name, alive_until) values ($1, 'old', '2020-01-01')", uuid4()
    )
    yield made
    await connection.close()


async def test_statements_touch_what_they_are_about(scene: Scene) -> None:
    """H51 for the checkpoint, and its like for the others."""
    found = {}
    for name, act, bound in STATEMENTS:
        async with counted(scene.connection) as touched:
            await act(scene)
        found[name] = (touched.rows[INSTANCES] + touched.rows["saga.tasks"], bound)
    assert {name: at for name, at in found.items() if at[0] > at[1]} == {}
    assert all(rows > 0 for name, (rows, _) in found.items() if name not in IDLE), found


async def test_without_its_guard_a_plan_of_the_first_minute_reads_the_whole_table(database: str) -> None:
    """H51, seen red: what a checkpoint does whose function may be planned with sequential scans."""
    connection = await asyncpg.connect(database)
    await migrate.up(connection)
    await migrate.up(connection, package="saga")
    await connection.execute("alter function saga.checkpoint reset enable_seqscan")
    await connection.execute("analyze")
    made = Scene(connection)
    for _ in range(8):
        await checkpoints(made)
    await made.fill()
    await made.begin()
    async with counted(connection) as touched:
        await checkpoints(made)
    assert touched.rows[INSTANCES] > ENDED
    await connection.close()


async def test_a_step_updates_its_instance_in_place(database: str) -> None:
    """A checkpoint between two steps changes no indexed column: fillfactor leaves room, and no index grows."""
    connection = await asyncpg.connect(database)
    await migrate.up(connection)
    await migrate.up(connection, package="saga")
    made = Scene(connection)
    await made.begin()
    await connection.execute("select pg_stat_force_next_flush()")
    before = await connection.fetchrow(UPDATES)
    for no in range(5):
        given = [
            checkpoint(lease.claimed, no=no, rows=(task(no + 1),), next=(intent("ship"),)) for lease in made.leases
        ]
        await write(connection, given)
    await connection.execute("select pg_stat_force_next_flush()")
    after = await connection.fetchrow(UPDATES)
    assert before is not None
    assert after is not None
    assert after["updates"] - before["updates"] == 5 * HELD
    assert after["in_place"] - before["in_place"] >= 4 * HELD
    await connection.close()


UPDATES: Final = """select n_tup_upd as updates, n_tup_hot_upd as in_place from pg_stat_user_tables
                     where relid = 'saga.workflow_instances'::regclass"""
