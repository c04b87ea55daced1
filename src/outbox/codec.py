"""JSON in and out, and identifiers."""

import hashlib
import json
import os
from uuid import UUID

from pydantic import BaseModel

from outbox import clock, postgres
from outbox.errors import EmitError


def encode(model: BaseModel, field: str = "payload") -> bytes:
    """A model as JSON that every consumer can store: no NaN, no infinity, no U+0000.

    Raises:
        EmitError: a value has no JSON form that PostgreSQL's jsonb and other languages accept.
    """
    try:
        body = model.__pydantic_serializer__.to_json(model, by_alias=True)
    except ValueError as error:
        raise EmitError(
            field, f"cannot be written as JSON ({error})", "use types that JSON has, or a serializer"
        ) from error
    # The searches are cheap and may hit innocent text; only then is the document read with care.
    if b"NaN" in body or b"Infinity" in body or b"\\u0000" in body:
        _refuse_unstorable(body, field)
    return body


def _refuse_unstorable(body: bytes, field: str) -> None:
    def refuse(constant: str) -> None:
        raise EmitError(field, f"contains {constant}, which JSON does not have", "send null or a string instead")

    def walk(value: object) -> None:
        if isinstance(value, str):
            if "\x00" in value:
                raise EmitError(field, "contains U+0000, which PostgreSQL cannot store as text", "remove the character")
        elif isinstance(value, dict):
            for name, item in value.items():
                walk(name)
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(json.loads(body, parse_constant=refuse))


def uuid7() -> UUID:
    """A random UUID that sorts by time (RFC 9562, version 7)."""
    milliseconds = int(clock.wall() * 1000) & 0xFFFF_FFFF_FFFF
    random = int.from_bytes(os.urandom(10), "big")
    high = milliseconds << 16 | 0x7000 | random >> 68
    low = 0x8000_0000_0000_0000 | random & 0x3FFF_FFFF_FFFF_FFFF
    return postgres.uuid_of((high << 64 | low).to_bytes(16, "big"))


def uuid5(namespace: UUID, name: str) -> UUID:
    """A name-based UUID (RFC 9562, version 5): as `uuid.uuid5`, in a third of the time."""
    raw = bytearray(hashlib.sha1(namespace.bytes + name.encode(), usedforsecurity=False).digest()[:16])
    raw[6] = raw[6] & 0x0F | 0x50
    raw[8] = raw[8] & 0x3F | 0x80
    return postgres.uuid_of(bytes(raw))
