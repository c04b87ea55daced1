"""What clients of PostgreSQL say on the wire: a proxy that notes each statement and each round trip."""

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit, urlunsplit

_LENGTH: Final = 4
_SSL_REQUEST: Final = 80877103


@dataclass
class Said:
    """What was said since `clear`."""

    executed: list[str] = field(default_factory=list)
    """The text of each statement, each time that it was executed, over all connections."""
    prepared: int = 0
    """Statements that a connection had not known before."""
    round_trips: int = 0
    """Times that a client waited for the server: `Sync`, and simple queries."""

    def clear(self) -> None:
        self.executed.clear()
        self.prepared = self.round_trips = 0

    def count(self, text: str) -> int:
        """How often a statement with this text was executed."""
        return sum(text in statement for statement in self.executed)


@asynccontextmanager
async def wire(url: str) -> AsyncIterator[tuple[str, Said]]:
    """The URL of a proxy to the server of `url`, and what goes through it."""
    parts = urlsplit(url)
    said = Said()
    tasks: set[asyncio.Task[None]] = set()

    async def serve(client: StreamReader, to_client: StreamWriter) -> None:
        server, to_server = await asyncio.open_connection(parts.hostname, parts.port)
        back = asyncio.create_task(_copy(server, to_client))
        tasks.add(back)
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                await _listen(client, to_server, said)
        finally:
            to_server.close()
            back.cancel()
            tasks.discard(back)
            to_client.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    netloc = f"{parts.username}:{parts.password}@127.0.0.1:{port}"
    try:
        yield urlunsplit(parts._replace(netloc=netloc)), said
    finally:
        listener.close()


async def _copy(source: StreamReader, target: StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await source.read(65_536):
            target.write(data)
            await target.drain()
    target.close()  # who closes it waits for the other end to do the same


async def _listen(client: StreamReader, to_server: StreamWriter, said: Said) -> None:
    """Pass on what a client says, message by message; see "Message Formats" in PostgreSQL's manual."""
    while True:
        head = await client.readexactly(_LENGTH)
        body = await client.readexactly(int.from_bytes(head, "big") - _LENGTH)
        to_server.write(head + body)
        if int.from_bytes(body[:_LENGTH], "big") != _SSL_REQUEST:
            break
    prepared: dict[bytes, str] = {}
    while True:
        kind = await client.readexactly(1)
        head = await client.readexactly(_LENGTH)
        body = await client.readexactly(int.from_bytes(head, "big") - _LENGTH)
        match kind:
            case b"P":
                name, text, _ = body.split(b"\x00", 2)
                prepared[name] = text.decode()
                said.prepared += 1
            case b"B":
                said.executed.append(prepared[body.split(b"\x00", 2)[1]])
            case b"Q":
                said.executed.append(body.rstrip(b"\x00").decode())
                said.round_trips += 1
            case b"S":
                said.round_trips += 1
        to_server.write(kind + head + body)
        await to_server.drain()
