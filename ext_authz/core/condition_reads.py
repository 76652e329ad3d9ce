"""Which members of `claims` or `request` a condition reads, where its text tells for certain.

A condition whose text leaves any doubt reads them all. Source of the syntax: cel-spec, Language Definition, Syntax.
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
    joined: bool = False  # to the token before it, without a space


_NOTHING = _Token()


def members(condition: Condition, variable: str) -> Members:
    """The members of `variable` that the condition's outcome can depend on; None if it may be any."""
    if variable not in condition.reads:
        return frozenset()
    tokens = _tokens(condition.source)
    found = {_read_at(tokens, i) for i, t in enumerate(tokens) if t.text == variable and _at(tokens, i - 1).text != "."}
    known = frozenset(name for name in found if name is not None)
    return known if known and len(known) == len(found) and not _doubtful(tokens) else None


def _tokens(source: str) -> list[_Token]:
    tokens: list[_Token] = []
    end = -1
    for found in _TOKENS.finditer(source):
        tokens.append(_Token(found.lastgroup or "", found[0], found.start() == end))
        end = found.end()
    return tokens


def _doubtful(tokens: list[_Token]) -> bool:
    """Escapes, comments, prefixed and triple-quoted strings: too rare to be worth reading."""
    strings = any(
        b.kind == "string" and (a.kind == "string" or (b.joined and a.kind == "name")) for a, b in pairwise(tokens)
    )
    return strings or any(t.kind == "sign" and t.text in ("\\", "//", "'", '"') for t in tokens)


def _at(tokens: list[_Token], index: int) -> _Token:
    return tokens[index] if 0 <= index < len(tokens) else _NOTHING


def _read_at(tokens: list[_Token], index: int) -> str | None:
    """The one member read where the variable stands: `x.NAME`, `x["NAME"]` or `"NAME" in x`; None if it is not one."""
    before, one, two, three = (_at(tokens, index + n) for n in (-1, 1, 2, 3))
    if one.text == "." and two.kind == "name":
        return None if three.text == "(" else two.text
    if one.text == "[":
        return two.text[1:-1] if two.kind == "string" and three.text == "]" else None
    if before.text == "in" and one.text in ("", ")", "&&", "||"):
        # Whatever binds tighter than `in` would make another name of the string.
        name, begins = _at(tokens, index - 2), _at(tokens, index - 3).text in ("", "(", "&&", "||")
        return name.text[1:-1] if name.kind == "string" and begins else None
    return None
