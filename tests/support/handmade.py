"""Pages of an owner, made by hand: which transactions a page sees is what its test says."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from outbox import Cache, Pool
from outbox.cache.pages import Pages
from tests.support.caching import LOG


@dataclass(frozen=True, slots=True)
class MadePage:
    """A page as an owner would answer it."""

    log: str
    snapshot: str
    rows: list[dict[str, Any]]


def snapshot(xmax: int, open_ids: Collection[int] = ()) -> str:
    """Sees every transaction below `xmax` but those that were open."""
    xmin = min(open_ids, default=xmax)
    return f"{xmin}:{xmax}:{','.join(map(str, sorted(open_ids)))}"


def page(
    names: Iterable[tuple[UUID, str]], xmax: int, open_ids: Collection[int] = (), *, log_id: str = LOG
) -> MadePage:
    """A page of agents with these names."""
    rows = [{"agent_id": str(agent), "agent_name": name, "tags": []} for agent, name in names]
    return MadePage(log_id, snapshot(xmax, open_ids), rows)


async def pages_of(pool: Pool, cache: Cache[Any], oid: int | None = None, parker: str | None = None) -> Pages:
    """What merges pages into a cache's table, or into another one; an engine has registered it."""
    return Pages(pool, await cache.prepare(pool, oid), topic=cache.topic, parker=parker or cache.table)
