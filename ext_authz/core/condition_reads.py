"""Which members of `claims` or `request` a condition reads, if its text leaves no doubt.

In case of doubt, the condition counts as reading all of them.
Source of the syntax: cel-spec, Language Definition, Syntax.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from ext_authz.core.condition import Condition

Members = frozenset[str] | None  # None: any of them

_TOKENS = re.compile(
    r"""(?P<string>"[^"\\\n]*"|'[^'\\\n]*')|(?P<name>[A-Za-z_]\w*)|(?P<number>\d[\w.]*)|(?P<sign>&&|\|\||//|\S)""",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str = ""
    text: str = ""
    joined: bool = False  # no space between it and the token before it


_NOTHING = _Token()


def members(condition: Condition, variable: str) -> Members:
    """The members of `variable` that the condition's outcome can depend on; None if it may depend on any of them."""
    if variable not in condition.reads:
        return frozenset()
    tokens = _tokens(condition.source)
    found = {_read_at(tokens, i) for i, t in enumerate(tokens) if t.text == variable and _at(tokens, i - 1).text != "."}
    known = frozenset(name for name in found if name is not None)
    return known if known and len(known) == len(found) and not _doubtful(tokens) else None


def headers(condition: Condition) -> Members:
    """The request headers that the condition's outcome can depend on; None if it may depend on any of them."""
    read = members(condition, "request")
    if read is None or "headers" not in read:
        return None if read is None else frozenset()
    found = _headers(condition)
    return None if not found or None in found else frozenset(name for name in found if name is not None)


def headers_named(condition: Condition) -> frozenset[str]:
    """The request headers that the condition names, whatever else it may read."""
    named = _headers(condition) if "request" in condition.reads else ()
    return frozenset(name for name in named if name is not None)


def _headers(condition: Condition) -> set[str | None]:
    """For each place that reads `request.headers`, the header that it names; None if it may be any."""
    # `request.headers` in one of these forms only: the variable is then as good as one that is named `headers`.
    tokens = _tokens(condition.source)
    found = set()
    for index, token in enumerate(tokens):
        width = _width(tokens, index) if token.text == "request" else 0
        if width:
            merged = [*tokens[:index], _Token("name", "headers"), *tokens[index + width :]]
            found.add(_read_at(merged, index))
    return found


def _width(tokens: list[_Token], index: int) -> int:
    """How many tokens `request.headers` or `request["headers"]` at `index` takes; 0 if it is neither."""
    _, one, two, three = (_at(tokens, index + n).text for n in range(4))
    if (one, two) == (".", "headers"):
        return 3
    return 4 if one == "[" and two[1:-1] == "headers" and three == "]" else 0


def _tokens(source: str) -> list[_Token]:
    tokens: list[_Token] = []
    end = -1
    for found in _TOKENS.finditer(source):
        tokens.append(_Token(found.lastgroup or "", found[0], found.start() == end))
        end = found.end()
    return tokens


def _doubtful(tokens: list[_Token]) -> bool:
    """Whether there are escapes, comments, or prefixed or triple-quoted strings: too rare to be worth parsing."""
    strings = any(
        b.kind == "string" and (a.kind == "string" or (b.joined and a.kind == "name")) for a, b in pairwise(tokens)
    )
    return strings or any(t.kind == "sign" and t.text in ("\\", "//", "'", '"') for t in tokens)


def _at(tokens: list[_Token], index: int) -> _Token:
    return tokens[index] if 0 <= index < len(tokens) else _NOTHING


def _read_at(tokens: list[_Token], index: int) -> str | None:
    """The member that the variable at `index` is read for: `x.NAME`, `x["NAME"]` or `"NAME" in x`; otherwise None."""
    before, one, two, three = (_at(tokens, index + n) for n in (-1, 1, 2, 3))
    if one.text == "." and two.kind == "name":
        return None if three.text == "(" else two.text
    if one.text == "[":
        return two.text[1:-1] if two.kind == "string" and three.text == "]" else None
    if before.text == "in" and one.text in ("", ")", "&&", "||"):
        # An operator that binds tighter than `in` would turn the string into another name.
        name, begins = _at(tokens, index - 2), _at(tokens, index - 3).text in ("", "(", "&&", "||")
        return name.text[1:-1] if name.kind == "string" and begins else None
    return None
