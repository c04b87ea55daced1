"""An owner that answers over HTTP: the cache's side of `SqlOwner.serve`. The only module that knows httpx.

A question is a GET, so it may be asked again at any time: connection errors, time-outs and the statuses 429 and 5xx are
retried with backoff for a bounded time, then raised as OwnerUnavailable. What will not get better by waiting is raised
at once. An answer is read up to a bound and validated before anybody sees it.

Errors name the owner by scheme, host and path, never with user, password, headers or query of the URL. httpx itself
logs the URLs that it asks: user and password are taken out of them, but a secret in the query would be there.
"""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import unquote

from pydantic import ValidationError

from outbox import crash_sites, garbage, limits, retry
from outbox.cache.owner import OwnerPage
from outbox.errors import OwnerError, OwnerPageInvalid, OwnerUnavailable
from outbox.event import key_text

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

_SITE: Final = crash_sites.register("cache.http.ask")
_AGAIN: Final = frozenset({429, 500, 502, 503, 504})


class HttpOwner:
    """Asks an owner's route, see `SqlOwner.serve`; needs the extra `sagabox[http]`."""

    def __init__(
        self,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        client: "httpx.AsyncClient | None" = None,
        timeout: float | timedelta = limits.OWNER_TIMEOUT_SECONDS,
        retry_for: float | timedelta = limits.OWNER_RETRY_SECONDS,
    ) -> None:
        """Asks the route at `url`; nothing is connected yet.

        Args:
            url: of the route; user and password in it are sent as basic authentication.
            headers: sent along, such as `Authorization`.
            client: where the service has one of its own; it is not closed by `close`.
            timeout: of one answer.
            retry_for: how long pages are asked for while the owner does not answer; `get` never asks for longer than
                `timeout`, because somebody waits for it.

        Raises:
            OwnerError: httpx is not installed, or the URL is none.
        """
        try:
            import httpx
        except ImportError as error:
            raise OwnerError("HttpOwner needs httpx; install it: pip install 'sagabox[http]'") from error
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, TypeError):
            parsed = httpx.URL("")
        if parsed.scheme not in {"http", "https"} or not parsed.host:
            raise OwnerError(
                "the owner's URL cannot be read; write https://host/path, special characters percent-encoded"
            )
        self._httpx = httpx
        self._auth = (unquote(parsed.username), unquote(parsed.password)) if parsed.userinfo else None
        self._url = parsed.copy_with(userinfo=b"")
        self._shown = str(self._url.copy_with(query=None, fragment=None))
        self._headers = dict(headers or {})
        self._given = client
        self._timeout_seconds = _seconds(timeout)
        self._retry_seconds = _seconds(retry_for)
        self._clients: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}

    async def page(self, after: object | None, limit: int) -> OwnerPage:
        """Rows in the order of their keys, from behind `after` on, at most `limit`.

        Raises:
            OwnerUnavailable: it did not answer in `retry_for`.
            OwnerPageInvalid: it answered something else.
            OwnerError: it refused the question.
        """
        asked = {"limit": str(limit)}
        if after is not None:
            asked["after"] = key_text(after)
        return await self._ask(asked, self._retry_seconds)

    async def get(self, key: object) -> OwnerPage:
        """The row of a key; no row where it does not exist. Raises as `page`, after `timeout`."""
        return await self._ask({"key": key_text(key)}, self._timeout_seconds)

    async def get_many(self, keys: Sequence[object]) -> OwnerPage:
        """The rows of these keys that exist: of one snapshot, so only as many keys as a URL takes.

        Raises as `page`.
        """
        text = json.dumps([key_text(key) for key in keys], separators=(",", ":"))
        return await self._ask({"keys": text}, self._retry_seconds)

    async def digests(self, columns: Sequence[str]) -> OwnerPage:
        """Count and digest of each bucket of keys, over these columns. Raises as `page`."""
        return await self._ask({"columns": json.dumps(list(columns))}, self._retry_seconds)

    async def bucket_keys(self, columns: Sequence[str], buckets: Sequence[int], after: str, limit: int) -> OwnerPage:
        """Keys and digests of the rows in some buckets. Raises as `page`."""
        asked = {
            "columns": json.dumps(list(columns)),
            "buckets": json.dumps(list(buckets), separators=(",", ":")),
            "after": after,
            "limit": str(limit),
        }
        return await self._ask(asked, self._retry_seconds)

    async def close(self) -> None:
        """Close connections; a later question opens new ones."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    async def __aenter__(self) -> Self:
        """For `async with`, which closes at its end."""
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close."""
        await self.close()

    # ------------------------------------------------------------------------------------------------ asking

    async def _ask(self, parameters: Mapping[str, str], seconds: float) -> OwnerPage:
        body = b""
        async for attempt in retry.attempts(when=_may_help, within=seconds):
            with attempt:
                body = await self._read(parameters)
        try:
            with garbage.held():
                return OwnerPage.model_validate_json(body)
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False, include_input=False, include_context=False)
            field = ".".join(map(str, first["loc"])) or "body"
            remedy = f"let {self._shown} answer with what SqlOwner.serve returns, as JSON"
            raise OwnerPageInvalid(None, field, first["msg"], remedy) from None

    async def _read(self, parameters: Mapping[str, str]) -> bytes:
        body = bytearray()
        await crash_sites.visit(_SITE, "before")
        try:
            async with (
                asyncio.timeout(self._timeout_seconds),
                self._client().stream(
                    "GET", self._url.copy_merge_params(dict(parameters)), headers=self._headers, auth=self._auth
                ) as answer,
            ):
                self._check_status(answer.status_code)
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > limits.OWNER_ANSWER_MAX_BYTES:
                        raise OwnerError(
                            f"{self._shown} answers with more than {limits.OWNER_ANSWER_MAX_BYTES} bytes; "
                            "leave large columns out of the owner's query"
                        )
        except (self._httpx.HTTPError, OSError, TimeoutError) as error:
            reason = type(error).__name__  # its text may hold the URL
            raise OwnerUnavailable(f"{self._shown} does not answer ({reason}); see whether the owner runs") from error
        await crash_sites.visit(_SITE, "after")
        return bytes(body)

    def _check_status(self, status: int) -> None:
        if status == 200:
            return
        if status in _AGAIN:
            raise OwnerUnavailable(f"{self._shown} answers with status {status}; see the owner's log")
        if status in {401, 403}:
            raise OwnerError(
                f"{self._shown} refuses us with status {status}; give its credentials: HttpOwner(headers=...)"
            )
        raise OwnerError(
            f"{self._shown} answers with status {status}; give the URL of a route that calls SqlOwner.serve"
        )

    def _client(self) -> "httpx.AsyncClient":
        if self._given is not None:
            return self._given
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            for gone in [other for other in self._clients if other.is_closed()]:
                del self._clients[gone]
            self._clients[loop] = self._httpx.AsyncClient(timeout=self._timeout_seconds)
        return self._clients[loop]


def _may_help(error: BaseException) -> bool:
    return isinstance(error, OwnerUnavailable)


def _seconds(duration: float | timedelta) -> float:
    return duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
