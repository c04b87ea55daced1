"""Bootstrap: a consumer fills those of its caches that do not hold all of their owner's log, while it applies events.

    outbox.caches.complete_log = the owner's log?  yes: look again in a minute
                                                   no:  rebuild (one process at a time, by the rebuild's lease)

So a cache is filled when it is first fed, when the owner's log changes (adoption), and when partitions lost records
and were set free for another cache of the topic. Partitions that stand still are left to a person: nothing is freed
here. An error never stops the consumer; it is logged, and tried again with backoff, from the last committed page on.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from outbox import limits, retry
from outbox.cache import Cache
from outbox.cache.rebuild import Rebuild
from outbox.errors import OutboxError, RebuildBusy
from outbox.postgres import Pool

log = logging.getLogger(__name__)


async def keep_complete(db: Pool, caches: Sequence[Cache[Any]], stopping: asyncio.Event) -> None:
    """Keep all caches complete, side by side, until `stopping` is set."""
    await asyncio.gather(*(_keep_complete(db, cache, stopping) for cache in caches))


async def _keep_complete(db: Pool, cache: Cache[Any], stopping: asyncio.Event) -> None:
    pauses = retry.backoff(initial=1.0)
    while not stopping.is_set():
        try:
            done = await Rebuild(db, cache).run(unless_complete=True)
        except RebuildBusy:
            pause = limits.REBUILD_LEASE_SECONDS
        except OutboxError as error:
            pause = next(pauses)
            log.error("cache %s is not complete: %s; again in %.0f s", cache.table, error, pause)  # noqa: TRY400 - its text says all
        except Exception as error:
            pause = next(pauses)
            level = logging.WARNING if retry.is_transient(error) else logging.CRITICAL
            log.log(level, "cache %s is not complete: %r; again in %.0f s", cache.table, error, pause, exc_info=error)
        else:
            pauses = retry.backoff(initial=1.0)
            pause = limits.BOOTSTRAP_LOOK_SECONDS
            if done.pages:
                log.info("cache %s holds all of its owner's log: %d rows", cache.table, done.rows)
        await retry.pause(pause, stopping)
