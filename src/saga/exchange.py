"""The exchange of a worker with other services: commands to its participants, and replies to its sagas, from Kafka.

One consumer reads both, as a member of the group `<database>.saga`; what it does with them stands in `serving` and
`replies`. Sending is the outbox's: commands are rows of the checkpoint, replies rows of the participant's transaction,
and a relay of each service publishes them.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from outbox import postgres, retry
from outbox.consumer import Consumer
from outbox.loop import Loop
from outbox.postgres import Pool
from outbox.upkeep import migrate
from saga import answering, limits, replies
from saga.definition import Saga
from saga.participant import Participant
from saga.replies import ReplyTarget
from saga.serving import ParticipantTarget
from saga.settings import Settings

if TYPE_CHECKING:
    from outbox.consumer.target import Target

log = logging.getLogger(__name__)

CONSUMER: Final = "saga"
"""Under which positions are kept."""


class Exchange(Loop):
    """Serves participants and delivers replies; several processes share the partitions.

    Needs one connection of the pool for each partition that is applied at a time; fewer only make it slower.
    """

    def __init__(
        self,
        db: Pool,
        kafka: str,
        sagas: Sequence[Saga[Any, Any]],
        participants: Sequence[Participant],
        settings: Settings | None = None,
    ) -> None:
        """For `Worker`.

        Args:
            db: a pool on the service's database.
            kafka: bootstrap servers.
            sagas: those that send commands have their replies delivered.
            participants: of this service.
            settings: from the environment (`SAGABOX_*`) where not given.

        Raises:
            SagaDeclarationError: a participant has no handlers.
        """
        self._settings = settings or Settings()
        super().__init__(drain_timeout_seconds=self._settings.drain_timeout_seconds)
        self._pool = db
        self._servers = kafka
        self._sagas = list(sagas)
        self._participants = [ParticipantTarget(participant) for participant in participants]
        self._consumer: Consumer | None = None

    @property
    def consumer(self) -> Consumer | None:
        """What reads the topics at the moment; None where there is nothing to read yet."""
        return self._consumer

    async def _main(self) -> None:
        """Read until told to stop.

        Raises:
            NotMigrated: the database lacks the tables.
        """
        async for attempt in retry.attempts(stopping=self._stopping):
            with attempt:
                await migrate.check(self._pool, package="saga")
        forgetting = asyncio.create_task(self._keep_forgetting(), name="old commands and stray replies")
        try:
            while not self._stopping.is_set():
                await self._follow(self._reply_topics())
        finally:
            forgetting.cancel()
            await asyncio.wait([forgetting])

    def _reply_topics(self) -> list[str]:
        return sorted({saga.reply_topic for saga in self._sagas if saga.has_remotes})

    async def _follow(self, reply_topics: list[str]) -> None:
        """Until told to stop, or a body has sent a command whose replies are not read yet."""
        targets: list[Target] = [*self._participants, *map(ReplyTarget, reply_topics)]
        if not targets:
            await self._until_others(reply_topics)
            return
        consumer = Consumer(self._pool, self._servers, *targets, name=CONSUMER, settings=self._settings)
        async with consumer:
            self._consumer = consumer
            others = asyncio.create_task(self._until_others(reply_topics))
            running = asyncio.create_task(consumer.run())
            try:
                await asyncio.wait([others, running], return_when=asyncio.FIRST_COMPLETED)
                consumer.stop()
                await running
            finally:
                for task in (others, running):
                    task.cancel()
                await asyncio.wait([others, running])
                self._consumer = None

    async def _until_others(self, reply_topics: list[str]) -> None:
        while not await retry.pause(limits.REMOTES_LOOK_SECONDS, self._stopping):
            if self._reply_topics() != reply_topics:
                return

    async def _keep_forgetting(self) -> None:
        while not await retry.pause(limits.FORGET_EVERY_SECONDS, self._stopping):
            await forget(self._pool)


async def forget(pool: Pool) -> int:
    """Delete commands and stray replies whose time has come, some at a time; how many went.

    After an error the next time does it.
    """
    gone = 0
    try:
        while True:
            commands: int = await answering.SQL.forget.fetchval(pool, limits.FORGET_ROWS)
            strays: int = await replies.SQL.forget_strays.fetchval(
                pool, limits.STRAYS_KEPT_DAYS, limits.STRAYS_MAX, limits.FORGET_ROWS
            )
            gone += commands + strays
            if max(commands, strays) < limits.FORGET_ROWS:
                break
    except (postgres.PostgresError, *postgres.CONNECTION_ERRORS) as error:
        log.log(
            logging.INFO if retry.is_transient(error) else logging.ERROR,
            "commands and stray replies were not forgotten: %r; again in %.0f s", error, limits.FORGET_EVERY_SECONDS,
        )  # fmt: skip
    return gone
