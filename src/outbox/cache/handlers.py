"""Handlers of a cache: which event types they take, read from their annotations, and calling them.

Declaring is checked at import; calling never raises: what goes wrong with one event is a `Fault` of that event.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Union, get_args, get_origin
from uuid import UUID

from pydantic import BaseModel, TypeAdapter

from outbox import upcasting
from outbox.cache.effects import DELETE, Delete, Patch
from outbox.cache.fold import Effect, Fault
from outbox.errors import CacheDeclarationError, EventDeclarationError, OutboxError
from outbox.event import Event, EventKind, key_text

_HANDLER_SHAPE: Final = "write it as: def name(event: AnEvent) -> RowClass | Patch | Delete"


@dataclass(frozen=True, slots=True)
class Handler:
    """What happens with the events of one type."""

    event_class: type[Event]
    kind: EventKind
    function: Callable[..., Any]

    @property
    def may_patch(self) -> bool:
        """Whether it may answer with a Patch, which says nothing without the events before it."""
        return Patch in _members(typing.get_type_hints(self.function).get("return"))


class Shape:
    """The row class of a cache, and how effects are checked against it."""

    def __init__(self, row: type[BaseModel], key: str) -> None:
        """For rows of class `row`, whose field `key` is the event's key."""
        self.row = row
        self.key = key
        self.rows: TypeAdapter[list[Any]] = TypeAdapter(list[row])  # type: ignore[valid-type]
        self._adapters: dict[str, TypeAdapter[Any]] = {}

    def adapter(self, column: str) -> TypeAdapter[Any]:
        """Checks and encodes values of one column."""
        if column not in self._adapters:
            self._adapters[column] = field_adapter(self.row, column)
        return self._adapters[column]

    def checked(self, effect: object, key: str, value: object = None) -> Effect:
        """What a handler returned for an event with this key, or why that will not do.

        Args:
            effect: what it returned.
            key: the event's key.
            value: the same as the event has it; equal values need not be compared as text.
        """
        if isinstance(effect, self.row):
            own = getattr(effect, self.key)
            if own is value or (type(own) is type(value) and own == value):
                return effect
            text = key_text(own)
            return effect if text == key else _mismatch(text, key)
        if isinstance(effect, Patch):
            text = key_text(effect.key)
            return self._checked_patch(effect) if text == key else _mismatch(text, key)
        if effect is DELETE:
            return effect
        return Fault("HandlerError", f"the handler returned {type(effect).__name__}, not a row, a Patch or DELETE")

    def _checked_patch(self, patch: Patch) -> Effect:
        unknown = patch.columns.keys() - self.row.model_fields.keys() | patch.columns.keys() & {self.key}
        if unknown or not patch.columns:
            problem = f"cannot change {sorted(unknown)}" if unknown else "changes nothing"
            return Fault(
                "HandlerError", f"the handler's Patch {problem}; name columns of {self.row.__name__}, not its key"
            )
        return Patch(
            patch.key,
            **{name: self.adapter(name).validate_python(value) for name, value in patch.columns.items()},
        )


def field_adapter(model: type[BaseModel], name: str) -> TypeAdapter[Any]:
    """Checks and encodes values of one field."""
    field = model.model_fields[name]
    return TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]


def _mismatch(text: str, key: str) -> Fault:
    return Fault("KeyMismatch", f"the handler answered for the row {text!r}, but the event's key is {key!r}")


def call(handler: Handler, shape: Shape, event: Event, key: str) -> Effect:
    """The checked effect of one event; never raises."""
    try:
        return shape.checked(handler.function(event), key, getattr(event, handler.kind.key_field))
    except Exception as error:  # noqa: BLE001 - a handler is the user's code; whatever it raises is this event's fault
        return Fault.of(error)


def event_key(handler: Handler, event: Event) -> str:
    """The key of an event, as text."""
    value = getattr(event, handler.kind.key_field)
    return str(value) if type(value) is UUID else key_text(value)


def inspect_handler(function: Callable[..., Any], row: type[BaseModel], topic: str) -> list[Handler]:
    """The event types that a handler takes.

    Raises:
        CacheDeclarationError: its annotations do not say, or say something that a cache cannot do.
    """
    subject = Subject("cache", topic, _HANDLER_SHAPE, CacheDeclarationError)
    name = name_of(function)
    if inspect.iscoroutinefunction(function):
        raise CacheDeclarationError(f"{name}: handlers of a cache are pure; use def, not async def")
    hints = subject.hints(function)
    parameters = list(inspect.signature(function).parameters.values())
    if len(parameters) != 1 or parameters[0].name not in hints or "return" not in hints:
        raise CacheDeclarationError(f"{name}: needs one annotated parameter and a return annotation; {_HANDLER_SHAPE}")
    for member in _members(hints["return"]):
        if not (isinstance(member, type) and issubclass(member, (row, Patch, Delete))):
            raise CacheDeclarationError(f"{name}: returns {member}; a handler returns {row.__name__}, Patch or Delete")
    return subject.handlers(function, hints[parameters[0].name])


@dataclass(frozen=True, slots=True)
class Subject:
    """What a handler is declared for, and how to complain about it; inboxes read their handlers' annotations too.

    Attributes:
        noun: cache or inbox.
        topic: what it reads.
        shape: how its handlers are written.
        error: what is raised about them.
    """

    noun: str
    topic: str
    shape: str
    error: type[OutboxError]

    def hints(self, function: Callable[..., Any]) -> Mapping[str, Any]:
        """The annotations, resolved."""
        try:
            return typing.get_type_hints(function)
        except NameError as error:
            raise self.error(
                f"{name_of(function)}: {error}; import the classes in its annotations where it is defined"
            ) from error

    def handlers(self, function: Callable[..., Any], annotation: Any) -> list[Handler]:
        """One for each event type that the annotation names."""
        return [self._handler(function, member) for member in _members(annotation)]

    def _handler(self, function: Callable[..., Any], event_class: Any) -> Handler:
        name = name_of(function)
        if not (isinstance(event_class, type) and issubclass(event_class, Event)):
            raise self.error(f"{name}: takes {event_class}, which is no Event; {self.shape}")
        kind = event_class.__kind__
        if kind is None:
            raise self.error(f"{name}: {event_class.__name__} is abstract; name the event classes with a type")
        if kind.topic != self.topic:
            raise self.error(
                f"{name}: {event_class.__name__} is on topic {kind.topic}, the {self.noun} reads {self.topic}"
            )
        try:
            upcasting.check(event_class)
        except EventDeclarationError as error:
            raise self.error(f"{name}: {error}") from error
        return Handler(event_class, kind, function)


def name_of(function: Callable[..., Any]) -> str:
    """How to call a handler in messages."""
    return getattr(function, "__qualname__", repr(function))


def _members(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in {Union, types.UnionType}:
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)
