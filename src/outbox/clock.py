"""The only place that reads clocks, so that tests can own them.

Leases use the monotonic clock of this process against a deadline granted by the database; wall-clock time is for
people.
"""

import time
from collections.abc import Callable

monotonic: Callable[[], float] = time.monotonic
"""Seconds; for deadlines and durations within this process."""

wall: Callable[[], float] = time.time
"""Seconds since the epoch; for display and for identifiers, never for decisions."""
