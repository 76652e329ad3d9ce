"""JSON that has only one meaning: UTF-8, no duplicate names, no NaN or Infinity, bounded nesting.

Source: RFC 8259, with the stricter rule of RFC 7493 (I-JSON) §2.3 on duplicate names.
"""

from __future__ import annotations

import json
from contextlib import suppress
from math import isinf
from typing import Any

import orjson

_BOM = b"\xef\xbb\xbf"
_OTHER = object()


def loads(data: bytes, max_depth: int = 16) -> Any:
    """The value of a JSON text; a one-line ValueError, without the text itself, if it is not strict JSON."""
    # Few brackets cannot nest deep: only texts with many need the exact walk.
    deep = data.count(b"[") + data.count(b"{") > max_depth
    if not deep and b'": ' not in data and (value := _as_written(data)) is not _OTHER:
        return value
    if data.startswith(_BOM):
        raise ValueError("starts with a byte order mark")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    try:
        value = _value(text)
    except RecursionError:
        raise ValueError(f"is nested more than {max_depth} deep") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"is not JSON: {e.msg} at character {e.pos}") from None
    if deep and _deeper(value, max_depth):
        raise ValueError(f"is nested more than {max_depth} deep")
    return value


def _as_written(data: bytes) -> Any:
    """The value of a text that is exactly what orjson would write; _OTHER for any other.

    orjson writes no duplicate names, no NaN, and no number that it would read back differently, so equal bytes are
    proof. Most tokens are such texts, and this takes a quarter of the time. (A text with `": "` in it hardly ever is.)
    """
    try:
        value = orjson.loads(data)
        return value if orjson.dumps(value) == data else _OTHER
    except (ValueError, TypeError):
        return _OTHER


def _value(text: str) -> Any:
    """`_DECODER.decode`, with a shortcut for a value without white space around it."""
    with suppress(StopIteration):  # no value starts here
        value, end = _DECODER.scan_once(text, 0)
        if end == len(text):
            return value
    return _DECODER.decode(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("has a duplicate name in an object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"holds {name}")


def _integer(text: str) -> int:
    if len(text.removeprefix("-")) > 400:
        raise ValueError("holds a number of over 400 digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError("holds a number that is too large")
    return value


_DECODER: Any = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer, parse_float=_real
)


def _deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, (dict, list))
        ] if isinstance(level[0], (dict, list)) else []  # fmt: skip
        if not level:
            return False
    return True
