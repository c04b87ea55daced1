"""Testing a cache: one line that tries every order, duplicate, crash and page on PostgreSQL.

    async def test_agents_converge(pool: Pool) -> None:
        await converges(pool, agents, [AgentRenamed(...), AgentTagged(...), AgentDeleted(...)])

Hypothesis, which comes with `sagabox[testing]`, draws plans and shrinks a failing one to the smallest. It is
synchronous, so it runs in a thread of its own and submits each plan to the caller's loop, where the pool lives.
"""

import asyncio
import threading
from collections.abc import Iterable
from typing import Any, Final

from pydantic import BaseModel

try:
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis.errors import Flaky
except ImportError as error:
    raise ImportError("outbox.testing needs Hypothesis; install it: pip install 'sagabox[testing]'") from error

from outbox import limits
from outbox.cache import Cache
from outbox.event import Event
from outbox.postgres import Pool
from outbox.testing.plan import Plan, plans
from outbox.testing.run import play
from outbox.testing.scratch import Scratch, scratch
from outbox.testing.stream import Stream

__all__ = ["converges"]

_PHASES: Final = (Phase.generate, Phase.shrink)


class _StoppedError(BaseException):
    """The caller was cancelled; Hypothesis passes on what is no Exception."""


async def converges(
    pool: Pool,
    cache: Cache[Any],
    events: Iterable[Event],
    *,
    existing: Iterable[BaseModel] = (),
    owner: bool | None = None,
    examples: int = 100,
    seed: int = 0,
) -> None:
    """Check that a cache ends as `cache.fold(events)`, however its events arrive, and that no row ever goes back.

    Tried are: other orders between keys (that of a key's own events is kept), batches of any size, records delivered
    again, consumers that die before or after they wrote, or do not learn that they committed, partitions that another
    consumer takes over, and pages of the owner, read at one moment and merged at another. All of it on a copy of the
    cache's table, which is dropped at the end; the table itself and what is known of it stay as they are.

    Args:
        pool: on a migrated database with the cache's table.
        cache: as the service declares it.
        events: some of each type, of two or three keys, in the order that a service might emit them in; at most
            `limits.TESTING_MAX_EVENTS`.
        existing: rows that the owner has before the first event; then the cache is filled by its pages, and what is
            expected is the fold of the events from these rows on.
        owner: whether pages of the owner come; None if the cache has an owner, or `existing` rows.
        examples: how many plans are tried.
        seed: of the choice of plans; with the same seed they are the same.

    Raises:
        AssertionError: it does not; the text tells the smallest plan that shows it, and the row.
        CacheDeclarationError: the cache does not fit its table, or a handler's answer the cache.
        ValueError: there are no events, or too many.
    """
    events = list(events)
    if not 1 <= len(events) <= limits.TESTING_MAX_EVENTS:
        raise ValueError(f"converges takes 1 to {limits.TESTING_MAX_EVENTS} events, not {len(events)}: take a few")
    cache.fold(events)  # raises what a handler raises
    stream = Stream(cache, events, existing)
    with_owner = owner if owner is not None else cache.owner is not None or bool(stream.existing)
    async with scratch(pool, cache, stream) as table:
        search = _Search(table, asyncio.get_running_loop(), with_owner=with_owner, examples=examples, seed=seed)
        thread = asyncio.create_task(asyncio.to_thread(search.run))
        try:
            story = await asyncio.shield(thread)
        finally:
            search.stopping.set()
            await asyncio.wait([thread])
    if story is not None:
        raise AssertionError(f"cache {cache.table} does not converge\n\n{story}")


class _Search:
    """For a plan that fails, and then for a smaller one; in a thread."""

    def __init__(
        self, table: Scratch, loop: asyncio.AbstractEventLoop, *, with_owner: bool, examples: int, seed: int
    ) -> None:
        self.stopping = threading.Event()
        self._table = table
        self._loop = loop
        self._with_owner = with_owner
        self._examples = examples
        self._seed = seed
        self._story: str | None = None

    def run(self) -> str | None:
        """The story of the smallest plan that fails; None if none does."""
        drawn = plans(self._table.stream.keys, owner=self._with_owner)
        options = settings(
            max_examples=self._examples,
            database=None,
            deadline=None,
            phases=_PHASES,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        try:
            seeded(self._seed)(options(given(drawn)(self._try)))()
        except Flaky:
            return (
                f"{self._story}\n\nThe same plan did not fail each time: the handlers keep something from call to call."
            )
        except _FailedError:
            return self._story
        except _StoppedError:
            return None
        return None

    def _try(self, plan: Plan) -> None:
        if self.stopping.is_set():
            raise _StoppedError
        story = asyncio.run_coroutine_threadsafe(play(self._table, plan), self._loop).result()
        if story is not None:
            self._story = story
            raise _FailedError


class _FailedError(Exception):
    """A plan failed."""
