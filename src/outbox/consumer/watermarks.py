"""How far the owners' relays got, as far as this consumer has applied it: `outbox.freshness`, and what comes of it.

    watermark topic --follow--> outbox.watermarks --advance--> outbox.freshness --> get(fresh_within=...)
                                 (pending, thinned)   ^                        +--> forget: pages, deletions
                                 outbox.positions ----+

Each process of a consumer group follows the topic by itself, without a group, and does the same: rows that are there
already are not written twice, and who comes second finds nothing to do. None has to be elected, and none is missed.

Guarantees:

* A topic is fresh as of the oldest of its owner's shards, each as of the newest watermark of which this consumer has
  applied every partition. A shard that nobody has heard of, a partition without a position, one that stands still:
  not fresh. Freshness never goes back within a log, and a newer log's replaces it.
* Watermarks are only ever evidence. One that cannot be read, or that is ahead of the clock, is left out; a crash at any
  line loses at most what the next one says again.
* What pages and deletions are remembered for ends when everything that was under way is applied; the floor that rises
  in the same transaction keeps out pages that would have had to be compared with them.
* Nothing here stops the consumer: without Kafka or its topic, caches only get older.
"""

import asyncio
import json
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from outbox import clock, kafka, limits, postgres, retry
from outbox.cache.pages import SQL as PAGES
from outbox.postgres import Pool
from outbox.settings import Settings

log = logging.getLogger(__name__)
SQL: Final = postgres.Statements("outbox", "consumer/watermarks.sql")

_KEY: Final = re.compile(rb"([0-9a-f]{1,15}-[0-9a-f]{4})/([0-9]{1,2})")
_ADVANCE_EVERY_SECONDS: Final = 1.0
_ADVANCE_AGAIN_SECONDS: Final = 0.1
"""While a watermark waits for records that are on their way."""
_REST: Final = 19
"""Times as long as it took; so at most a twentieth of the time is spent on freshness."""
_REST_MAX_SECONDS: Final = 3.0
_MISSING_TOPIC_MAX_SECONDS: Final = 5.0
_LOCK_MILLISECONDS: Final = 1_000
_INT64_MAX: Final = 2**63 - 1

_Int64 = Annotated[int, Field(ge=-(2**63), le=_INT64_MAX)]
_Count = Annotated[int, Field(ge=0, le=_INT64_MAX)]
_Topic = Annotated[str, Field(pattern=r"^[a-zA-Z0-9._-]{1,249}$")]
_Partition = Annotated[int, Field(ge=0, lt=2**31)]


class Watermark(BaseModel):
    """What a relay says; see `relay.watermark`."""

    as_of: AwareDatetime
    oldest_xid: _Count
    shard: Annotated[int, Field(ge=0, le=63)]
    shard_count: Annotated[int, Field(ge=1, le=64)]
    next_offsets: dict[_Topic, dict[_Partition, _Count]]
    parked: Annotated[list[_Int64], Field(max_length=limits.WATERMARK_MAX_PARKED)]


