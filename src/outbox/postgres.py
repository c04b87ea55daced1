"""The one door to PostgreSQL: named statements, crash sites, and who may be called a `Db`.

Statements live in a `.sql` file beside the module that uses them, one `-- name: ...` line in front of each. A
statement is a constant of the program; values reach it as parameters only. Each is a crash site (see `crash_sites`).
"""

import contextlib
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, LiteralString, TypeAlias, cast
from uuid import UUID

import asyncpg
from asyncpg.pgproto.pgproto import UUID as _DriverUUID  # noqa: N811 - a class of that name is imported above
from asyncpg.pool import PoolConnectionProxy

from outbox import crash_sites, limits

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]
    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
else:  # asyncpg's classes are generic for type checkers only
    Pool = asyncpg.Pool
    Connection = asyncpg.Connection | PoolConnectionProxy

Record: TypeAlias = asyncpg.Record
PostgresError: TypeAlias = asyncpg.PostgresError
Snapshot: TypeAlias = tuple[int, int, tuple[int, ...]]
"""A pg_snapshot: xmin, xmax, and the transactions in progress between them."""

CONNECTION_ERRORS: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a statement that crosses the server's farewell: "cannot switch to state"
    OSError,
    TimeoutError,
)
"""What a lost or unusable connection raises; the effect of the statement is unknown."""

FENCED: Final = "OB001"
RESTORED: Final = "OB002"
PARKING_FULL: Final = "OB003"
TOO_LARGE: Final = "OB010"
LOCKED: Final = "55P03"
"""Somebody else has a row, and the time to wait for it is over."""
ABORTED: Final = "25P02"
"""A statement failed before, and whoever ran it went on."""
UNDEFINED: Final = frozenset({"3F000", "42P01", "42883"})
"""A schema, table or function does not exist."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One named statement; `execute`, `fetch`, `fetchrow` and `fetchval` run it on a connection or a pool."""

    name: str
    text: LiteralString

    async def execute(
        self, db: "Connection | Pool", *args: object, timeout: float = limits.STATEMENT_TIMEOUT_SECONDS
    ) -> str:
        """Run it for its effect; the command tag comes back."""
        await crash_sites.visit(self.name, "before")
        status = await db.execute(self.text, *args, timeout=timeout)
        await crash_sites.visit(self.name, "after")
        return status

    async def fetch(
        self, db: "Connection | Pool", *args: object, timeout: float = limits.STATEMENT_TIMEOUT_SECONDS
    ) -> list[Record]:
        """All rows."""
        await crash_sites.visit(self.name, "before")
        rows = await db.fetch(self.text, *args, timeout=timeout)
        await crash_sites.visit(self.name, "after")
        return rows

    async def fetchrow(self, db: "Connection | Pool", *args: object) -> Record | None:
        """The first row."""
        await crash_sites.visit(self.name, "before")
        row = await db.fetchrow(self.text, *args, timeout=limits.STATEMENT_TIMEOUT_SECONDS)
        await crash_sites.visit(self.name, "after")
        return row

    async def fetchval(self, db: "Connection | Pool", *args: object) -> Any:
        """The first column of the first row."""
        await crash_sites.visit(self.name, "before")
        value = await db.fetchval(self.text, *args, timeout=limits.STATEMENT_TIMEOUT_SECONDS)
        await crash_sites.visit(self.name, "after")
        return value

    async def columns(self, connection: "Connection") -> list[tuple[str, str]]:
        """Name and type of each column that it returns, and that it takes no parameters; it is not run.

        Raises:
            ValueError: it has parameters.
        """
        await crash_sites.visit(self.name, "before")
        prepared = await connection.prepare(self.text, timeout=limits.STATEMENT_TIMEOUT_SECONDS)
        await crash_sites.visit(self.name, "after")
        if prepared.get_parameters():
            raise ValueError("has parameters")
        return [(column.name, column.type.name) for column in prepared.get_attributes()]

    async def cursor(self, connection: "Connection", *args: object) -> "Cursor":
        """A cursor over the rows; needs an open transaction."""
        await crash_sites.visit(self.name, "before")
        cursor = await connection.cursor(self.text, *args, timeout=limits.CURSOR_TIMEOUT_SECONDS)
        await crash_sites.visit(self.name, "after")
        return Cursor(self.name, cursor)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Rows of one statement, some at a time."""

    name: str
    driver: Any

    async def fetch(self, size: int) -> list[Record]:
        """The next rows; none at the end."""
        await crash_sites.visit(self.name, "before")
        rows: list[Record] = await self.driver.fetch(size, timeout=limits.CURSOR_TIMEOUT_SECONDS)
        await crash_sites.visit(self.name, "after")
        return rows


class Statements:
    """The statements of one module, as attributes: `SQL = Statements("outbox", "transaction.sql")`."""

    def __init__(self, package: str, file: str) -> None:
        """Read `file` of `package` and register each statement as a crash site `file-stem.name`."""
        stem = file.removesuffix(".sql").replace("/", ".")
        text = resources.files(package).joinpath(file).read_text(encoding="utf-8")
        self._statements = {
            name: Statement(crash_sites.register(f"{package.partition('.')[0]}.{stem}.{name}"), body)
            for name, body in _parse(text)
        }

    def __getattr__(self, name: str) -> Statement:
        """The statement of that name."""
        try:
            return self._statements[name]
        except KeyError:
            raise AttributeError(f"no statement named {name!r} among {sorted(self._statements)}") from None

    def __iter__(self) -> Iterator[Statement]:
        """All of them, for tests that prepare or explain each."""
        return iter(self._statements.values())


def _parse(text: str) -> list[tuple[str, LiteralString]]:
    parts = re.split(r"^-- name: (\w+)\s*$", text, flags=re.MULTILINE)
    return [(name, cast("LiteralString", body.strip())) for name, body in zip(parts[1::2], parts[2::2], strict=True)]


@asynccontextmanager
async def open_pool(url: str, *, max_size: int, application: str) -> AsyncIterator["Pool"]:
    """A pool for a program of ours; one connection is opened at once, to know that it works, others when needed."""
    async with asyncpg.create_pool(
        url,
        min_size=1,
        max_size=max_size,
        timeout=limits.CONNECT_TIMEOUT_SECONDS,
        server_settings={"application_name": application},
    ) as pool:
        yield pool


@asynccontextmanager
async def acquire(db: "Pool | Connection") -> AsyncIterator["Connection"]:
    """A connection of a pool for the length of the block, or the given connection itself.

    A pooled connection whose block ended by an exception is closed rather than given back: after a cancellation its
    protocol state cannot be trusted, and a transaction may still be open on it.
    """
    if not isinstance(db, asyncpg.Pool):
        yield db
        return
    async with db.acquire() as connection:
        try:
            yield connection
        except BaseException as error:
            if not _left_clean(error):
                drop(connection)
            raise


async def connect_like(pool: "Pool") -> "Connection":
    """A connection with a pool's own parameters that is not part of it, in the running event loop.

    For a thread with an event loop of its own: a pool belongs to the loop that made it.
    """
    inside: Any = pool
    arguments, options = inside._connect_args, inside._connect_kwargs  # noqa: SLF001 - asyncpg tells them in no other way
    connection: Connection = await asyncpg.connect(*arguments, **{"timeout": limits.CONNECT_TIMEOUT_SECONDS, **options})
    return connection


def uuid_of(raw: bytes) -> UUID:
    """A UUID of 16 bytes as the driver makes them: equal to Python's, and much quicker to make, hash and write."""
    made: UUID = _DriverUUID(raw)
    return made


