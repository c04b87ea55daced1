"""The second part of the demo: sagas over four services, and what goes wrong with them.

    saga worker        ->  workflow_db      ->  relay  ->  Kafka  ->  validation, notification (participants)
      |   ^                                                  |                     |
      |   +------------------------ replies -----------------+  <-  relays  <-  their databases
      +--------------------- over a bad network ---------------->  LLM agent service

Besides the troubles that workflows ask for, the worker is killed when half of them have been started, and the last ones
are told so late what the notification service did that they have given up waiting.
"""

import asyncio
import contextlib
import itertools
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from rich.console import Console

from examples.agents.progress import Count, display
from examples.agents.saga_verdict import SagaRun, Takeover
from examples.agents.stage import OUTBOX, SAGA, Stage
from examples.agents.traffic import POPULAR
from examples.agents.trouble import Trouble
from examples.agents.workflow_saga import ExecuteWorkflow, execute_workflow
from outbox.embedded.process import ServerProcess
from saga import Handle, NotWaiting

START_EVERY_SECONDS: Final = 0.03
CANCEL_AFTER: Final = 8
"""So many others are started between the start of a workflow and its cancel."""
TROUBLES: Final = (*Trouble, *[Trouble.NONE] * 13)
"""In turns: a third of the workflows have one."""
LATE_SHARE: Final = 10
"""One in so many is told late."""
KILLED_WITH_AT_LEAST: Final = 3
READY_TIMEOUT_SECONDS: Final = 30.0
END_TIMEOUT_SECONDS: Final = 60.0

SERVICES: Final = ("workflow_db", "validation_db", "notification_db")
READY: Final = """
    select (select count(*) from outbox.positions where topic like 'saga.%') = 2
       and exists (select from outbox.shards where lease_owner is not null)"""
STANDING: Final = """
    select count(*) as started, count(*) filter (where state = 'completed') as completed,
           count(*) filter (where state in ('failed', 'cancelled')) as undone
      from saga.workflow_instances"""
LEASED: Final = "select lease_owner from saga.workflow_instances where lease_owner is not null"
HAVE_ANOTHER: Final = "select not exists (select from saga.workflow_instances where lease_owner = any($1::uuid[]))"
UNANSWERED: Final = """
    select count(*) from saga.tasks t join saga.workflow_instances i on i.id = t.instance_id
     where t.step_id = 'notification.notify' and t.outcome = 'unknown' and i.state not in ('failed', 'cancelled')"""
JOURNAL: Final = """
    select count(*) filter (where step_id = 'execute_agent' and attempt_count > 1) as "calls repeated",
           count(*) filter (where step_id = 'execute_agent' and outcome = 'unknown') as "calls never answered",
           count(*) filter (where step_id = 'validation.validate' and outcome = 'rejected') as "not valid",
           count(*) filter (where step_id = 'notification.notify' and outcome = 'rejected') as "not wanted",
           (select count(*) from saga.signals s join saga.tasks t using (instance_id)
             where s.kind = 'reply' and s.name = t.path and t.outcome = 'unknown') as "replies too late"
      from saga.tasks"""
FAILED_WRITES: Final = "select last_value / 7 from effects_written"


@dataclass(frozen=True, slots=True)
class Standing:
    """How many sagas have got how far."""

    at: float
    started: int
    completed: int
    undone: int

    @property
    def counts(self) -> Sequence[Count]:
        return (
            Count("started", self.started, "cyan"),
            Count("completed", self.completed, "green"),
            Count("undone", self.undone, "yellow"),
        )

    @property
    def on_the_way(self) -> int:
        return self.started - self.completed - self.undone

    @property
    def left(self) -> str:
        return f"{self.on_the_way:,} sagas on the way"


