"""The error tree. Each error says what is wrong and what to do next."""

import enum
from typing import Final


class OutboxError(Exception):
    """Root of everything that this package raises on purpose."""


# ------------------------------------------------------------------------------------------------ emitting


class EmitError(OutboxError, ValueError):
    """An event that could never be published; raised in the caller's transaction, so that it cannot commit.

    Attributes:
        field: what is wrong: `payload`, `key`, `headers`, `topic`, `type` ...
        problem: why its value cannot be published.
        remedy: what to change.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy


class EventDeclarationError(OutboxError, TypeError):
    """An event class or one of its upcasters will not do; raised at import.

    Attributes:
        field: what is wrong: `from_version`, `upcast`.
        problem: why it cannot be.
        remedy: what to change.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy


class UpcastError(OutboxError, ValueError):
    """An event of an older version could not be brought up to date; its key is parked."""


class RecordTooLarge(EmitError):
    """The event is larger than its topic takes."""


class TransactionClosed(OutboxError):
    """The transaction has ended; open another one to emit."""


class ReceiptUnavailable(OutboxError):
    """There is no receipt: the transaction has not committed, emitted nothing, or names too many keys."""


# ------------------------------------------------------------------------------------------------ operating


class NotMigrated(OutboxError):
    """The database lacks our tables, or some migration of them; run `outbox migrate up`."""


class MigrationChanged(OutboxError):
    """An applied migration differs from the file shipped with this version; install the version that applied it."""


class MigrationBusy(OutboxError):
    """A migration could not get a lock in time and was rolled back; it can be tried again."""


class ShardUnavailable(OutboxError):
    """Another relay holds the shard's lease, or took it over; this one stands by."""


class RestoreDetected(OutboxError):
    """The database was restored, promoted or copied; nothing is published until `outbox adopt`."""


class TopicMissing(OutboxError):
    """Events wait for a topic that Kafka does not have; their keys are parked."""


# ------------------------------------------------------------------------------------------------ caches


class CacheDeclarationError(OutboxError, TypeError):
    """A cache, a handler or its table do not fit together; raised at import or when the consumer starts."""


class CacheNotFed(OutboxError):
    """No consumer has ever fed the cache's table, so a page of the owner has nothing to be merged with yet."""


class PageRefused(OutboxError):
    """A page of the owner is older than what was forgotten since it was read; read it again."""


class RebuildBusy(OutboxError):
    """Another process rebuilds this table; it goes on with that, or take over when that has stopped."""


class GenerationUnfit(OutboxError):
    """A cache cannot be rebuilt into a new generation, or has none; says why, and what to do instead."""


class OwnerRowInvalid(OutboxError, ValueError):
    """A row that the owner sent does not fit the cache's row class."""


class InboxDeclarationError(OutboxError, TypeError):
    """An inbox or one of its handlers will not do; raised at import."""


class HandlerFailed(OutboxError, ValueError):
    """A handler of an inbox raised: its batch is rolled back and done again, carefully, as with any refused value."""


class StaleReason(enum.StrEnum):
    """Why a row is not known to be as fresh as was asked for."""

    UNKNOWN = enum.auto()
    """No relay of the topic's owner has been heard of, or not all of its shards."""
    INCOMPLETE = enum.auto()
    """The owner's log is a new one, or the cache has not been filled: older rows may be missing."""
    PARKED = enum.auto()
    """An event of this key waits in parking."""
    BEHIND = enum.auto()
    """The owner's relay, Kafka or this service's consumer is behind."""


_STALE_REMEDIES: Final = {
    StaleReason.UNKNOWN: "does the owner's relay write watermarks, and does this service's consumer run?",
    StaleReason.INCOMPLETE: "run: outbox cache rebuild",
    StaleReason.PARKED: "see: outbox parked show KEY, here and at the owner",
    StaleReason.BEHIND: "does the owner's relay run? See `outbox status` on both sides, or ask for less",
}


class Stale(OutboxError):
    """The cache is not known to be as fresh as was asked for, and there is no owner to ask.

    Attributes:
        lag_seconds: how old the cache may be; `math.inf` where nothing is known.
        reason: why this row is not believed.
    """

    def __init__(self, cache: str, key: str, lag_seconds: float, reason: StaleReason) -> None:
        super().__init__(f"cache {cache}: {key} is {reason}, {lag_seconds:.1f} s old; {_STALE_REMEDIES[reason]}")
        self.lag_seconds = lag_seconds
        self.reason = reason


class ParkingFull(OutboxError):
    """A consumer has parked as many events as its bound allows; its partition stands still until some are resolved."""


class WaitTimeout(OutboxError, TimeoutError):
    """The cache did not show the receipt's event in time."""


# ------------------------------------------------------------------------------------------------ owners


class OwnerError(OutboxError):
    """The owner of a cache did not answer as it should; asking again will not help."""


class OwnerUnavailable(OwnerError):
    """The owner cannot answer now, or not from there; says what to change, or to ask later."""


class OwnerPageInvalid(OwnerError, ValueError):
    """What an owner answered is no page of this cache's rows.

    Attributes:
        key: the row's key as text; None where it is not about one row.
        field: what is wrong: a column, or a field of the page.
        problem: why its value will not do.
        remedy: what to change at the owner.
    """

    def __init__(self, key: str | None, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{'the page' if key is None else f'row {key}'}: {field}: {problem}; {remedy}")
        self.key = key
        self.field = field
        self.problem = problem
        self.remedy = remedy


class OwnerRequestInvalid(OwnerError, ValueError):
    """A request to an owner cannot be read; answer it with status 400.

    Attributes:
        field: the parameter.
        problem: why its value will not do.
        remedy: what to send.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy
