"""Signals by the name of their class, checked against the code."""

from outbox.cli.exits import UsageProblem
from outbox.cli.loading import imported
from saga.codec import Value
from saga.run import Signal


def checked_signal(module_name: str, name: str, payload: str) -> str:
    """The payload as the class writes it.

    Raises:
        UsageProblem: the module has no such signal.
        PayloadError: the class does not take the payload.
    """
    values = vars(imported(module_name)).values()
    classes = {one.__name__: one for one in values if isinstance(one, type) and issubclass(one, Signal)}
    found = classes.get(name)
    if found is None:
        known = ", ".join(sorted(classes.keys() - {"Signal"})) or "none"
        raise UsageProblem(f"module {module_name} has no signal {name}; it has: {known}")
    value = Value[Signal](found, f"signal {name}")
    return value.encode(value.read(payload))
