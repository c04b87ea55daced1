"""Receipts as tokens: what they name, what they refuse, what a stranger may send instead."""

import base64
import contextlib
import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import Receipt, limits
from outbox.errors import ReceiptUnavailable

LOG = "18c2a3b4d5e-ab12"


def row(topic: str, key: str, position: int) -> dict[str, Any]:
    return {"topic": topic, "key": key, "position": position, "log_id": LOG, "transaction_id": "99"}


def receipt(*rows: dict[str, Any]) -> Receipt:
    made = Receipt.of(rows)
    assert isinstance(made, Receipt)
    return made


def token(raw: bytes) -> Receipt:
    return Receipt(base64.urlsafe_b64encode(raw).rstrip(b"=").decode())


keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


@given(st.dictionaries(keys, st.integers(1, 2**63 - 1), min_size=1, max_size=limits.RECEIPT_MAX_KEYS))
def test_a_receipt_travels(positions: dict[str, int]) -> None:
    sent = receipt(*(row("orders", key, position) for key, position in positions.items()))
    assert set(sent) <= set(string.ascii_letters + string.digits + "-_"), "safe in URLs, headers, cookies"
    arrived = Receipt(str(sent))
    assert arrived.log_id == LOG
    assert {key: arrived.position("orders", key) for key in positions} == positions


def test_what_it_does_not_name() -> None:
    assert receipt(row("orders", "a", 1)).position("orders", "b") is None
    assert receipt(row("orders", "a", 1)).position("other", "a") is None


def test_topic_and_key_are_told_apart() -> None:
    both = receipt(row("t1", "2", 5), row("t", "12", 9))
    assert (both.position("t1", "2"), both.position("t", "12")) == (5, 9)


def test_nothing_emitted_or_too_many_keys() -> None:
    nothing = Receipt.of([])
    assert isinstance(nothing, ReceiptUnavailable)
    assert "emitted nothing" in str(nothing)
    most = [row("t", str(n), n + 1) for n in range(limits.RECEIPT_MAX_KEYS)]
    assert isinstance(Receipt.of(most), Receipt)
    assert isinstance(Receipt.of([*most, row("t", "more", 1)]), ReceiptUnavailable)


BROKEN = [
    "",
    "x",
    "é",
    "\ud800",
    "AAAA" * 10,
    token(b"[]"),
    token(b"{}"),
    token(b"null"),
    token(b"[" * 100_000),
    token(b'{"l":"1-ab","t":1e999,"p":{}}'),
    token(b'{"l":"1-ab","t":1,"p":[1]}'),
    token(b'{"l":"1-ab","t":1,"p":"x"}'),
    token(b'{"l":"1-ab","t":1,"p":{"1":"x"}}'),
    token(b'{"l":"1-ab","t":1,"p":{"1":null}}'),
    token(b'{"l":"1-ab","t":1,"p":{"1":NaN}}'),
    token(b'{"l":"1-ab","t":1,"p":{"1":9223372036854775808}}'),
    token(b'{"l":"1-ab","t":1,"p":{"1":0}}'),
    token(b'{"l":"1-ab","t":' + b"9" * 5_000 + b',"p":{}}'),
]


@pytest.mark.parametrize("broken", range(len(BROKEN)))
def test_a_tampered_token(broken: int) -> None:
    with pytest.raises(ReceiptUnavailable, match="this is no receipt"):
        _ = Receipt(BROKEN[broken]).log_id
    with pytest.raises(ReceiptUnavailable, match="this is no receipt"):
        Receipt(BROKEN[broken]).position("t", "k")


@given(st.text(st.characters(), max_size=60) | st.binary(max_size=60).map(token))
def test_any_text_is_a_receipt_or_none(text: str) -> None:
    try:
        position = Receipt(text).position("t", "k")
    except ReceiptUnavailable:
        return
    assert position is None or 0 < position < 2**63


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3),
        lambda v: st.lists(v) | st.dictionaries(st.sampled_from(["l", "t", "p", "1"]), v, max_size=4),
    )
)
def test_any_json_is_a_receipt_or_none(body: object) -> None:
    with contextlib.suppress(ReceiptUnavailable):
        Receipt(token(json.dumps(body).encode())).position("t", "k")
