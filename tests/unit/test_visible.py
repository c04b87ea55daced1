"""Untrusted text cannot address the terminal, and what was printed can be pasted."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.cli.visible import from_visible, payload_lines, visible

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.text())
def test_nothing_but_printable_characters_comes_out(text: str) -> None:
    assert visible(text).isprintable()


@given(st.text())
def test_printable_text_is_left_alone(text: str) -> None:
    printable = "".join(filter(str.isprintable, text))
    assert visible(printable) == printable


@pytest.mark.parametrize("text", ["\x1b[31m", "a\nb\tc\r", "\u202egnp", "\x9b2J", "\ufeff", "\U000e0041", "plain ü"])
def test_what_was_printed_can_be_pasted(text: str) -> None:
    assert from_visible(visible(text)) == text


@pytest.mark.parametrize("text", ["\\ud800", "\\U00110000", "\\x41", "c:\\users"])
def test_what_is_no_escape_of_ours_stays(text: str) -> None:
    assert from_visible(text) == text


@given(json_values)
def test_json_is_laid_out_without_changing_it(value: object) -> None:
    text = json.dumps(value, ensure_ascii=True)
    lines = payload_lines(text.encode())
    assert json.loads("\n".join(lines)) == value
    assert all(line.isprintable() for line in lines)


def test_json_is_shown_as_it_was_written() -> None:
    payload = b'{"n":1e400,"n":2.50,"empty":[],"none":{},"list":[1,{"a":null}]}'
    assert payload_lines(payload) == [
        "{",
        '  "n": 1e400,',
        '  "n": 2.50,',
        '  "empty": [],',
        '  "none": {},',
        '  "list": [',
        "    1,",
        "    {",
        '      "a": null',
        "    }",
        "  ]",
        "}",
    ]


def test_what_is_not_json_is_shown_too() -> None:
    assert payload_lines(b"\x00\xff" + b"a" * 31) == [
        "00ff6161 61616161 61616161 61616161 61616161 61616161 61616161 61616161",
        "61",
    ]
    assert payload_lines(b"one\ntwo\x1b[2J") == ["one", "two\\u001b[2J"]
    assert payload_lines(b'{"half": "\xc3', is_whole=False) == ['{"half": "']
    assert payload_lines(b"[" * 200_000) == ["[" * 200_000], "too deep to be read as JSON"
