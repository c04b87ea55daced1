"""Sagas on top of the outbox: steps that commit locally, and compensations that undo them.

The package may import `outbox`; `outbox` never imports it.
"""

from saga.context import NotDone, Retry, StepContext, Unknown
from saga.definition import Saga, saga
from saga.errors import (
    BodyError,
    Conflict,
    Failed,
    NotFound,
    NotWaiting,
    PayloadError,
    Rejected,
    ResultTimeout,
    SagaDeclarationError,
    SagaError,
)
from saga.handle import Handle
from saga.participant import Handler, Participant
from saga.remote import Remote, remote
from saga.run import Run, Signal
from saga.step import Call, Step, step

__all__ = [
    "BodyError",
    "Call",
    "Conflict",
    "Failed",
    "Handle",
    "Handler",
    "NotDone",
    "NotFound",
    "NotWaiting",
    "Participant",
    "PayloadError",
    "Rejected",
    "Remote",
    "ResultTimeout",
    "Retry",
    "Run",
    "Saga",
    "SagaDeclarationError",
    "SagaError",
    "Signal",
    "Step",
    "StepContext",
    "Unknown",
    "remote",
    "saga",
    "step",
]
