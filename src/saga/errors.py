"""The error tree of sagas. Each error says what is wrong and what to do next."""

from typing import Final

from saga import limits


def storable(text: str) -> str:
    """A text for people as the journal can hold it: without U+0000 and lone surrogates, and not too long."""
    clean = text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
    return clean[: limits.REASON_MAX_CHARACTERS]


class Rejected(Exception):
    """A declared business failure: nothing happened, and there is no use in trying again.

    A step raises it to say so; the body may catch it and go another way. A body that raises it, or lets it pass, undoes
    what happened before. Give the reason as the first argument: people read it.
    """

    @property
    def reason(self) -> str:
        """Why, for people; as the journal can hold it."""
        return storable(str(self.args[0])) if self.args else ""


class SagaError(Exception):
    """Root of everything else that this package raises on purpose."""


class SagaDeclarationError(SagaError, TypeError):
    """A saga, a step, a remote contract or a participant will not do; raised at import.

    Attributes:
        field: what is wrong: a parameter, an option.
        problem: why it cannot be.
        remedy: what to change.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field: Final = field
        self.problem: Final = problem
        self.remedy: Final = remedy


class PayloadError(SagaError, ValueError):
    """A value cannot be written to the journal, or read from it.

    Attributes:
        field: whose value: `charge(order)`, `result of charge`.
        problem: why it will not do.
        remedy: what to change.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field: Final = field
        self.problem: Final = problem
        self.remedy: Final = remedy


class BodyError(SagaError):
    """A saga's body did what a body cannot do; its instance pauses with this text."""


class BodyClosed(BodyError):
    """`run` was called in a body that is being closed, as in a `finally` block; nothing was executed."""


class Conflict(SagaError):
    """The key has been used to start this saga with another request; use another key, or the same request."""


class NotFound(SagaError):
    """There is no saga of this name under this key."""


class NotWaiting(SagaError):
    """The saga has ended, so that it cannot take a signal or be cancelled any more."""


class NotPossible(SagaError):
    """What a person asked for cannot be done with this instance as it is; says what can."""


class ResultTimeout(SagaError, TimeoutError):
    """The saga did not end in time; it goes on, and its result can be asked for again."""


class Failed(SagaError):
    """The saga ended without a result, and what it had done was undone.

    Attributes:
        state: `failed` (rejected, or past its deadline) or `cancelled`.
        reason: why, for people.
    """

    def __init__(self, state: str, reason: str) -> None:
        super().__init__(f"the saga {state}: {reason}" if state == "failed" else f"the saga was {state}: {reason}")
        self.state: Final = state
        self.reason: Final = reason


class WorkerError(SagaError, ValueError):
    """A worker cannot be made like this.

    Attributes:
        field: which argument.
        problem: why it will not do.
        remedy: what to change.
    """

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field: Final = field
        self.problem: Final = problem
        self.remedy: Final = remedy
