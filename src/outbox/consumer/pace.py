"""How many records of a partition go into one transaction: all that a poll brought, unless that takes too long.

A batch has `limits.BATCH_TIMEOUT_SECONDS`. Where an inbox's handlers are slow, or the server is, a whole poll may never
fit, and trying it again and again would come to nothing. So a batch that runs out of time halves the next ones of its
partition, down to a single record, and batches that have time to spare double them again.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from outbox import clock, limits
from outbox.consumer.record import Record

log = logging.getLogger(__name__)

_SPARE: Final = 8
"""Batches twice as large have time enough after one that took less than this part of it."""


class Pace:
    """Of one partition, as long as this process has it."""

    def __init__(self) -> None:
        """All at once."""
        self.records = limits.CONSUMER_MAX_RECORDS

    def portions(self, records: Sequence[Record]) -> Iterator[Sequence[Record]]:
        """What a poll brought, a transaction's worth at a time."""
        start = 0
        while start < len(records):
            size = self.records
            yield records[start : start + size]
            start += size

    @contextmanager
    def timed(self, records: int) -> Iterator[None]:
        """Around the transaction of so many records: learns from how long it takes."""
        began = clock.monotonic()
        try:
            yield
        except TimeoutError:
            self.records = max(records // 2, 1)
            log.warning("a batch of %d records ran out of time: %d at a time from now on", records, self.records)
            raise
        if (
            self.records < limits.CONSUMER_MAX_RECORDS
            and clock.monotonic() - began < limits.BATCH_TIMEOUT_SECONDS / _SPARE
        ):
            self.records = min(self.records * 2, limits.CONSUMER_MAX_RECORDS)
