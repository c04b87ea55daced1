"""The consumer: follows topics, keeps caches and feeds inboxes, as a member of a Kafka consumer group.

    Kafka --(FastStream: rebalance)--> lanes: claim, feed, claim again --> apply: one transaction a batch --> PostgreSQL
                                                                             |-> poison: merge, bisect, park
                                                                             |-> deliver: handlers, park

The group only says who reads which partition. Where reading goes on is a row of `outbox.positions`, moved by the very
transaction that applies a batch; Kafka's committed offset is for lag tools. Partitions are applied side by side, each
by one transaction at a time.

Guarantees (each stands in the module that keeps it):

* effects once, in order, by one owner, zombies included: `apply`;
* work resumes by itself after any error, a rebalance or a kill, and stands still, loudly, only where going on would be
  wrong: a re-created topic, records that Kafka deleted, a full park: `lanes`;
* a poison event parks its own key: `poison`, `deliver`; it is tried again by whoever owns its partition: `retries`;
* an inbox has each message once, also one that comes again elsewhere: `messages`;
* how fresh all this is, is known, and by whose word: `watermarks`.
"""

import asyncio
import logging
import os
import socket
from typing import TYPE_CHECKING, Any, Self

from outbox import kafka, postgres, retry
from outbox.cache import Cache
from outbox.consumer import messages
from outbox.consumer.apply import Engine, Outcome
from outbox.consumer.bootstrap import keep_complete
from outbox.consumer.inbox import Inbox
from outbox.consumer.lane import State
from outbox.consumer.target import Target
from outbox.consumer.watermarks import Watermarks
from outbox.errors import CacheDeclarationError, InboxDeclarationError
from outbox.loop import Loop
from outbox.postgres import Pool
from outbox.settings import Settings
from outbox.upkeep import migrate
from outbox.upkeep.topics import Use, report

if TYPE_CHECKING:
    from outbox.consumer.rebalance import Membership

__all__ = ["Consumer", "Inbox", "Outcome", "State"]

log = logging.getLogger(__name__)


