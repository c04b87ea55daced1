"""Upcasters: how events of an older `schema_version` become what the class is now.

    version 1 --(from_version=1)--> version 2 --(from_version=2)--> version 3 = the class

An upcaster takes the decoded JSON of one version and returns that of the next. The chain has no gaps from the oldest
version that has an upcaster up to the class's own; what is older than that cannot be read, and says so. The result is
validated as JSON again, by the one validator that events of the present version pass too.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from pydantic_core import from_json, to_json

from outbox.errors import EventDeclarationError, UpcastError

if TYPE_CHECKING:
    from outbox.event import Event, EventKind

Payload: TypeAlias = dict[str, Any]
Upcaster: TypeAlias = Callable[[Payload], Payload]

_SHAPE: Final = "write it as: def name(payload: dict[str, Any]) -> dict[str, Any]"


def register(event_class: "type[Event]", from_version: int, upcaster: Upcaster) -> None:
    """Add the upcaster from a version to the next.

    Raises:
        EventDeclarationError: the class has no type, the version is not an older one, or has an upcaster already.
    """
    name = event_class.__name__
    kind = event_class.__kind__
    if kind is None:
        raise EventDeclarationError("upcast", f"{name} is abstract", "register it on a class declared with type=...")
    if type(from_version) is not int or not 1 <= from_version < kind.schema_version:
        raise EventDeclarationError(
            "from_version",
            f"{from_version!r} is not below {name}'s schema_version, which is {kind.schema_version}",
            "name a version from 1 up to the one before the class's own, and raise schema_version with each new shape",
        )
    if inspect.iscoroutinefunction(upcaster) or not callable(upcaster):
        raise EventDeclarationError("upcast", f"{name}: {upcaster!r} is no plain function", _SHAPE)
    if from_version in event_class.__upcasters__:
        other = event_class.__upcasters__[from_version]
        raise EventDeclarationError(
            "from_version",
            f"{name} has an upcaster from version {from_version} already: {getattr(other, '__qualname__', other)}",
            "leave one of the two out",
        )
    event_class.__upcasters__[from_version] = upcaster


def check(event_class: "type[Event]") -> None:
    """Refuse a chain with a gap; for whoever declares a handler of the class.

    Raises:
        EventDeclarationError: names the versions that lack an upcaster.
    """
    kind, upcasters = event_class.__kind__, event_class.__upcasters__
    if kind is None or not upcasters:
        return
    missing = [version for version in range(min(upcasters), kind.schema_version) if version not in upcasters]
    if missing:
        raise EventDeclarationError(
            "upcast",
            f"{event_class.__name__} has an upcaster from version {min(upcasters)} but none from "
            + ", ".join(map(str, missing)),
            f"register one with @{event_class.__name__}.upcast(from_version={missing[0]}), before its handlers",
        )


def upcast(event_class: "type[Event]", kind: "EventKind", version: int, payload: bytes) -> bytes:
    """The payload of an older version as JSON of the present one.

    Raises:
        UpcastError: an upcaster is missing, failed, or returned no dict.
        ValueError: the payload is no JSON.
    """
    document = from_json(payload)
    for step in range(version, kind.schema_version):
        upcaster = event_class.__upcasters__.get(step)
        if upcaster is None:
            raise UpcastError(
                f"{kind.type} came in version {version}, and there is no upcaster from version {step}: "
                f"register one with @{event_class.__name__}.upcast(from_version={step}), then retry the key"
            )
        if not isinstance(document, dict):
            raise UpcastError(f"{kind.type} in version {step} is no JSON object but {type(document).__name__}")
        try:
            document = upcaster(document)
        except Exception as error:
            raise UpcastError(f"the upcaster of {kind.type} from version {step} raised {error!r}") from error
    if not isinstance(document, dict):
        raise UpcastError(f"the upcaster of {kind.type} returned {type(document).__name__}, not a dict; {_SHAPE}")
    return to_json(document, inf_nan_mode="constants")
