"""Every bound of sagas in one place."""

from typing import Final

# One saga.
NAME_MAX_BYTES: Final = 255
"""Of a saga, a step, a remote contract, a participant, a signal."""
KEY_MAX_BYTES: Final = 1_024
PAYLOAD_MAX_BYTES: Final = 1_000_000
"""Of one input, result, request or signal as JSON."""
REASON_MAX_CHARACTERS: Final = 2_000
BODY_MAX_OPERATIONS: Final = 10_000
"""Journalled operations of one instance: a body that loops without end stops here, loudly."""
PARALLEL_MAX_BRANCHES: Final = 100
CLOSE_MAX_TRIES: Final = 10
"""How often a body that will not be closed is told so."""

# Retries of a step, unless it says otherwise.
STEP_ATTEMPTS: Final = 5
STEP_TIMEOUT_SECONDS: Final = 30.0
RETRY_INITIAL_SECONDS: Final = 0.2
RETRY_MAXIMUM_SECONDS: Final = 30.0
COMPENSATION_ATTEMPTS: Final = 20
"""With the delays above about five minutes; after them a required compensation waits for a person."""
LEASE_MARGIN_SECONDS: Final = 15.0
"""How long after its lease a worker's call may still be on its way; part of `settle`."""
SUSPEND_SECONDS: Final = 1.0
"""A longer backoff is written down, and the worker forgets the instance meanwhile."""
PROBE_ATTEMPTS: Final = 5
"""How often an outcome is asked for before it is taken for unknown."""

# Waiting for a result.
RESULT_POLL_MIN_SECONDS: Final = 0.01
RESULT_POLL_MAX_SECONDS: Final = 0.5
