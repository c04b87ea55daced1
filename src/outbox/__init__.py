"""Transactional outbox, its relay to Kafka, and caches fed from it."""

from outbox.errors import EmitError, OutboxError, RecordTooLarge, RestoreDetected
from outbox.event import Event, Key
from outbox.postgres import Connection, Pool
from outbox.receipt import Receipt
from outbox.relay import Relay
from outbox.transaction import Db, Transaction, transaction

__all__ = [
    "Connection",
    "Db",
    "EmitError",
    "Event",
    "Key",
    "OutboxError",
    "Pool",
    "Receipt",
    "RecordTooLarge",
    "Relay",
    "RestoreDetected",
    "Transaction",
    "transaction",
]