def is_pool(db: object) -> "TypeIs[Pool]":
    """Whether it is a pool, whose connections come and go."""
    return isinstance(db, asyncpg.Pool)


def drop(connection: "Connection") -> None:
    """Close a connection without a word to the server; one that its pool has taken back already is no error."""
    with contextlib.suppress(asyncpg.InterfaceError):
        connection.terminate()


def is_lost(connection: "Connection") -> bool:
    """Whether it is closed; a pool takes one back whose server has said goodbye, and its proxy then refuses to say."""
    try:
        return connection.is_closed()
    except asyncpg.InterfaceError:
        return True


@asynccontextmanager
async def transact(connection: "Connection", **options: Any) -> AsyncIterator[None]:
    """A transaction of our own that never waits for a dead server.

    After an error that the server reported it is rolled back. After any other, a cancellation included, the connection
    is closed, which rolls back too: a ROLLBACK sent into a half-open connection would wait until TCP gives up.
    """
    transaction = connection.transaction(**options)
    await transaction.start()
    try:
        yield
    except BaseException as error:
        if _left_clean(error):
            await transaction.rollback()
        else:
            drop(connection)
        raise
    await transaction.commit()


@asynccontextmanager
async def look(connection: "Connection") -> AsyncIterator[None]:
    """A block that only reads, and whose `set local` settings end with it: it is always rolled back.

    Inside an open transaction it is a savepoint, because settings of a released one would stay.
    """
    if not connection.is_in_transaction():
        transaction = connection.transaction(readonly=True)
        await transaction.start()
        try:
            yield
        except BaseException as error:
            if _left_clean(error):
                await transaction.rollback()
            else:
                drop(connection)
            raise
        await transaction.rollback()
        return
    await connection.execute("savepoint outbox_look")
    try:
        yield
    except BaseException as error:
        if _left_clean(error):
            await connection.execute("rollback to outbox_look; release outbox_look")
        raise
    await connection.execute("rollback to outbox_look; release outbox_look")


@asynccontextmanager
async def atomic(connection: "Connection") -> AsyncIterator[None]:
    """A transaction for the length of the block; inside an open one, a savepoint, also where that began as text."""
    began_as_text = connection.is_in_transaction() and getattr(connection, "_top_xact", None) is None
    if not began_as_text:
        async with connection.transaction():
            yield
        return
    await connection.execute("savepoint outbox_unit")
    try:
        yield
    except BaseException:
        await connection.execute("rollback to outbox_unit; release outbox_unit")
        raise
    await connection.execute("release outbox_unit")


def _left_clean(error: BaseException) -> bool:
    """Whether the server itself reported the error, so that the connection is known to be in step."""
    return isinstance(error, Exception) and not isinstance(error, CONNECTION_ERRORS)


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE of an error that the server reported."""
    return error.sqlstate if isinstance(error, asyncpg.PostgresError) else None


def on_savepoints(
    connection: "Connection", callback: Callable[[str, BaseException | None], None]
) -> Callable[[], None]:
    """Call back with each query that may change savepoints, and with its error, if any; returns how to stop.

    The callback is scheduled on the event loop in the order of the queries, as are other `call_soon` callbacks.
    """

    def observe(query: Any) -> None:
        if _SAVEPOINT.search(query.query):
            callback(query.query, query.exception)

    connection.add_query_logger(observe)
    return lambda: connection.remove_query_logger(observe)


_SAVEPOINT: Final = re.compile(r"\b(savepoint|rollback|release)\b", re.IGNORECASE)
