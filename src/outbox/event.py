"""What services declare: events with a topic, a type and one key field."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, TypeVar
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from outbox import limits, upcasting
from outbox.errors import EmitError
from outbox.upcasting import Upcaster

T = TypeVar("T")


class _KeyMarker:
    """Marks the field whose value becomes the Kafka key."""

    def __repr__(self) -> str:
        return "Key"


Key = Annotated[T, _KeyMarker()]
"""Annotates the one field of an event that is its Kafka key, the unit of order: `agent_id: Key[UUID]`."""

_CLASS_KEYWORDS: Final = frozenset({"type", "topic", "schema_version"})
_KEY_TYPES: Final = (UUID, str, int)


@dataclass(frozen=True, slots=True, kw_only=True)
class EventKind:
    """What a concrete event class fixes for all of its events."""

    type: str
    topic: str
    schema_version: int
    key_field: str


class Event(BaseModel):
    """A fact that a service publishes.

    Subclass it once per topic and once per type:

        class AgentEvent(Event, topic="llm.agents"):
            agent_id: Key[UUID]

        class AgentRenamed(AgentEvent, type="agent.renamed"):
            agent_name: str

    Fields of the class are the payload. Events are immutable, and unknown fields of a received event are ignored, so
    that owners can add fields without breaking consumers.

    Class keywords:
        topic: Kafka topic, inherited by subclasses.
        type: name of the event on the wire; a class without one is abstract and cannot be emitted.
        schema_version: version of the payload's shape, from 1; see `upcast` for what older ones become.

    Raises:
        TypeError: at class creation, for an unknown class keyword, a second key field, or a type without topic or key.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, ser_json_inf_nan="constants")

    __kind__: ClassVar[EventKind | None] = None
    __topic__: ClassVar[str | None] = None
    __upcasters__: ClassVar[dict[int, Upcaster]] = {}
    """By the version that they read."""

    def __init_subclass__(
        cls, *, type: str | None = None, topic: str | None = None, schema_version: int = 1, **config: Any
    ) -> None:
        """Check the class keywords; pydantic's own metaclass would let a misspelt one pass."""
        unknown = set(config) - set(ConfigDict.__annotations__)
        if unknown:
            raise TypeError(
                f"{cls.__name__}: unknown class keyword {min(unknown)!r}; "
                f"an event takes {', '.join(sorted(_CLASS_KEYWORDS))}"
            )
        super().__init_subclass__(**config)

    @classmethod
    def __pydantic_init_subclass__(
        cls, *, type: str | None = None, topic: str | None = None, schema_version: int = 1, **_config: Any
    ) -> None:
        """Fix topic, type and key once the fields are known."""
        if topic is not None:
            _check_topic(cls.__name__, topic)
            cls.__topic__ = topic
        cls.__kind__ = None
        cls.__upcasters__ = {}
        if type is None:
            return
        keys = [name for name, field in cls.model_fields.items() if _is_key(field)]
        if len(keys) != 1:
            raise TypeError(f"{cls.__name__}: has {len(keys)} key fields; annotate exactly one field with Key[...]")
        if cls.__topic__ is None:
            raise TypeError(f"{cls.__name__}: has a type but no topic; pass topic=... to it or to its base class")
        if not 1 <= len(type.encode("utf-8", "surrogatepass")) <= limits.EVENT_TYPE_MAX_BYTES:
            raise TypeError(f"{cls.__name__}: type must have 1 to {limits.EVENT_TYPE_MAX_BYTES} bytes")
        try:
            _check_text("type", type)
        except EmitError as error:
            raise TypeError(f"{cls.__name__}: {error}") from error
        if not 1 <= schema_version <= 32_767:
            raise TypeError(f"{cls.__name__}: schema_version must be between 1 and 32767, not {schema_version}")
        cls.__kind__ = EventKind(type=type, topic=cls.__topic__, schema_version=schema_version, key_field=keys[0])

    @classmethod
    def upcast(cls, *, from_version: int) -> Callable[[Upcaster], Upcaster]:
        """Register how the payload of an older version becomes that of the next one.

            class AgentRenamed(AgentEvent, type="agent.renamed", schema_version=2):
                agent_name: str

            @AgentRenamed.upcast(from_version=1)
            def name_was_called_name(payload: dict[str, Any]) -> dict[str, Any]:
                return {**payload, "agent_name": payload["name"]}

        Register them where the class is declared. Upcasters of several versions are called one after the other; one
        that raises is the fault of that event, as if a handler had. Events of a newer version than the class are read
        as if they were of its own: unknown fields are ignored.

        Raises:
            EventDeclarationError: the class is abstract, the version is not an older one, or has an upcaster already.
        """

        def register(upcaster: Upcaster) -> Upcaster:
            upcasting.register(cls, from_version, upcaster)
            return upcaster

        return register