class Consumer(Loop):
    """Keeps caches up to date and feeds inboxes; several processes with the same group share the partitions.

        async with asyncpg.create_pool(dsn) as pool, Consumer(pool, "kafka:9092", agents):
            yield

    Needs one connection of the pool for each partition that is applied at a time; fewer only make it slower.
    """

    def __init__(
        self,
        db: Pool,
        kafka: str,
        *targets: Cache[Any] | Inbox | Target,
        group: str | None = None,
        name: str | None = None,
        settings: Settings | None = None,
    ) -> None:
        """A consumer that feeds `targets` in `db` from the Kafka brokers named in `kafka`.

        Args:
            db: a pool on the service's database.
            kafka: bootstrap servers.
            targets: caches, inboxes, and what other packages feed; several may read one topic.
            group: consumer group, under which positions are kept too. Where not given, positions are kept under the
                first target's table or name, and the group's name has the database's in front, because two services
                that read a topic may call their tables the same. A target that joins an existing group begins where the
                group stands: to read from the start it needs a consumer of its own.
            name: where no group is given, used in place of the first target's name.
            settings: from the environment (`SAGABOX_*`) where not given.

        Raises:
            CacheDeclarationError: no target, a cache without handlers, or two targets of one name.
            InboxDeclarationError: an inbox without handlers.
        """
        self._settings = settings or Settings()
        super().__init__(drain_timeout_seconds=self._settings.drain_timeout_seconds)
        _check_targets(targets)
        self.name = group or name or _name(targets[0])
        """The consumer's name in outbox.positions."""
        self._group = group
        self._pool = db
        self._servers = kafka
        self._topics = sorted({target.topic for target in targets})
        self._engine = Engine(db, self.name, f"{socket.gethostname()}:{os.getpid()}", targets)
        needing = {target.topic for target in targets if _needs_every_record(target)}
        self._uses = {topic: Use(needs_every_record=topic in needing) for topic in self._topics}
        self._owned = [target for target in targets if isinstance(target, Cache) and target.owner is not None]
        self._has_inboxes = any(isinstance(target, Inbox) for target in targets)
        self._membership: Membership | None = None
        self._prepared = False

    @property
    def states(self) -> dict[tuple[str, int], State]:
        """How each partition is that this process has now, by topic and number."""
        lanes = self._membership.lanes.states if self._membership else {}
        return {(at.topic, at.partition): state for at, state in lanes.items()}

    @property
    def totals(self) -> Outcome:
        """What became of records since the start of this process."""
        return self._membership.lanes.totals if self._membership else Outcome()

    async def __aenter__(self) -> Self:
        """Check the declarations, if the database answers, and start.

        Raises:
            CacheDeclarationError: a cache does not fit its table.
            NotMigrated: the database lacks our tables.
        """
        try:
            await self._prepare()
        except Exception as error:
            if not retry.is_transient(error):
                raise
            log.warning("the database does not answer (%r); the consumer starts as soon as it does", error)
        return await super().__aenter__()

    async def _prepare(self) -> None:
        await migrate.check(self._pool)
        await self._engine.prepare()
        self._group = self._group or f"{await self._engine.database()}.{self.name}"
        self._prepared = True

    async def _main(self) -> None:
        try:
            async for attempt in retry.attempts(stopping=self._stopping):
                with attempt:
                    if not self._prepared:
                        await self._prepare()
        except postgres.CONNECTION_ERRORS:
            return  # stopped before the database answered
        watermarks = Watermarks(self._pool, self._servers, self.name, self._topics, self._settings)
        beside = {
            asyncio.create_task(self._keep_rotating(), name="message ids of inboxes"),
            asyncio.create_task(watermarks.keep_following(self._stopping), name=f"freshness of {self.name}"),
            asyncio.create_task(report(self._servers, self._uses), name="settings of topics"),
            asyncio.create_task(keep_complete(self._pool, self._owned, self._stopping), name="bootstrap of caches"),
        }
        try:
            await self._follow()
        finally:
            for task in beside:
                task.cancel()
            await asyncio.wait(beside)

    async def _keep_rotating(self) -> None:
        if self._has_inboxes:
            await messages.keep_rotating(self._pool, self._stopping)

    async def _follow(self) -> None:
        assert self._group is not None
        pauses = retry.backoff()
        while not self._stopping.is_set():
            # Here, so that a relay or a command does not spend memory and start-up time on FastStream.
            from outbox.consumer.rebalance import Membership

            membership = Membership(self._engine, self._servers, self._group, self._topics, self._settings)
            try:
                await membership.start()
            except (kafka.KafkaError, *postgres.CONNECTION_ERRORS) as error:
                log.warning("Kafka does not answer: %r", error)
                await retry.pause(next(pauses), self._stopping)
                continue
            self._membership = membership
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(membership.lanes.keep_committing(self._stopping), name="offsets for lag tools")
                    group.create_task(membership.lanes.keep_retrying(self._stopping), name="parked keys")
            finally:
                await membership.stop()


def _check_targets(targets: tuple[Cache[Any] | Inbox | Target, ...]) -> None:
    if not targets:
        raise CacheDeclarationError("a consumer needs at least one cache or inbox: Consumer(pool, servers, cache)")
    for target in targets:
        if not isinstance(target, Cache | Inbox) or target.handlers:
            continue
        if isinstance(target, Inbox):
            raise InboxDeclarationError(f"inbox {target.name} has no handlers; register them with @inbox.on first")
        raise CacheDeclarationError(f"cache {target.table} has no handlers; register them with @cache.on first")
    if len({_name(target) for target in targets}) < len(targets):
        raise CacheDeclarationError(
            "two caches name the same table, or an inbox is called like another one or like a cache's table; "
            "give each a name of its own"
        )


def _needs_every_record(target: Cache[Any] | Inbox | Target) -> bool:
    return not isinstance(target, Cache) or any(handler.may_patch for handler in target.handlers.values())


def _name(target: Cache[Any] | Inbox | Target) -> str:
    return target.table if isinstance(target, Cache) else target.name
