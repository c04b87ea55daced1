"""The worker: claims instances, drives each to where it has to wait, and undoes what has to be undone.

    claim -> run the body to its next call -> checkpoint (result n, intent n + 1) -> call -> checkpoint ... -> released
      ^                                                                                                          |
      +---- a timer, a signal, a reply, a cancel, a dead worker -------------------------------------------------+

Guarantees:

* Nothing outside happens before its intent is committed, and nothing at all once the worker's lease is past by its own
  clock (`lease`, `runner`). So a call that the journal does not know of cannot have happened.
* One round trip and at most one commit for an external step; under load many instances share a commit (`writer`).
* A transactional step and its checkpoint commit together (`transactional`).
* What a dead worker had goes on elsewhere within the length of a lease; a worker that stops hands over at once
  (`tenure`). Whatever a former owner still writes is fenced off by the instance's epoch; results of its calls are kept
  as late ones.
* A bound for everything: instances in flight, claims, groups, waits (`limits`).

What a crash does, by the line that it comes at: before a claim is committed nothing is claimed; after it the instance
is an orphan until the worker's row runs out. Before a checkpoint is committed the call before it counts as one that may
have happened; after it, it has. There is nothing else to lose: a worker keeps no state but what the journal has.
"""

import asyncio
import logging
from typing import Any, Final

from outbox import garbage, postgres, retry
from outbox.loop import Loop
from outbox.postgres import Pool
from outbox.upkeep import migrate
from saga import limits
from saga.definition import Saga
from saga.errors import WorkerError
from saga.exchange import Exchange
from saga.participant import Participant
from saga.runner import Surroundings
from saga.settings import Settings
from saga.tenure import Tenure
from saga.writer import Writer

log = logging.getLogger(__name__)
SQL: Final = postgres.Statements("saga", "worker.sql")

_CONNECTIONS_HELD: Final = 2 + limits.LOCKED_AT_ONCE + 2
"""The writer's, the one that claims and listens; for locked instances; for takeover, timers and looks."""


class Worker(Loop):
    """Runs sagas; further workers share the work and take over from each other.

        async with asyncpg.create_pool(dsn) as pool, Worker(pool, "kafka:9092", place_order, deps=services) as worker:
            await worker.run()

    Holds two connections of the pool and uses up to eight more for a short time each; the heartbeat has another.
    One more for each partition of commands and replies makes these quicker.
    """

    def __init__(
        self,
        db: Pool,
        kafka: str,
        *served: Saga[Any, Any] | Participant,
        deps: object = None,
        settings: Settings | None = None,
    ) -> None:
        """A worker for some sagas, and for participants in those of others.

        Args:
            db: a pool on the service's database; direct, not through a transaction pooler, or see `Settings.wakeup`.
            kafka: bootstrap servers.
            served: sagas; instances of others, and of other versions, are left to other workers. And participants:
                commands to this service.
            deps: what steps get as `ctx.deps`.
            settings: from the environment (`SAGABOX_*`) where not given.

        Raises:
            WorkerError: nothing is served, one twice, or the pool is too small.
            SagaDeclarationError: a participant has no handlers.
        """
        self._settings = settings or Settings()
        super().__init__(drain_timeout_seconds=self._settings.drain_timeout_seconds + self._settings.hand_over_seconds)
        self.servers: Final = kafka
        self._sagas = {saga.workflow_id: saga for saga in served if isinstance(saga, Saga)}
        participants = {one.name: one for one in served if isinstance(one, Participant)}
        spare = db.get_max_size() - _CONNECTIONS_HELD
        if not served or len(self._sagas) + len(participants) < len(served):
            problem = "is empty" if not served else "names one twice"
            raise WorkerError("served", problem, "name each saga and each participant once")
        if spare < 1:
            raise WorkerError(
                "db", f"is a pool of {db.get_max_size()} connections", f"let it have {_CONNECTIONS_HELD + 1} at least"
            )
        self._pool = db
        self._exchange = Exchange(db, kafka, list(self._sagas.values()), list(participants.values()), self._settings)
        self._deps = deps
        self._transactions = min(spare, limits.TRANSACTIONS_AT_ONCE)
        self._running: set[asyncio.Task[None]] = set()
        self.writer: Final = Writer(db)
        """Counts checkpoints and the statements that carried them."""

    @property
    def in_flight(self) -> int:
        """Instances that it runs now."""
        return len(self._running)

    async def _main(self) -> None:
        """Serve until told to stop.

        Raises:
            NotMigrated: the database lacks the tables of sagas.
        """
        async for attempt in retry.attempts(stopping=self._stopping):
            with attempt:
                await migrate.check(self._pool, package="saga")
                for saga in self._sagas.values():
                    await SQL.register_saga.execute(self._pool, saga.workflow_id, saga.name, saga.version)
        async with self._exchange as exchange:
            writing = asyncio.create_task(self.writer.run(), name="checkpoints")
            reading = asyncio.create_task(exchange.run(), name="commands and replies")
            for task in (writing, reading):
                task.add_done_callback(lambda _: self.stop())  # it ends by itself only with an error, raised below
            try:
                with garbage.seldom():
                    await (self._serve() if self._sagas else self._stopping.wait())
            finally:
                exchange.stop()
                await self._cut_off()
                writing.cancel()
                await asyncio.wait([writing, reading])
        for task in (writing, reading):
            if not task.cancelled():
                task.result()

    async def _serve(self) -> None:
        pauses = retry.backoff(maximum=self._settings.worker_lease_seconds)
        while not self._stopping.is_set():
            tenure: Tenure
            around = Surroundings(
                pool=self._pool,
                writer=self.writer,
                deps=self._deps,
                stopping=self._stopping,
                transactions=asyncio.Semaphore(self._transactions),
                timer_set=lambda seconds: tenure.timer_set(seconds),  # noqa: B023, PLW0108 - bound once, a line below
            )
            tenure = Tenure(around, self._sagas, self._settings, self._running)
            try:
                await tenure.serve()
            except (postgres.PostgresError, *postgres.CONNECTION_ERRORS) as error:
                if not retry.is_transient(error):
                    raise
                log.warning("worker %s: %r; starting again", tenure.worker_id, error)
                await retry.pause(next(pauses), self._stopping)
            finally:
                if self._stopping.is_set():
                    await self._finish()
                await tenure.hand_over()

    async def _finish(self) -> None:
        """Let calls under way end, for a moment; then cut them off."""
        if self._running:
            await asyncio.wait(self._running, timeout=self._settings.hand_over_seconds)
        await self._cut_off()

    async def _cut_off(self) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        if running:
            _, stubborn = await asyncio.wait(running, timeout=2 * limits.CUT_OFF_SECONDS)
            if stubborn:
                log.warning("%s calls do not let themselves be cut off; they are left behind", len(stubborn))