def kind_of(event_class: type[Event]) -> EventKind:
    """The kind of a concrete event class.

    Raises:
        EmitError: the class is abstract, or no event at all.
    """
    if not issubclass(event_class, Event):
        raise EmitError("type", f"{event_class.__name__} is no event", "emit instances of Event's subclasses")
    if event_class.__kind__ is None:
        raise EmitError("type", f"{event_class.__name__} is abstract", "emit a subclass declared with type=...")
    return event_class.__kind__


def key_text(value: object) -> str:
    """A key as the text that orders and partitions it, the same in Python and in SQL.

    Raises:
        EmitError: the value is missing, empty, too long, or of a type whose text form is not certain.
    """
    if isinstance(value, bool) or not isinstance(value, _KEY_TYPES):
        remedy = "use a UUID, str or int"
        raise EmitError("key", f"has the type {type(value).__name__}", remedy)
    if isinstance(value, int) and value.bit_length() > 8 * limits.KEY_MAX_BYTES:  # str() would refuse it in its own way
        raise EmitError("key", "is empty or too long", f"use 1 to {limits.KEY_MAX_BYTES} bytes")
    # An enum's str() is its name; the key is its value.
    text = (
        str.__str__(value) if isinstance(value, str) else int.__repr__(value) if isinstance(value, int) else str(value)
    )
    if not 1 <= len(text.encode("utf-8", "surrogatepass")) <= limits.KEY_MAX_BYTES:
        raise EmitError("key", "is empty or too long", f"use 1 to {limits.KEY_MAX_BYTES} bytes")
    _check_text("key", text)
    return text


def check_headers(headers: Mapping[str, str]) -> None:
    """Refuse headers that could not be published.

    Raises:
        EmitError: a name or value is not text that UTF-8 can carry, a name is ours, or all together are too large.
    """
    if not isinstance(headers, Mapping):
        raise EmitError("headers", f"are a {type(headers).__name__}", "pass a mapping of text to text")
    for name, value in headers.items():
        if not all(isinstance(text, str) for text in (name, value)):
            raise EmitError("headers", f"{name!r} is not text to text", "encode the value as str")
        if name.startswith(("ce_", "ob-")) or name in {"", "content-type"}:
            raise EmitError("headers", f"{name!r} is reserved", "choose a name without the prefixes ce_ and ob-")
        _check_text("headers", name)
        _check_text("headers", value)
    # As PostgreSQL stores them, and measures them: quotes and control characters take more than themselves.
    size_bytes = len(json.dumps(dict(headers), ensure_ascii=False).encode())
    if size_bytes > limits.HEADERS_MAX_BYTES:
        raise EmitError("headers", f"have {size_bytes} bytes", f"stay below {limits.HEADERS_MAX_BYTES}")


def _check_text(field: str, text: str) -> None:
    if "\x00" in text:
        raise EmitError(field, "contains U+0000, which PostgreSQL cannot store", "remove the character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EmitError(field, "contains a lone surrogate, which UTF-8 does not have", "repair the text") from error


def _check_topic(owner: str, topic: str) -> None:
    legal = all(c.isascii() and (c.isalnum() or c in "._-") for c in topic)
    if not legal or not 1 <= len(topic) <= limits.TOPIC_MAX_CHARACTERS or topic in {".", ".."}:
        raise TypeError(
            f"{owner}: {topic!r} is no Kafka topic name; use 1 to {limits.TOPIC_MAX_CHARACTERS} of a-z A-Z 0-9 . _ -"
        )


def _is_key(field: FieldInfo) -> bool:
    return any(isinstance(mark, _KeyMarker) for mark in field.metadata)
