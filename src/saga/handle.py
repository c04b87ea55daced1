"""Starting a saga, and what a caller does with it: wait for its result, send it a signal, cancel it."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Generic, NoReturn
from uuid import UUID

from typing_extensions import TypeVar

from outbox import Connection, Db, Duration, Pool, Transaction, clock, codec, postgres
from saga import journal, limits
from saga.codec import Value
from saga.context import seconds
from saga.definition import Saga
from saga.errors import Conflict, Failed, NotFound, NotWaiting, ResultTimeout, SagaError
from saga.results import Standing, standings, wait_for_end
from saga.run import Signal
from saga.starting import first_call
from saga.starts import starts_of
from saga.state import ENDED

A = TypeVar("A")
R = TypeVar("R")


class Handle(Generic[R]):
    """One instance of a saga, by its key."""

    def __init__(self, saga: Saga[Any, R], db: Db, key: str, instance_id: UUID | None = None) -> None:
        """For `Saga.start` and `Saga.handle`."""
        self._saga: Final = saga
        self._db: Final = db
        self.key: Final = key
        self._id = instance_id

    @property
    def id(self) -> UUID:
        """The instance's id.

        Raises:
            NotFound: this handle was made from a key alone, and nothing has been asked with it yet.
        """
        if self._id is None:
            raise NotFound(f"the id of {self._saga.name} {self.key!r} is not known before its result was asked for")
        return self._id

    async def result(self, *, timeout: Duration) -> R:
        """What the saga returned; waits for its end. It goes on, whether somebody waits or not.

        Give a pool rather than a connection: between two looks the connection is free for others.

        Raises:
            Failed: it failed or was cancelled, and what it had done was undone.
            ResultTimeout: it has not ended in time; says where it stands.
            NotFound: nothing was started under this key.
        """
        where = target(self._db)
        standing = await (
            wait_for_end(where, self._saga.name, self.key, self._id, seconds(timeout))
            if postgres.is_pool(where)
            else self._poll(where, seconds(timeout))
        )
        if standing is None:
            self._not_found()
        self._id = standing.id
        match standing.state:
            case "completed":
                return self._saga.result.decode(standing.output or "null")
            case "failed" | "cancelled":
                raise Failed(standing.state, standing.error or "")
        why = f" ({standing.paused_reason})" if standing.paused_reason else ""
        raise ResultTimeout(
            f"{self._saga.name} {self.key!r} is {standing.state}{why} after {seconds(timeout):g} s; ask again, "
            f"or see: saga why {standing.id}"
        )

    async def _poll(self, connection: Connection, timeout_seconds: float) -> Standing | None:
        """A connection cannot be shared with others who wait."""
        until = clock.monotonic() + timeout_seconds
        pause = limits.RESULT_POLL_MIN_SECONDS
        while True:
            [standing] = await standings(connection, [(self._saga.name, self.key)])
            left = until - clock.monotonic()
            if standing is None or standing.state in ENDED or left <= 0:
                return standing
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 1.5, limits.RESULT_POLL_MAX_SECONDS)

    async def signal(self, signal: Signal, *, dedupe_key: str | None = None) -> None:
        """Send a signal. Inside a transaction it is sent if that commits, and its row is locked until then.

        Args:
            signal: of the class that the saga receives.
            dedupe_key: a second signal of the class under the same key changes nothing.

        Raises:
            NotFound: nothing was started under this key.
            NotWaiting: the saga has ended.
        """
        payload = Value[Signal](type(signal), f"signal {type(signal).__name__}").encode(signal)
        name = type(signal).__name__
        answer = await journal.SQL.signal.fetchval(
            target(self._db), self._saga.name, self.key, name, dedupe_key, payload
        )
        self._check(answer)

    async def cancel(self, reason: str) -> None:
        """Ask for a cancel: what has happened is undone, unless the pivot is behind it; then it is only recorded.

        Raises:
            NotFound: nothing was started under this key.
            NotWaiting: the saga has ended.
        """
        reason = reason.replace("\x00", "\\x00")[: limits.REASON_MAX_CHARACTERS] or "cancelled"
        answer = await journal.SQL.cancel.fetchval(target(self._db), self._saga.name, self.key, reason)
        self._check(answer)

    @property
    def _place(self) -> str:
        return f"{self._saga.name}/{self.key}"

    def _check(self, answer: str) -> None:
        if answer == "unknown":
            self._not_found()
        if answer == "ended":
            raise NotWaiting(f"{self._saga.name} {self.key!r} has ended; see: saga show {self._id or self._place}")

    def _not_found(self) -> NoReturn:
        raise NotFound(f"no {self._saga.name} was started under the key {self.key!r}, or its start has not committed")


async def start(saga: Saga[A, R], db: Db, request: A, key: str | None) -> Handle[R]:
    """For `Saga.start`."""
    instance_id = codec.uuid7()
    key = str(instance_id) if key is None else _checked(key)
    now = wall()
    text, digest = saga.request.recognise(request)
    new = journal.Start(
        id=instance_id,
        saga=saga,
        key=key,
        digest=digest,
        request=text,
        started_at=now,
        deadline_at=now + timedelta(seconds=saga.deadline_seconds),
        first=first_call(saga, instance_id, text, now),
    )
    where = target(db)
    if postgres.is_pool(where):
        found, answer = await starts_of(where).submit(new)
    else:
        ((found, answer),) = await journal.start(where, [new])
    if answer == "conflict":
        raise Conflict(
            f"{saga.name} was started under the key {key!r} with another request; use another key, or send the same"
        )
    if answer == "unseen":
        raise SagaError(
            f"{saga.name} was started under the key {key!r} after this transaction began; try the transaction again"
        )
    return Handle(saga, db, key, found)


def wall() -> datetime:
    """Now, as the journal has it."""
    return datetime.fromtimestamp(clock.wall(), tz=UTC)


def target(db: Db) -> Pool | Connection:
    """What to run a statement on: a transaction's connection while it is open, its pool once it has ended."""
    if not isinstance(db, Transaction):
        return db
    return db.connection if db.is_open or db.pool is None else db.pool


def _checked(key: str) -> str:
    size_bytes = len(key.encode("utf-8", "surrogatepass"))
    if not 1 <= size_bytes <= limits.KEY_MAX_BYTES or "\x00" in key:
        raise SagaError(
            f"key {key!r}: has {size_bytes} bytes; use a text of 1 to {limits.KEY_MAX_BYTES}, without U+0000"
        )
    return key
