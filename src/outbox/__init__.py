"""Transactional outbox, its relay to Kafka, and caches fed from it."""

from outbox.cache import DELETE, Cache, Delete, Duration, Patch
from outbox.cache.http import HttpOwner
from outbox.cache.owner import Owner, OwnerPage, SqlOwner
from outbox.consumer import Consumer, Inbox
from outbox.errors import (
    CacheDeclarationError,
    EmitError,
    EventDeclarationError,
    GenerationUnfit,
    InboxDeclarationError,
    OutboxError,
    OwnerError,
    OwnerPageInvalid,
    OwnerRequestInvalid,
    OwnerUnavailable,
    ParkingFull,
    RecordTooLarge,
    RestoreDetected,
    Stale,
    StaleReason,
    WaitTimeout,
)
from outbox.event import Event, Key
from outbox.postgres import Connection, Pool
from outbox.receipt import Receipt
from outbox.relay import Relay
from outbox.transaction import Db, Transaction, transaction

__all__ = [
    "DELETE",
    "Cache",
    "CacheDeclarationError",
    "Connection",
    "Consumer",
    "Db",
    "Delete",
    "Duration",
    "EmitError",
    "Event",
    "EventDeclarationError",
    "GenerationUnfit",
    "HttpOwner",
    "Inbox",
    "InboxDeclarationError",
    "Key",
    "OutboxError",
    "Owner",
    "OwnerError",
    "OwnerPage",
    "OwnerPageInvalid",
    "OwnerRequestInvalid",
    "OwnerUnavailable",
    "ParkingFull",
    "Patch",
    "Pool",
    "Receipt",
    "RecordTooLarge",
    "Relay",
    "RestoreDetected",
    "SqlOwner",
    "Stale",
    "StaleReason",
    "Transaction",
    "WaitTimeout",
    "transaction",
]
