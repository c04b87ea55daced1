"""One life of a worker under one id: from the commit of its row to the hand-over, or to the loss of its lease.

* *Claims*: only definitions that this worker serves, at most as many as it has room for, some at a time.
* *Takeover*: every worker looks now and then for instances whose owner is dead or absent, at most some at a time. One
  that was lost twice without any progress runs while nothing else does: it may be what kills workers. After the fifth
  time it is paused (`saga.take_over`).
* *Timers*: every worker makes instances ready whose time has come.
* *Count*: now and then, and after trouble with a claim, what is leased to this id is compared with what runs: the reply
  of a claim may have been lost, and nobody takes over from the living.
* *Sweep*: what a crash left undone of instances that have ended: parents that were not told, locks not given back.

A crash hands nothing over; the row in `saga.workers` runs out, and others take over. A lost connection changes nothing
about the lease: the heartbeat has its own.
"""

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid4

from outbox import postgres, retry
from outbox.postgres import Connection
from saga import journal, limits
from saga.decider import Execution
from saga.definition import Saga
from saga.journal import Start
from saga.lease import Heartbeat
from saga.runner import Runner, Surroundings, give_back
from saga.settings import Settings
from saga.starts import starts_of
from saga.wakeup import Wakeup
from saga.writer import is_cancelled

log = logging.getLogger(__name__)
SQL: Final = postgres.Statements("saga", "tenure.sql")

Sagas = Mapping[UUID, Saga[Any, Any]]
_TROUBLE: Final = (postgres.PostgresError, *postgres.CONNECTION_ERRORS)


