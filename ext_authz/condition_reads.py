"""Which members of `claims` or `request` a condition reads, where its text tells for certain.

A condition whose text leaves any doubt reads them all. Source of the syntax: cel-spec, Language Definition, Syntax.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ext_authz.condition import Condition

Members = frozenset[str] | None  # None: any of them

_TOKENS = re.compile(
    r"""\s*(?:(?P<string>"[^"\\\n]*"|'[^'\\\n]*')|(?P<name>[A-Za-z_]\w*)|(?P<number>\d[\w.]*)|(?P<sign>\S))""",
    re.ASCII,
)
# Escapes, comments, prefixed and triple-quoted strings: rare enough not to be read at all.
_DOUBTFUL = re.compile(r"""\\|[A-Za-z_]["']|["']["']["']""", re.ASCII)
_OPERATORS = frozenset({"(", "&&", "||"})


def members(condition: Condition, variable: str) -> Members:
    """The members of `variable` that the condition's outcome can depend on; None if it may be any."""
    if variable not in condition.reads:
        return frozenset()
    if _DOUBTFUL.search(condition.source):
        return None
    tokens = [_Token(m.lastgroup or "", m[m.lastgroup or 0]) for m in _TOKENS.finditer(condition.source)]
    if any((a.text, b.text) == ("/", "/") for a, b in zip(tokens, tokens[1:], strict=False)):
        return None
    found: set[str] = set()
    for index, token in enumerate(tokens):
        if token == _Token("name", variable) and not _is_member(tokens, index):
            name = _read_at(tokens, index)
            if name is None:
                return None
            found.add(name)
    return frozenset(found) or None


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str = ""
    text: str = ""


_NOTHING = _Token()


def _at(tokens: list[_Token], index: int) -> _Token:
    return tokens[index] if 0 <= index < len(tokens) else _NOTHING


def _is_member(tokens: list[_Token], index: int) -> bool:
    """Whether the name is selected from something else, as in `request.claims`; a leading dot selects from nothing."""
    if _at(tokens, index - 1).text != ".":
        return False
    before = _at(tokens, index - 2)
    return before.text in (")", "]", "}") or (before.kind in ("name", "string", "number") and before.text != "in")


def _read_at(tokens: list[_Token], index: int) -> str | None:
    """The one member read where the variable stands: `x.NAME`, `x["NAME"]` or `"NAME" in x`; None if it is not one."""
    one, two, three = (_at(tokens, index + n) for n in (1, 2, 3))
    if _at(tokens, index - 1).text == ".":
        return None
    if one.text == "." and two.kind == "name":
        return None if three.text == "(" else two.text
    if one.text == "[" and two.kind == "string" and three.text == "]":
        return two.text[1:-1]
    if _at(tokens, index - 1) == _Token("name", "in") and one.text not in (".", "["):
        return _membership(tokens, index)
    return None


def _membership(tokens: list[_Token], index: int) -> str | None:
    """The name in `"NAME" in x`, if nothing binds tighter to either side of it."""
    name, before = _at(tokens, index - 2), _at(tokens, index - 3)
    doubled = before.text + _at(tokens, index - 4).text  # the signs of && and || come one by one
    begins = before is _NOTHING or before.text == "(" or doubled in _OPERATORS
    after = _at(tokens, index + 1)
    ends = after is _NOTHING or after.text in (")", "&", "|")
    return name.text[1:-1] if name.kind == "string" and begins and ends else None
