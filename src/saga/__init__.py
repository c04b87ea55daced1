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
    WorkerError,
)
from saga.handle import Handle
from saga.participant import Handler, Participant
from saga.remote import Remote, remote
from saga.run import Run, Signal
from saga.settings import Settings
from saga.step import Call, Step, step
from saga.worker import Worker

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
    "Settings",
    "Signal",
    "Step",
    "StepContext",
    "Unknown",
    "Worker",
    "WorkerError",
    "remote",
    "saga",
    "step",
]
