"""Receipts: which events a transaction put where in the log, as a token that can travel."""

import base64
import binascii
import json
import re
import zlib
from collections.abc import Iterable
from typing import Any, Final, Protocol, Self

from outbox import limits
from outbox.errors import ReceiptUnavailable


class Row(Protocol):
    """One key of a flush: topic, key, position, log_id, transaction_id."""

    def __getitem__(self, column: str, /) -> Any: ...


class Receipt(str):
    """Where the events of a committed transaction stand in the log; safe to hand to a browser as a token.

    It names, for each key, the log and the position of the transaction's last event. A cache has seen the
    transaction, as far as one key goes, when the key's row was last written by that position or a later one.
    Positions are compared within one key only; transaction ids are never compared.
    """

    __slots__ = ()

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Self | ReceiptUnavailable":
        """From the rows that the flush returned."""
        rows = list(rows)
        if not rows:
            return ReceiptUnavailable("the transaction emitted nothing: there is nothing to wait for")
        if len(rows) > limits.RECEIPT_MAX_KEYS:
            return ReceiptUnavailable(
                f"the transaction wrote {len(rows)} keys and a receipt names at most {limits.RECEIPT_MAX_KEYS}: "
                "use smaller transactions where somebody waits for single rows"
            )
        positions = {str(_digest(row["topic"], row["key"])): row["position"] for row in rows}
        body = {"l": rows[0]["log_id"], "t": int(rows[0]["transaction_id"]), "p": positions}
        raw = json.dumps(body, separators=(",", ":")).encode()
        return cls(base64.urlsafe_b64encode(raw).rstrip(b"=").decode())

    def _body(self) -> dict[str, Any]:
        try:
            body = json.loads(base64.urlsafe_b64decode(self + "=" * (-len(self) % 4)))
            positions = {str(digest): int(position) for digest, position in dict(body["p"]).items()}
            parsed: dict[str, Any] = {"l": str(body["l"]), "t": int(body["t"]), "p": positions}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError, binascii.Error) as error:
            raise ReceiptUnavailable("this is no receipt: pass the value of tx.receipt unchanged") from error
        if not _LOG_ID.fullmatch(parsed["l"]):
            raise ReceiptUnavailable("this is no receipt: it names no log")
        if not 0 <= parsed["t"] < 2**63:
            raise ReceiptUnavailable("this is no receipt: a transaction is a bigint")
        if any(not 0 < position < 2**63 for position in positions.values()):
            raise ReceiptUnavailable("this is no receipt: a position is a positive bigint")
        return parsed

    @property
    def log_id(self) -> str:
        """The log in which the positions count."""
        log_id: str = self._body()["l"]
        return log_id

    @property
    def transaction_id(self) -> int:
        """The transaction; only to ask whether a snapshot sees it, never to compare it with another one."""
        transaction_id: int = self._body()["t"]
        return transaction_id

    def position(self, topic: str, key: str) -> int | None:
        """The position of the transaction's last event for a key; None if it emitted none."""
        position: int | None = self._body()["p"].get(str(_digest(topic, key)))
        return position


_LOG_ID: Final = re.compile(r"[0-9a-f]{1,15}-[0-9a-f]{4}")


def _digest(topic: str, key: str) -> int:
    return zlib.crc32(f"{topic}/{key}".encode())  # a topic's name has no slash