class Workflows:
    """Starts everything and the sagas, and sees to the troubles that are larger than one workflow."""

    def __init__(self, set_up: Stage, console: Console, count: int) -> None:
        self._set_up = set_up
        self._console = console
        self._count = count
        self._pool = set_up.workflows.pool
        self._asked: set[UUID] = set()
        self._to_cancel: deque[Handle[None] | None] = deque()
        self._screen = display(console, count)

    async def run(self) -> SagaRun:
        """Returns when all sagas have ended, and every process has."""
        say, set_up = self._console.print, self._set_up
        say("starting the services that sagas go through, and their relays ...")
        relays = {name: self._start_relay(name) for name in SERVICES}
        participants = [self._start_participant(name) for name in ("validation", "notification")]
        worker = self._start_worker()
        await set_up.wait_until("the services are ready", self._ready, READY_TIMEOUT_SECONDS)
        late = self._count // LATE_SHARE
        say(f"{self._count:,} sagas with failures of every kind; halfway their worker is killed with SIGKILL ...")
        with display(self._console, self._count) as self._screen:
            half = self._count // 2
            await self._start(half, TROUBLES)
            takeover = await self._kill(worker)
            worker = self._start_worker()
            await self._start(self._count - half - late, TROUBLES)
            await self._until("the sagas have ended", self._ended)
            with set_up.frozen(relays["notification_db"]):
                await self._start(late, [Trouble.NONE])
                await self._until("the last sagas have given up waiting", self._given_up)
            await self._until("late replies have come, and all sagas have ended", self._ended)
        run = SagaRun(asked=frozenset(self._asked), happened=await self._happened(), takeover=await takeover)
        await asyncio.gather(*map(set_up.stop, [worker, *participants, *relays.values()]))
        return run

    # ------------------------------------------------------------------------------------------ processes

    def _start_relay(self, name: str) -> ServerProcess:
        return self._set_up.start(f"relay-{name}", OUTBOX, "relay", database=self._set_up.databases[name])

    def _start_participant(self, name: str) -> ServerProcess:
        return self._set_up.start(
            f"{name}-service", SAGA, "worker", "--app", f"examples.agents.{name}_service",
            database=self._set_up.databases[f"{name}_db"],
        )  # fmt: skip

    def _start_worker(self) -> ServerProcess:
        return self._set_up.start(
            "saga-worker", SAGA, "worker", "--app", "examples.agents.trouble:worker", database=self._set_up.workflows
        )

    async def _kill(self, worker: ServerProcess) -> asyncio.Task[Takeover]:
        """Kill the worker while it has sagas; the task ends when none of them is its own any more."""

        async def has_some() -> bool:
            return len(await self._pool.fetch(LEASED)) >= KILLED_WITH_AT_LEAST

        await self._set_up.wait_until("the worker has sagas", has_some, READY_TIMEOUT_SECONDS)
        self._set_up.kill(worker)
        at = time.perf_counter()
        orphans = [row["lease_owner"] for row in await self._pool.fetch(LEASED)]

        async def all_have_another() -> bool:
            return bool(await self._pool.fetchval(HAVE_ANOTHER, orphans))

        async def taken_over() -> Takeover:
            await self._until("the sagas have another worker", all_have_another)
            return Takeover(len(orphans), time.perf_counter() - at)

        return asyncio.create_task(taken_over())

    # ------------------------------------------------------------------------------------------ workflows

    async def _start(self, count: int, troubles: Sequence[Trouble]) -> None:
        """Start workflows with these troubles in turns, and cancel those that are meant to be, a moment later."""
        for trouble in itertools.islice(itertools.cycle(troubles), count):
            work = ExecuteWorkflow(
                workflow_id=uuid.uuid4(),
                agent_id=POPULAR[len(self._asked) % len(POPULAR)],
                prompt=trouble,
                recipient="nobody" if trouble is Trouble.UNWANTED else "somebody",
            )
            self._asked.add(work.workflow_id)
            handle = await execute_workflow.start(self._pool, work, key=str(work.workflow_id))
            self._to_cancel.append(handle if trouble is Trouble.CANCELLED else None)
            if len(self._to_cancel) > CANCEL_AFTER and (earlier := self._to_cancel.popleft()):
                with contextlib.suppress(NotWaiting):  # it was quicker
                    await earlier.cancel("nobody needs it any more")
            await self._look()
            await asyncio.sleep(START_EVERY_SECONDS)

    # ------------------------------------------------------------------------------------------ states

    async def _ready(self) -> bool:
        """Whether every process can do its part: what takes long to start would look like a timeout."""
        return all([await self._set_up.databases[name].pool.fetchval(READY) for name in SERVICES])

    async def _look(self) -> Standing:
        [row] = await self._pool.fetch(STANDING)
        standing = Standing(time.perf_counter(), **row)
        self._screen.show(standing)
        return standing

    async def _ended(self) -> bool:
        return (await self._look()).on_the_way == 0

    async def _given_up(self) -> bool:
        """All that are still on the way have their last step behind them, and do not know what came of it."""
        return bool((await self._look()).on_the_way == await self._pool.fetchval(UNANSWERED))

    async def _until(self, what: str, holds: Callable[[], Awaitable[bool]]) -> None:
        await self._set_up.wait_in_hope(self._console, what, holds, END_TIMEOUT_SECONDS)

    async def _happened(self) -> dict[str, int]:
        """How often each trouble befell a saga, as journals and databases tell."""
        participants = [self._set_up.databases[name].pool for name in ("validation_db", "notification_db")]
        failed = sum([await pool.fetchval(FAILED_WRITES) for pool in participants])
        [found] = await self._pool.fetch(JOURNAL)
        return {**found, "writes failed at first": failed}
