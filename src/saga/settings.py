"""Settings of workers from `SAGABOX_*` environment variables, on top of those of the outbox."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

import outbox.settings
from saga import limits


class Settings(outbox.settings.Settings):
    """What an operator may change. Durations are seconds, sizes bytes."""

    worker_lease_seconds: Annotated[float, Field(ge=1.0, le=limits.LEASE_MARGIN_SECONDS)] = 4.0
    """How long a worker may be silent before others take its sagas over."""
    instances_in_flight: Annotated[PositiveInt, Field(le=100_000)] = limits.INSTANCES_IN_FLIGHT
    """Sagas that one worker runs at a time; those that wait for a timer, a signal or a reply do not count."""
    hand_over_seconds: PositiveFloat = limits.HAND_OVER_SECONDS
    """How long calls under way may take to end when a worker stops; then they are cut off, and count as unknown."""
