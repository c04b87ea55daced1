"""Rows for which a page of the owner came too late: they are read again until what is merged is newer than they are.

A page does not write a row whose last event it does not see. That event may be a patch, and what it was applied to may
lack an event that Kafka lost: the page would have mended it, and now it is older than the row. So it counts as merged
only when each of those rows was asked for once more, and a later answer was written.

    loose   read, merge: written, unless another event was applied between the two
    tight   the same under the cache's lock: what was applied before it had committed before the answer is read, so
            nothing can be newer than the answer, and it ends there

Guarantees: nothing is kept between two questions. A crash at any line leaves the page not counted; who goes on reads it
anew, and finds out anew for which rows it is too late. The lock is held while the owner answers, for a bounded time,
and only for rows that changed at each of the looks before.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from outbox import limits, retry
from outbox.cache.asking import answers
from outbox.cache.owner import Owner, OwnerPage
from outbox.cache.pages import Merged, Pages
from outbox.errors import OwnerUnavailable, PageRefused

_LOOSE_TRIES: Final = 2


async def read_again(
    owner: Owner, pages: Pages, keys: Sequence[str], key_type: type, accept: Callable[[OwnerPage], None]
) -> Merged:
    """Merge answers about these keys until none of their rows is newer; what that wrote and removed.

    Args:
        owner: to be asked.
        pages: of the table.
        keys: as text.
        key_type: of the cache's keys.
        accept: is shown each answer, and raises where that is not to be merged.

    Raises:
        OwnerUnavailable: the last answers took too long.
        OwnerError, OwnerRowInvalid, PageRefused: see `Rebuild.run`.
    """
    written = removed = 0
    pauses = retry.backoff()
    for _ in range(_LOOSE_TRIES):
        left: list[str] = []
        async for asked, page in answers(owner, keys, key_type):
            accept(page)
            try:
                merged = await pages.merge_keys(page, asked)
            except PageRefused:  # read before something was forgotten
                left += asked
            else:
                written, removed = written + merged.written, removed + merged.removed
                left += merged.late
        if not left:
            return Merged(0, written, removed)
        keys = left
        await asyncio.sleep(next(pauses))
    for key in keys:

        async def read(key: str = key) -> OwnerPage:
            try:
                async with asyncio.timeout(limits.OWNER_LOCKED_SECONDS):
                    page = await owner.get(key_type(key))
            except TimeoutError as error:
                raise OwnerUnavailable(
                    f"key {key} changes all the time, and its owner does not answer in {limits.OWNER_LOCKED_SECONDS:g} "
                    "s, for which its consumers can wait; see why it is slow, then rebuild the cache again"
                ) from error
            accept(page)
            return page

        merged = await pages.merge_alone(read, key)
        written, removed = written + merged.written, removed + merged.removed
    return Merged(0, written, removed)
