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
RESULTS_AT_ONCE: Final = 1_000
"""Looked for in one statement."""

# Starting on a pool.
START_LOCK_SECONDS: Final = 0.2
"""How long a group of starts waits for somebody who is starting under one of its keys, before it is split."""
START_TRY_SECONDS: Final = 10.0
"""How long starts are sent again while the database is in trouble, before their callers are told."""

# Workers.
INSTANCES_IN_FLIGHT: Final = 2_000
CLAIM_MAX_INSTANCES: Final = 500
"""Claimed in one statement: a worker that starts among thousands of ready instances takes them in turns."""
TAKE_OVER_MAX_INSTANCES: Final = 2_000
"""Taken from dead workers in one statement."""
TAKE_OVER_EVERY_SECONDS: Final = 0.5
TAKE_OVER_AGAIN_SECONDS: Final = 0.1
"""Where there were as many as that, and there may be more."""
COUNT_EVERY_SECONDS: Final = 15.0
"""Between two looks for instances that are leased to a worker without its knowledge."""
SWEEP_EVERY_SECONDS: Final = 30.0
"""Between two looks for what a crash left undone of instances that have ended."""
SWEEP_MAX_INSTANCES: Final = 500
TIMERS_MAX_INSTANCES: Final = 1_000
IDLE_POLL_SECONDS: Final = 0.25
"""Between two looks of an idle worker while another one is the one that is notified."""
HAND_OVER_SECONDS: Final = 0.4
CUT_OFF_SECONDS: Final = 0.1
"""For calls that are cut off to come to an end."""
ALONE_CRASH_COUNT: Final = 2
"""An instance that was lost so often without progress runs while nothing else does: it may be what kills the worker."""
ALONE_WAIT_SECONDS: Final = 30.0
"""How long it waits for others to end first, and others for it."""
TIMER_MIN_SECONDS: Final = 0.005
"""Between two looks at timers: those that go off close to each other are found together."""
LOOP_STALL_SECONDS: Final = 1.0
"""An event loop that stands still for longer is complained of, with the line that it is at."""
LOOP_STALL_MAX_SECONDS: Final = 60.0
"""After that the worker counts as dead, although its process lives."""

# Group commit.
GROUP_MAX_INSTANCES: Final = 500
GROUP_SPLIT_INSTANCES: Final = 64
"""Where more than so many wait, half of them are sent at a time."""
GROUP_MAX_BYTES: Final = 4_194_304
LOCKED_WAIT_SECONDS: Final = 1.0
"""How long a checkpoint waits for the row of its instance at a time, while somebody else has it locked."""
LOCKED_AT_ONCE: Final = 2
"""Such checkpoints that wait at a time, each on a connection of its own."""

# Transactional steps.
TRANSACTIONS_AT_ONCE: Final = 8
"""Transactional steps of one worker at a time, each on a connection of its own."""
TRANSACTIONAL_ATTEMPTS: Final = 20
"""Of a transactional step whose transaction was rolled back by a conflict or a lost connection, before it pauses."""

# Participants.
COMMAND_ATTEMPTS: Final = 5
"""Of a command whose handler fails: tried after 1, 2, 4 and 8 s again, then its failure is the answer."""
COMMAND_TIMEOUT_SECONDS: Final = 20.0
"""For one call of a handler, which holds the transaction of a batch; less where the contract waits for less."""
COMMAND_STRIKES: Final = 3
"""So often a command may take its whole batch with it, by an error of the database; then its failure is the answer."""
COMMANDS_STRUCK_MAX: Final = 1_000
"""Such commands that a process remembers."""
COMMANDS_KEPT_DAYS: Final = 7
"""Tombstones and answers stay so long after the last word about them."""
COMMAND_MAX_AGE_DAYS: Final = 6
"""An older do is refused: its tombstone may be gone. The day in between is for clocks that differ."""
COMMANDS_UNDOABLE_DAYS: Final = 30
"""What can be undone stays so long after the deadline of its saga."""
STRAYS_KEPT_DAYS: Final = 30
STRAYS_MAX: Final = 10_000
"""Replies that fit nothing; beyond that the oldest go."""
FORGET_ROWS: Final = 5_000
"""Deleted in one statement."""
FORGET_EVERY_SECONDS: Final = 60.0
COMMANDS_CAREFUL_BATCHES: Final = 50
"""After a refusal or a failure so many batches take a savepoint for each command from the start."""
PATH_MAX_BYTES: Final = 1_024
"""Of a step in a reply that is taken for one."""
REMOTES_LOOK_SECONDS: Final = 1.0
"""Between two looks at whether a saga has turned out to send commands."""
