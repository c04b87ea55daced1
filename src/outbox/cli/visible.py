"""Untrusted text for a terminal: nothing in it moves the cursor, colours the screen or reorders the line.

Keys, payloads and error texts come from other people. Control, format, surrogate and unassigned characters and
separators other than the space are shown as escapes. JSON is laid out from its own text rather than from the parsed
value, so that doubled names and numbers like 1e400, which may be why an event was parked, are shown as they are.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Final

_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_LONG: Final = {escape: character for character, escape in _SHORT.items()}
_ESCAPE: Final = re.compile(r"\\u(?!d[89a-f])[0-9a-f]{4}|\\U000[0-9a-f]{5}|\\[nrt]")
_WORD: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+')
_INDENT: Final = "  "


def visible(text: str) -> str:
    """The text on one line, with everything that does not print as itself escaped."""
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character.isprintable():  # excludes categories C and Z but for the space
        return character
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if unicodedata.category(character) == "Zs":
        return " "
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def from_visible(text: str) -> str:
    """The text that `visible` showed as this one, but for separators, so that what was printed can be pasted."""
    return _ESCAPE.sub(lambda match: _LONG.get(match[0]) or chr(int(f"0x{match[0][2:]}", 0)), text)


def payload_lines(payload: bytes, *, is_whole: bool = True) -> list[str]:
    """A payload as lines: JSON laid out, other text as it is, anything else as hexadecimal."""
    try:
        text = payload.decode("utf-8", "strict" if is_whole else "ignore")
    except UnicodeDecodeError:
        return [payload[start : start + 32].hex(" ", -4) for start in range(0, len(payload), 32)]
    if is_whole and _is_json(text):
        return list(_json_lines(text))
    return [visible(line) for line in text.split("\n")]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _json_lines(text: str) -> Iterator[str]:
    """Lay out text that is known to be JSON."""
    line, depth, previous = "", 0, ""
    for word in _WORD.findall(text):
        if word in ("]", "}"):
            depth -= 1
            if previous not in ("[", "{"):
                yield line
                line = _INDENT * depth
        elif previous in ("[", "{", ","):
            yield line
            line = _INDENT * depth
        line += ": " if word == ":" else visible(word)
        if word in ("[", "{"):
            depth += 1
        previous = word
    yield line
