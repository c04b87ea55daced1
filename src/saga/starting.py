"""The start of a saga: its body is run to its first call in the caller's hands, before anything is written.

So the first intent is written by the start itself, which saves a checkpoint, and a saga that would fail at once fails
here: its error is the caller's, and nothing was started. The intent counts only once a worker had the instance; a
command goes out with the start.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from saga.decider import Execution
from saga.definition import Saga
from saga.errors import BodyError, Rejected
from saga.state import Claimed, Intent, Mailbox, OutboxRow


@dataclass(slots=True, kw_only=True)
class First:
    """What a start writes besides the instance itself."""

    intents: tuple[Intent, ...] = ()
    outbox: tuple[OutboxRow, ...] = ()
    execution: Execution | None = None
    """What has decided this, to go on with once it is written and leased to a worker of this process (epoch 1): the
    body need not run again. None where there is nothing to go on with."""


def first_call(saga: Saga[Any, Any], instance_id: UUID, request: str, now: datetime) -> First:
    """Run the body to its first call.

    Anything that is no plain call (a pivot, a child, a wait, an end) is left to the worker.

    Raises:
        Rejected: the body rejects this request at once.
        BodyError: the body has a bug that shows at once.
    """
    claimed = Claimed(
        id=instance_id,
        epoch=1,
        checkpoint_no=-1,  # the start itself writes what is asked for here; the checkpoint after it is the first
        fresh=True,
        state="running",
        started_at=now,
        deadline_at=now + timedelta(seconds=saga.deadline_seconds),
        request=request,
        mailbox=Mailbox(wakeups=0),
    )
    execution = Execution(saga, claimed)
    checkpoint = execution.begin(now).checkpoint
    if checkpoint is None:
        return First()
    if checkpoint.paused_reason is not None:
        raise BodyError(checkpoint.paused_reason)
    if checkpoint.ending is not None:
        raise Rejected(checkpoint.error or "")
    if checkpoint.rows or checkpoint.children:
        return First()
    first_is_held = checkpoint.held
    return First(intents=checkpoint.next, outbox=checkpoint.outbox, execution=execution if first_is_held else None)
