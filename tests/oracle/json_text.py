"""JSON with one meaning, read slowly and by the grammar: RFC 8259, and what docs/tokens.md ("Form") forbids besides."""

from __future__ import annotations

import json
import re
from math import isinf
from typing import Any

_STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_TOKEN = re.compile(rf"[ \t\r\n]*({_STRING}|{_NUMBER}|true|false|null|[\[\]{{}}:,])[ \t\r\n]*")
_WORDS = {"true": True, "false": False, "null": None}
MAX_DIGITS = 400


def read(data: bytes, max_depth: int) -> Any:
    """The value of a JSON text; ValueError if it is none, or could be read in two ways."""
    tokens = _tokens(data.decode("utf-8"))
    value, rest = _value(tokens, 0, max_depth)
    if rest != len(tokens):
        raise ValueError("text after the value")
    return value


def _tokens(text: str) -> list[str]:
    found, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError("not JSON")
        found.append(match[1])
        at = match.end()
    return found


def _value(tokens: list[str], at: int, depth: int) -> tuple[Any, int]:
    token = tokens[at] if at < len(tokens) else ""
    if token == "{":
        return _object(tokens, at + 1, _inside(depth))
    if token == "[":
        return _list(tokens, at + 1, _inside(depth))
    if token in _WORDS:
        return _WORDS[token], at + 1
    if token.startswith('"'):
        return _text(token), at + 1
    if re.fullmatch(_NUMBER, token):
        return _number(token), at + 1
    raise ValueError("not a value")


def _inside(depth: int) -> int:
    if depth == 0:
        raise ValueError("nested too deep")
    return depth - 1


def _object(tokens: list[str], at: int, depth: int) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    if tokens[at : at + 1] == ["}"]:
        return found, at + 1
    while True:
        name, colon = [*tokens[at : at + 2], "", ""][:2]
        if not name.startswith('"') or colon != ":":
            raise ValueError("not a member")
        if _text(name) in found:
            raise ValueError("duplicate name")
        found[_text(name)], at = _value(tokens, at + 2, depth)
        if tokens[at : at + 1] == ["}"]:
            return found, at + 1
        at = _comma(tokens, at)


def _list(tokens: list[str], at: int, depth: int) -> tuple[list[Any], int]:
    found: list[Any] = []
    if tokens[at : at + 1] == ["]"]:
        return found, at + 1
    while True:
        value, at = _value(tokens, at, depth)
        found.append(value)
        if tokens[at : at + 1] == ["]"]:
            return found, at + 1
        at = _comma(tokens, at)


def _comma(tokens: list[str], at: int) -> int:
    if tokens[at : at + 1] != [","]:
        raise ValueError("expected a comma")
    return at + 1


def _text(token: str) -> str:
    return str(json.loads(token)) if "\\" in token else token[1:-1]


def _number(token: str) -> int | float:
    if token.lstrip("-").isdigit():
        if len(token.lstrip("-")) > MAX_DIGITS:
            raise ValueError("too many digits")
        return int(token)
    if isinf(float(token)):
        raise ValueError("beyond a double")
    return float(token)