class Tenure:
    """Claims and runs instances under an id of its own."""

    def __init__(
        self, around: Surroundings, sagas: Sagas, settings: Settings, running: set[asyncio.Task[None]]
    ) -> None:
        """For one life.

        Args:
            around: what all instances share.
            sagas: by the id of their definition.
            settings: of the worker.
            running: of all lives of this worker; instances of an earlier one may still be coming to their ends.
        """
        self.worker_id: Final = uuid4()
        self._around = around
        self._sagas = sagas
        self._settings = settings
        self._running = running
        self._alone: deque[Runner] = deque()
        self._known: dict[UUID, asyncio.Task[None]] = {}
        """What runs under this id."""
        self._most = limits.CLAIM_MAX_INSTANCES
        """Claimed at a time; fewer after trouble, as their journals may be too long to be read at once."""
        self._counted_at = asyncio.get_running_loop().time()
        self._room = asyncio.Event()
        self._wakeup = Wakeup(settings)
        self._timer = asyncio.Event()
        self._timer_at = 0.0
        """In the loop's time: when the timers are looked at next."""
        serves = json.dumps([f"{saga.name}/{saga.version}" for saga in sagas.values()])
        self.heartbeat: Final = Heartbeat(around.pool, self.worker_id, settings.worker_lease_seconds, serves)

    async def serve(self) -> None:
        """Until the worker stops or the lease is lost; what runs goes on."""
        await self.heartbeat.start()
        log.info("worker %s serves %s", self.worker_id, ", ".join(sorted(saga.name for saga in self._sagas.values())))
        tasks = [
            asyncio.create_task(self._keep(self._claim), name="claims of instances"),
            asyncio.create_task(self._keep(self._take_over), name="takeover of instances"),
            asyncio.create_task(self._keep(self._ring), name="timers of instances"),
        ]
        starts = starts_of(self._around.pool)
        starts.add(self)
        ends = [asyncio.create_task(_set(event)) for event in (self._around.stopping, self.heartbeat.lost)]
        try:
            await asyncio.wait([*tasks, *ends], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            starts.remove(self)
            for ending in ends:
                ending.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def hand_over(self) -> None:
        """Give all instances back, so that others go on at once; then end the lease."""
        with contextlib.suppress(*_TROUBLE):  # else others find out by themselves when the row runs out
            async with postgres.acquire(self._around.pool) as connection:
                count = await journal.SQL.hand_over.fetchval(connection, self.worker_id)
                await journal.SQL.deregister.execute(connection, self.worker_id)
                log.info("worker %s handed %s instances over", self.worker_id, count)
        await self.heartbeat.stop()

    def timer_set(self, seconds: float) -> None:
        """A timer that goes off in so many seconds was written."""
        if asyncio.get_running_loop().time() + seconds < self._timer_at:
            self._timer.set()

    async def _keep(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do something for ever, and again after any trouble with the database."""
        pauses = retry.backoff(maximum=self._settings.worker_lease_seconds)
        while True:
            try:
                await work()
            except _TROUBLE as error:
                if not retry.is_transient(error) or is_cancelled():
                    raise
                log.warning("worker %s: %r; trying again", self.worker_id, error)
                await asyncio.sleep(next(pauses))

    # -------------------------------------------------------------------------------------------- starts

    def takes(self, starts: Sequence[Start]) -> bool:
        """Whether it serves all of these, and has room: then they are leased to it with their start."""
        room = self._settings.instances_in_flight - len(self._running)
        is_here = self.heartbeat.is_held and not self._around.stopping.is_set() and not self._alone
        return is_here and len(starts) <= room and all(start.saga.workflow_id in self._sagas for start in starts)

    def begin(self, new: Start) -> None:
        """Run one of them."""
        self._begin(Runner.of_start(self._around, self.heartbeat, new))

    def runs(self, instance_id: UUID) -> bool:
        """Whether it has the instance now, and will tell its end."""
        return instance_id in self._known

    # -------------------------------------------------------------------------------------------- claiming

    async def _claim(self) -> None:
        async with postgres.acquire(self._around.pool) as connection:
            await self._wakeup.attach(connection)
            try:
                while True:
                    await self._claim_once(connection)
            except Exception:  # of any kind: `_keep` tries again, or ends the worker
                # A reply may be lost, so look at once for what is leased; and the claim may have been too large.
                self._counted_at, self._most = 0.0, max(1, self._most // 2)
                raise
            finally:
                await self._wakeup.detach()

    async def _claim_once(self, connection: Connection) -> None:
        if self._alone:
            await self._run_alone(self._alone.popleft())
            return
        room = self._settings.instances_in_flight - len(self._running)
        if room <= 0:
            self._room.clear()
            await self._room.wait()
            return
        if not self.heartbeat.is_held:
            await self.heartbeat.lost.wait()
        await self._count(connection)
        limit = min(room, self._most)
        leases = await journal.claim(connection, self.worker_id, limit, list(self._sagas))
        self._most = min(2 * self._most, limits.CLAIM_MAX_INSTANCES)
        for lease in leases:
            execution = Execution(self._sagas[lease.workflow_id], lease.claimed)
            name = self._sagas[lease.workflow_id].name
            runner = Runner(self._around, self.heartbeat, name, lease.claimed.id, execution)
            if lease.crash_count >= limits.ALONE_CRASH_COUNT:
                self._alone.append(runner)
            else:
                self._begin(runner)
        if leases:
            await self._wakeup.found()
        else:
            await self._wakeup.found_nothing()

    async def _count(self, connection: Connection) -> None:
        """Give back instances that are leased to this id and do not run: the reply of a claim, or a start, was lost."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._counted_at < limits.COUNT_EVERY_SECONDS:
            return
        leased = await SQL.leased.fetch(connection, self.worker_id)
        known = {*self._known, *starts_of(self._around.pool).sent, *(runner.instance_id for runner in self._alone)}
        lost = [row for row in leased if row["id"] not in known]
        if lost:
            log.warning("%s instances are leased to worker %s without its knowledge", len(lost), self.worker_id)
        for row in lost:
            await give_back(connection, row["id"], row["lease_epoch"], "a worker did not know that it has it")
        self._counted_at = loop.time()

    def _begin(self, runner: Runner) -> "asyncio.Task[None]":
        task = asyncio.create_task(runner.run())
        self._running.add(task)
        self._known[runner.instance_id] = task
        task.add_done_callback(partial(self._ended, runner.instance_id))
        return task

    def _ended(self, instance_id: UUID, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if self._known.get(instance_id) is task:
            del self._known[instance_id]
        self._room.set()

    async def _run_alone(self, runner: Runner) -> None:
        """Run an instance beside as little as possible: wait for the others for a time, and start none meanwhile."""
        if self._running:
            await asyncio.wait(self._running, timeout=limits.ALONE_WAIT_SECONDS)
        await asyncio.wait([self._begin(runner)], timeout=limits.ALONE_WAIT_SECONDS)

    # -------------------------------------------------------------------------------------------- by the clock

    async def _take_over(self) -> None:
        loop = asyncio.get_running_loop()
        swept = loop.time()
        while True:
            lost = await journal.SQL.take_over.fetch(self._around.pool, limits.TAKE_OVER_MAX_INSTANCES)
            if lost:
                log.warning("%s instances are taken over from dead workers", len(lost))
                self._wakeup.wake()
            if loop.time() - swept > limits.SWEEP_EVERY_SECONDS:
                swept = loop.time()
                await journal.SQL.sweep.fetchval(self._around.pool, limits.SWEEP_MAX_INSTANCES)
                await SQL.forget_workers.execute(self._around.pool)
            is_more = len(lost) == limits.TAKE_OVER_MAX_INSTANCES
            await asyncio.sleep(limits.TAKE_OVER_AGAIN_SECONDS if is_more else limits.TAKE_OVER_EVERY_SECONDS)

    async def _ring(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._timer.clear()
            rung = await journal.SQL.let_timers_go_off.fetchval(self._around.pool, limits.TIMERS_MAX_INSTANCES)
            if rung:
                self._wakeup.wake()
            if rung == limits.TIMERS_MAX_INSTANCES:
                continue
            following = await SQL.next_timer.fetchval(self._around.pool)
            pause = self._settings.safety_poll_seconds
            if following is not None:
                pause = min(pause, max(following, limits.TIMER_MIN_SECONDS))
            self._timer_at = loop.time() + pause
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._timer.wait()


async def _set(event: asyncio.Event) -> None:
    await event.wait()
