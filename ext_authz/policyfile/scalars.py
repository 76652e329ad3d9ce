"""Plain scalars: what a word without quotes means, where YAML 1.1 and YAML 1.2 agree about it.

Readers of both versions are in use, so a word that they read differently is a mistake: `010` is 8 or 10, `1:30` is 90
or text, `yes` is a boolean or text. Sources: YAML 1.1 types (yaml.org/type), YAML 1.2.2 §10.3 (core schema).
"""

from __future__ import annotations

import re
from functools import lru_cache
from math import isfinite
from typing import Any

import yaml

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_ODD_BOOLEANS = frozenset(f(w) for w in ("yes", "no", "on", "off") for f in (str.lower, str.title, str.upper))
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})", re.ASCII)
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]{1,15}", re.ASCII)
_FLOAT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})\.[0-9]{1,18}(?:[eE][-+][0-9]{1,3})?", re.ASCII)
_SPECIAL = {".inf": float("inf"), "-.inf": float("-inf"), "+.inf": float("inf"), ".nan": float("nan")}

# What either version takes for a number. Longer or odder forms than those above are nobody's intention.
_NUMBER_1_2 = re.compile(
    r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+|[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|"
    r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    re.ASCII,
)
_resolve: Any = yaml.resolver.Resolver().resolve
_NUMBERS_1_1 = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


@lru_cache(1024)
def plain(text: str) -> Any:
    """The value of a plain scalar: None, a boolean, a number, or the text itself; a time stays text.

    ValueError, with advice, for what YAML 1.1 and 1.2 read differently, and for a number that is too long to be meant.
    """
    if text in _NULL:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text in _ODD_BOOLEANS:
        raise ValueError("is a boolean in YAML 1.1 and text in YAML 1.2; write `true` or `false`, or quote it")
    if _INTEGER.fullmatch(text):
        return int(text)
    if _HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text) and isfinite(number := float(text)):
        return number
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _NUMBER_1_2.fullmatch(text) or _resolve(yaml.ScalarNode, text, (True, False)) in _NUMBERS_1_1:
        raise ValueError("is a number that YAML readers take differently, or too long; write it plainly, or quote it")
    return text