class Watermarks:
    """One consumer's freshness, from the start of a process to its end."""

    def __init__(self, pool: Pool, servers: str, consumer: str, topics: Sequence[str], settings: Settings) -> None:
        """Of the topics that `consumer` reads."""
        self._pool = pool
        self._servers = servers
        self._consumer = consumer
        self._topics = list(topics)
        self._settings = settings
        self._forget_at = 0.0
        self._refusing = False

    async def keep_following(self, stopping: asyncio.Event) -> None:
        """Follow the relays until told to stop; what fails is tried again, with backoff."""
        pauses = retry.backoff(maximum=_MISSING_TOPIC_MAX_SECONDS)
        while not stopping.is_set():
            try:
                async with kafka.Tail(self._servers, wait_seconds=self._settings.fetch_wait_seconds) as tail:
                    if await self._begin(tail):
                        pauses = retry.backoff(maximum=_MISSING_TOPIC_MAX_SECONDS)
                        await self._follow(tail, stopping)
            except Exception as error:  # whatever it was, caches only count as older than they are
                if retry.is_transient(error) or isinstance(error, kafka.KafkaError):
                    log.warning("watermarks of topic %s: %r; tried again", self._settings.watermark_topic, error)
                else:
                    log.critical("freshness of consumer %s stands still: %r", self._consumer, error, exc_info=error)
            await retry.pause(next(pauses), stopping)

    async def _begin(self, tail: kafka.Tail) -> bool:
        """Go to the newest watermarks; whether the topic exists. Shards that live say soon what older ones said."""
        topic = self._settings.watermark_topic
        found = (await tail.ends(topic, 1)).get(0)
        if found is None:
            return False
        first, end = found
        tail.go_to(topic, 0, max(first, end - limits.WATERMARKS_READ_AT_START))
        return True

    async def _follow(self, tail: kafka.Tail, stopping: asyncio.Event) -> None:
        wait_seconds = 0.0
        while not stopping.is_set():
            records = await tail.poll(wait_seconds)
            started = clock.monotonic()
            is_waiting = await self.take(records)
            await self._forget_if_due()
            wait_seconds = _ADVANCE_AGAIN_SECONDS if is_waiting else _ADVANCE_EVERY_SECONDS
            # Where much waits, as it does while the consumer lags, it costs more, and is worth less.
            await retry.pause(min(_REST * (clock.monotonic() - started), _REST_MAX_SECONDS), stopping)

    async def take(self, records: Iterable["kafka.ConsumerRecord"]) -> bool:
        """Store watermarks and move freshness on; whether some wait to be applied.

        Raises:
            PostgresError, OSError, TimeoutError: nothing is known to be stored; they come again.
        """
        said = [found for record in records if (found := self._read(record)) is not None]
        async with postgres.acquire(self._pool) as connection, postgres.transact(connection):
            await SQL.take_turn.execute(connection, self._consumer)
            if said:
                skew = self._settings.max_clock_skew_seconds
                await SQL.store.execute(connection, self._consumer, json.dumps(said), self._topics, skew)
                await SQL.thin.execute(connection, self._consumer, limits.WATERMARKS_PENDING_MAX)
            return bool(
                await SQL.advance.fetchval(
                    connection, self._consumer, self._topics, self._settings.max_clock_skew_seconds
                )
            )

    def _read(self, record: "kafka.ConsumerRecord") -> dict[str, Any] | None:
        """A watermark as it is stored; None where it is none, or where the clock that wrote it is not to be trusted."""
        key = _KEY.fullmatch(record.key or b"")
        try:
            said = Watermark.model_validate_json(record.value or b"")
        except ValidationError:
            return None
        if key is None or int(key[2]) != said.shard or said.shard >= said.shard_count:
            return None
        ahead_seconds = said.as_of.timestamp() - record.timestamp / 1000
        is_refused = ahead_seconds > self._settings.max_clock_skew_seconds + 0.001  # the record's is whole milliseconds
        if is_refused and not self._refusing:
            log.error(
                "watermarks of log %s are left out: its database's clock is %.1f s ahead of its relay's, and "
                "max_clock_skew_seconds is %s; set the clocks right",
                key[1].decode(),
                ahead_seconds,
                self._settings.max_clock_skew_seconds,
            )
        self._refusing = is_refused
        return None if is_refused else {"log_id": key[1].decode(), **said.model_dump(mode="json")}

    async def _forget_if_due(self) -> None:
        if clock.monotonic() < self._forget_at:
            return
        self._forget_at = clock.monotonic() + limits.FORGET_EVERY_SECONDS
        try:
            if max(await self.forget()) >= limits.FORGET_MAX_ROWS:
                self._forget_at = 0.0  # there is more
        except postgres.PostgresError as error:
            if not retry.is_transient(error):
                raise
            log.info("consumer %s: a cache is busy, and forgets another time: %r", self._consumer, error)

    async def forget(self, *, kept_seconds: float = limits.FORGET_AFTER_SECONDS) -> tuple[int, int]:
        """Drop pages and deletions that can never decide anything again; how many of each.

        Raises:
            PostgresError: somebody holds a cache's lock (55P03), say; nothing was dropped of that one.
        """
        pages = tombstones = 0
        for row in await SQL.forgettable.fetch(self._pool, self._consumer, kept_seconds):
            async with postgres.acquire(self._pool) as connection, postgres.transact(connection):
                await SQL.impatient.execute(connection, str(_LOCK_MILLISECONDS))
                await PAGES.lock_alone.execute(connection, row["name"])
                dropped = await SQL.forget.fetchrow(connection, row["name"], kept_seconds, limits.FORGET_MAX_ROWS)
            assert dropped is not None, "two counts are one row"
            pages, tombstones = pages + dropped["pages"], tombstones + dropped["tombstones"]
        return pages, tombstones
