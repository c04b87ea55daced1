"""A load that goes on while servers die, and the account cache that follows it.

Writers (`tests.support.writers`) at a given rate. A transaction whose connection dies is *in doubt*: whether it
committed is asked of the business table afterwards, and the answer must be all of its changes or none. Moments of
faults are counted in committed events, so a seed repeats them better than a clock would.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

from pydantic import BaseModel

import outbox
from outbox import DELETE, Cache, Connection, Delete, Event, Key, Pool, clock, retry
from tests.support.checker import History, Sample, Verdict, judge
from tests.support.faults import eventually
from tests.support.history import read_changes, read_rows, topic_reader
from tests.support.writers import MODES, RolledBackError, Writers, identify

CLOSED: Final = "closed-"
"""Begins the identity of a change after which a cache keeps nothing."""
TRUTH: Final = """
select key, version, identity,
       case when identity not like 'closed-%'
            then jsonb_build_object('version', version, 'identity', identity) end as row
  from changes
"""
CACHED: Final = "select key, jsonb_build_object('version', version, 'identity', identity) as row from account_cache"
CACHE_TABLES: Final = """
create table account_cache (key text primary key, version integer not null, identity text not null);
select outbox.prepare_cache('account_cache');
create table applications (nth bigint generated always as identity primary key, key text not null, row jsonb);
create function note_application() returns trigger language plpgsql as $$
begin
  if tg_op = 'DELETE' then
    insert into applications (key) values (old.key);
  else
    insert into applications (key, row)
    values (new.key, jsonb_build_object('version', new.version, 'identity', new.identity));
  end if;
  return null;
end $$;
create trigger note_application after insert or update or delete on account_cache
  for each row execute function note_application()
