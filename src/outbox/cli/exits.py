"""What the exit codes mean, and which error ends in which. docs/operations.md repeats the table for operators."""

from enum import IntEnum
from typing import Final

from outbox import kafka, postgres
from outbox.errors import CacheNotFed, NotMigrated, OutboxError, OwnerUnavailable, RestoreDetected


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    PROBLEM = 1
    """The command failed, or `status` found something that needs a person."""
    USAGE = 2
    """The command was not understood, or needed a confirmation that it could not ask for; nothing was done."""
    REFUSED = 3
    """The database was restored, promoted or copied; a person has to decide (`outbox adopt`)."""
    NOT_READY = 4
    """PostgreSQL, Kafka or an owner cannot be reached, or something was not started or migrated; try again later."""


class UsageProblem(OutboxError):
    """A value given by flag or environment cannot be used."""


class NotReachable(OutboxError):
    """A server cannot be reached, or does not let us in."""


EXPLAINED: Final = (OutboxError, kafka.KafkaError, postgres.PostgresError, *postgres.CONNECTION_ERRORS)
"""What `explain` has a text for. Anything else is a bug, and its traceback is wanted."""

_EXITS: Final = (
    (UsageProblem, Exit.USAGE),
    (RestoreDetected, Exit.REFUSED),
    (NotMigrated, Exit.NOT_READY),
    (NotReachable, Exit.NOT_READY),
    (OwnerUnavailable, Exit.NOT_READY),
    (CacheNotFed, Exit.NOT_READY),
    (OutboxError, Exit.PROBLEM),
)
_UNDEFINED: Final = ("42P01", "3F000", "42883", "42703")
_NOT_ALLOWED: Final = "42501"


def explain(error: Exception) -> tuple[Exit, str]:
    """The exit code and the text for one of `EXPLAINED`."""
    for kind, code in _EXITS:
        if isinstance(error, kind):
            return code, str(error)
    reason = str(error) or type(error).__name__
    if isinstance(error, kafka.KafkaError):
        return Exit.NOT_READY, f"Kafka: {reason}; check KAFKA_BOOTSTRAP_SERVERS, and that the brokers run"
    if isinstance(error, postgres.PostgresError):
        return _explain_postgres(error)
    assert isinstance(error, postgres.CONNECTION_ERRORS), f"not one of EXPLAINED: {error!r}"
    return Exit.NOT_READY, f"the connection failed: {reason}; check that PostgreSQL and Kafka run, and try again"


def _explain_postgres(error: postgres.PostgresError) -> tuple[Exit, str]:
    state = postgres.sqlstate(error)
    if state in _UNDEFINED:
        return Exit.NOT_READY, f"PostgreSQL: {error}; the database lacks migrations, run: outbox migrate up"
    if state == _NOT_ALLOWED:
        return Exit.PROBLEM, f"PostgreSQL: {error}; connect as the owner of schema outbox, or grant this role access"
    if isinstance(error, postgres.CONNECTION_ERRORS):
        return Exit.NOT_READY, f"PostgreSQL: {error}; try again when the server is up"
    return Exit.PROBLEM, f"PostgreSQL: {error} (SQLSTATE {state})"
