"""Parsing of request bodies. Pure: bytes in, a value or a `Refusal` out; nothing raises."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is refused: a code for programs and a message for people."""

    code: str
    message: str


def read_object(body: bytes) -> dict[str, Any] | Refusal:
    """The JSON object in `body` (RFC 8259, which has no NaN or Infinity)."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return Refusal("bad_json", "the body is not JSON")
    if not isinstance(value, dict):
        return Refusal("not_an_object", f"the body must be a JSON object, found {_kind(value)}")
    return value


def read_token_id(body: bytes) -> int | Refusal:
    """The integer `token_id` of the JSON object in `body`; other fields are ignored."""
    found = read_object(body)
    if isinstance(found, Refusal):
        return found
    if "token_id" not in found:
        return Refusal("missing_token_id", "the body must have a token_id")
    token_id = found["token_id"]
    # In Python, the value of JSON's true is an int.
    if not isinstance(token_id, int) or isinstance(token_id, bool):
        return Refusal("bad_token_id", f"token_id must be an integer, found {_kind(token_id)}")
    return token_id


_KINDS = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "an array", dict: "an object"}


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "null")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
