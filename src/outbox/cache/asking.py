"""Asking an owner about many keys: in as many questions as it takes."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Final

from outbox import limits
from outbox.cache.owner import ComparableOwner, Owner, OwnerPage

_QUESTION_BYTES: Final = 4_000
"""Of keys in one question: servers and proxies take URLs of 8 KiB."""


def questions(keys: Sequence[str]) -> Iterator[list[str]]:
    """Keys in groups that one question can hold."""
    part: list[str] = []
    size = 0
    for key in keys:
        length = len(json.dumps(key))
        if part and (len(part) >= limits.OWNER_KEYS_ASKED or size + length > _QUESTION_BYTES):
            yield part
            part, size = [], 0
        part.append(key)
        size += length
    if part:
        yield part


async def answers(owner: Owner, keys: Sequence[str], key_type: type) -> AsyncIterator[tuple[list[str], OwnerPage]]:
    """The owner's pages of these keys, each with the keys that it speaks for.

    Raises:
        OwnerError: the owner does not answer, or not as it should.
    """
    if isinstance(owner, ComparableOwner):
        for part in questions(keys):
            yield part, await owner.get_many([key_type(key) for key in part])
        return
    for start in range(0, len(keys), limits.OWNER_ASKED_AT_ONCE):
        asked = keys[start : start + limits.OWNER_ASKED_AT_ONCE]
        pages = await asyncio.gather(*(owner.get(key_type(key)) for key in asked))
        for key, page in zip(asked, pages, strict=True):
            yield [key], page