"""
"""`applications` holds every write of the cache in order, so a change that took effect twice shows there."""
LOAD_MODES: Final[Mapping[str, int]] = {**MODES, "closed": 1}
_BULK_KEYS: Final = 40
_BEHIND_MAX_SECONDS: Final = 1.0
_SETTLE_TIMEOUT_SECONDS: Final = 90.0

_attempt: ContextVar[list[str]] = ContextVar("attempt")


class Account(BaseModel):
    key: str
    version: int
    identity: str


def account_cache(topic: str) -> Cache[Account]:
    """The cache of a topic that a test made up."""
    changed, closed = _events(topic)
    cache = Cache(Account, table="account_cache", key="key", topic=topic)

    def on_changed(event: Event) -> Account:
        return Account.model_validate(event.model_dump())

    def on_closed(_event: Event) -> Delete:
        return DELETE

    on_changed.__annotations__["event"] = changed
    on_closed.__annotations__["_event"] = closed
    cache.on(on_changed)
    cache.on(on_closed)
    return cache


def _events(topic: str) -> tuple[type[Event], type[Event]]:
    class Changed(Event, topic=topic, type="account.changed"):
        key: Key[str]
        version: int
        identity: str

    class Closed(Event, topic=topic, type="account.closed"):
        key: Key[str]
        identity: str

    return Changed, Closed


@dataclass(slots=True)
class Load(Writers):
    """Writers at `rate` events a second, whatever happens to the database."""

    modes: Mapping[str, int] = field(default_factory=lambda: LOAD_MODES)
    rate: float = 500.0
    committed: int = 0
    """Events of transactions whose COMMIT was answered."""
    in_doubt: list[frozenset[str]] = field(default_factory=list)
    """The changes of each transaction whose connection died."""
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _due: float = 0.0
    _classes: Any = None

    # -------------------------------------------------------------------------------------------- writing

    @asynccontextmanager
    async def running(self, writers: int = 6) -> AsyncIterator[None]:
        """Write for the length of the block."""
        self._stopping.clear()
        self._due = clock.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(writers):
                group.create_task(self._write_until_stopped(random.Random(f"{self.seed}/{self.committed}/{number}")))
            try:
                yield
            finally:
                self._stopping.set()

    async def more(self, events: int) -> None:
        """Wait until so many more events are known to be committed."""
        wanted = self.committed + events

        async def look() -> bool:
            return self.committed >= wanted

        await eventually(look, what=f"{wanted} events committed", timeout_seconds=_SETTLE_TIMEOUT_SECONDS)

    async def _write_until_stopped(self, rng: random.Random) -> None:
        pauses = retry.backoff(maximum=0.5)
        while not self._stopping.is_set():
            mode = rng.choices(list(self.modes), list(self.modes.values()))[0]
            lost = self.happened["interrupted"]
            before = self.committed
            await self.write(rng, mode)
            if self.happened["interrupted"] > lost:
                await retry.pause(next(pauses), self._stopping)
                continue
            pauses = retry.backoff(maximum=0.5)
            await self._pace(max(self.committed - before, 1))

    async def _pace(self, events: int) -> None:
        now = clock.monotonic()
        self._due = max(self._due + events / self.rate, now - _BEHIND_MAX_SECONDS)
        if self._due > now:
            await retry.pause(self._due - now, self._stopping)

    async def write(self, rng: random.Random, mode: str = "plain", key: str | None = None) -> None:
        """One transaction; a dying server leaves it in doubt."""
        attempt: list[str] = []
        token = _attempt.set(attempt)
        try:
            async with self.pool.acquire() as connection:
                await getattr(self, f"_write_{mode}")(connection, rng, key or rng.choice(self.keys))
        except RolledBackError:
            pass
        except Exception as error:
            if not retry.is_transient(error):
                raise
            self.happened["interrupted"] += 1
            if changes := frozenset(attempt) - self.rolled_back:
                self.in_doubt.append(changes)
            return
        finally:
            _attempt.reset(token)
        self.happened[mode] += 1
        self.committed += len(set(attempt) - self.rolled_back)

    async def change(self, tx: outbox.Transaction, key: str, *, closed: bool = False) -> str:
        """Change one key and report it, in the caller's transaction."""
        identity = (CLOSED if closed else "") + uuid4().hex
        _attempt.get([]).append(identity)
        version = await tx.fetchval(
            "with up as (update accounts set version = version + 1 where key = $1 returning version)"
            " insert into changes (key, version, identity) select $1, version, $2 from up returning version",
            key,
            identity,
        )
        tx.emit(self._made(key, version, identity))
        return identity

    def _made(self, key: str, version: int, identity: str) -> Event:
        if self._classes is None:
            self._classes = _events(self.topic)
        changed, closed = self._classes
        event: Event = (
            closed(key=key, identity=identity)
            if identity.startswith(CLOSED)
            else changed(key=key, version=version, identity=identity)
        )
        return event

    async def _write_closed(self, connection: Connection, _: random.Random, key: str) -> None:
        async with outbox.transaction(connection) as tx:
            await self.change(tx, key, closed=True)

    async def _write_bulk(self, connection: Connection, rng: random.Random, _: str) -> None:
        """Many keys in one statement, for rates that a round trip a change would not reach."""
        keys = sorted(rng.sample(list(self.keys), k=min(_BULK_KEYS, len(self.keys))))
        identities = [uuid4().hex for _ in keys]
        _attempt.get([]).extend(identities)
        async with outbox.transaction(connection) as tx:
            await tx.execute("select from accounts where key = any ($1) order by key for update", keys)
            written = await tx.fetch(
                "with new as (select * from unnest($1::text[], $2::text[]) as n(key, identity)),"
                " up as (update accounts a set version = version + 1 from new where a.key = new.key"
                "        returning a.key, a.version, new.identity)"
                " insert into changes (key, version, identity) select key, version, identity from up"
                " returning key, version, identity",
                keys,
                identities,
            )
            tx.emit(*(self._made(row["key"], row["version"], row["identity"]) for row in written))

    # ------------------------------------------------------------------------------------------- judging

    async def settled(self, servers: str, cache_pool: Pool) -> str | None:
        """Wait until topic and cache have everything; what is missing, if they never do."""
        try:
            async with topic_reader(servers, self.topic) as reader:
                await self.published(reader)
            truth = await self._source()

            async def look() -> bool:
                return await read_rows(cache_pool, CACHED) == truth

            await eventually(look, what="the cache equals the source", timeout_seconds=_SETTLE_TIMEOUT_SECONDS)
        except (AssertionError, TimeoutError) as error:
            return f"never settled: {error!r:.500}"
        return None

    async def _source(self) -> dict[str, Any]:
        rows = await self.pool.fetch(f"select distinct on (key) key, row from ({TRUTH}) t order by key, version desc")
        return {row["key"]: json.loads(row["row"]) for row in rows if row["row"] is not None}

    async def verdict(
        self, servers: str, cache_pool: Pool, *, duplicates_max: int, happened: Mapping[str, int]
    ) -> Verdict:
        """The whole topic and every write of the cache against the truth."""
        async with topic_reader(servers, self.topic) as reader:
            return judge(
                History(
                    changes=await read_changes(self.pool, TRUTH),
                    records=await reader.records(identify),
                    rolled_back=self.rolled_back,
                    parked=await self.parked(),
                    cache=await read_rows(cache_pool, CACHED),
                    samples=await _applications(cache_pool),
                    partition_of=reader.partition_of,
                    duplicates_max=duplicates_max,
                    happened=happened,
                )
            )

    async def torn(self) -> list[Collection[str]]:
        """Transactions in doubt of which the business table has some changes and lacks others; how many it has."""
        found = {row["identity"] for row in await self.pool.fetch("select identity from changes")}
        self.happened["in doubt, committed"] = sum(changes <= found for changes in self.in_doubt)
        self.happened["in doubt, not committed"] = sum(not changes & found for changes in self.in_doubt)
        return [changes for changes in self.in_doubt if changes & found and not changes <= found]


async def _applications(pool: Pool) -> list[Sample]:
    rows = await pool.fetch("select key, row from applications order by nth")
    return [Sample(row["key"], None if row["row"] is None else json.loads(row["row"])) for row in rows]


async def applied_twice(pool: Pool) -> list[str]:
    """Changes that the cache's table took more than once."""
    rows = await pool.fetch(
        "select row ->> 'identity' as identity from applications where row is not null group by 1 having count(*) > 1"
    )
    return [row["identity"] for row in rows]
