"""The text of a condition before CEL sees it: its tokens, the bounds on its work, and what replaces two functions.

`cel` evaluates `filter` and `map` in quadratic time and compiles a pattern at each evaluation, so what it is given is
bounded here: no macro inside another, few of them, short literals beside them. What a macro ranges over is bounded by
`Policy.max_entries`. Source of the syntax: cel-spec, Language Definition, Syntax.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

MAX_LENGTH = 2048  # characters; the parser's stack and its error printer are not made for more
MAX_NESTING = 32  # brackets open at once
MAX_MACROS = 2
MAX_LITERALS = 64  # commas in a condition with macros

# For how many entries of claims or request a macro stays within a fraction of a millisecond.
_LINEAR, _QUADRATIC = 256, 64
_MACROS = {
    "all": _LINEAR, "exists": _LINEAR, "exists_one": _LINEAR, "existsOne": _LINEAR,
    "filter": _QUADRATIC, "map": _QUADRATIC,
}  # fmt: skip

SIZE, MATCHES = "srp_size", "srp_matches"  # what stands for `size` and `matches`
_OWN = {"size": SIZE, "matches": MATCHES}

_TOKENS = re.compile(
    r"""(?P<space>\s+)
    |(?P<refused>[rRbB]{0,2}(?:\"{3}|'{3})|//)
    |(?P<raw>(?:[rR][bB]?|[bB][rR])(?:"[^"\n]*"|'[^'\n]*'))
    |(?P<string>[bB]?(?:"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'))
    |(?P<name>[A-Za-z_]\w*)
    |(?P<number>\d[\w.]*)
    |(?P<sign>.)""",
    re.ASCII | re.VERBOSE,
)
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """A condition's text that keeps the bounds. `compiled` is what CEL gets, `patterns` are the literals in it.

    `max_entries` is how many entries its macros may range over, None if it has none; `elements` are their variables.
    """

    compiled: str
    patterns: tuple[str, ...]
    max_entries: int | None
    elements: frozenset[str]


def prepare(text: str) -> Source:
    """Check a condition's text and replace `size` and `matches`; a one-line ValueError if it breaks a bound."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"expression of {len(text)} characters, at most {MAX_LENGTH} are allowed")
    if odd := next((c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") and c not in "\t\n"), None):
        raise ValueError(f"the character U+{ord(odd):04X} is not allowed")
    tokens = [token for token in _tokens(text) if token.kind != "space"]
    macros = list(_macros(tokens))
    if len(macros) > MAX_MACROS:
        raise ValueError(f"{len(macros)} macros (`{macros[0]}`, ...), at most {MAX_MACROS} are allowed")
    if macros and sum(token.text == "," for token in tokens) > MAX_LITERALS:
        raise ValueError(f"over {MAX_LITERALS} commas in a condition with a macro (`{macros[0]}`)")
    limit = min((_MACROS[name] for name in macros), default=None)
    patterns = tuple(_patterns(tokens))
    return Source(_replaced(text), patterns, limit, frozenset(_elements(tokens)))


def _tokens(text: str) -> Iterator[Token]:
    for found in _TOKENS.finditer(text):
        kind = found.lastgroup or ""
        if kind == "refused":
            what = "a comment; write it in YAML" if found[0] == "//" else "text in triple quotes; use one quote"
            raise ValueError(f"{what}, at character {found.start() + 1}")
        if kind == "name" and (found[0] in _OWN.values()):
            raise ValueError(f"unknown function `{found[0]}`")
        yield Token(kind, found[0])


def _macros(tokens: list[Token]) -> Iterator[str]:
    """The names of the macros. ValueError if one is inside another, or if brackets are nested too deep."""
    open_brackets: list[str | None] = []  # for each, the macro that it belongs to
    for index, token in enumerate(tokens):
        if token.kind != "sign":
            continue
        if token.text in _OPEN:
            name = _called(tokens, index)
            macro = name if token.text == "(" and name in _MACROS else None
            if macro and (outer := next(filter(None, open_brackets), None)):
                raise ValueError(f"`{macro}` inside `{outer}`: macros cannot be nested")
            open_brackets.append(macro)
            if len(open_brackets) > MAX_NESTING:
                raise ValueError(f"expression nested more than {MAX_NESTING} brackets deep")
            if macro:
                yield macro
        elif token.text in _CLOSE and open_brackets:
            open_brackets.pop()


def _called(tokens: list[Token], index: int) -> str | None:
    """The name before the bracket at `index`."""
    return tokens[index - 1].text if index and tokens[index - 1].kind == "name" else None


def _elements(tokens: list[Token]) -> Iterator[str]:
    for index, token in enumerate(tokens):
        if token.text == "(" and _called(tokens, index) in _MACROS and index + 1 < len(tokens):
            yield tokens[index + 1].text


def _patterns(tokens: list[Token]) -> Iterator[str]:
    """The literal that each call of `matches` ends with; ValueError if it ends with anything else."""
    for index, token in enumerate(tokens):
        if token.text == "(" and token.kind == "sign" and _called(tokens, index) == "matches":
            end = _end(tokens, index)
            last, before = tokens[end - 1], tokens[end - 2].text
            if last.kind not in ("string", "raw") or before not in ("(", ","):
                raise ValueError("the pattern of `matches` must be written out")
            yield last.text


def _end(tokens: list[Token], index: int) -> int:
    """Where the bracket at `index` is closed; the end of the tokens if nowhere, which CEL reports."""
    depth = 0
    for at in range(index, len(tokens)):
        if tokens[at].kind == "sign":
            depth += (tokens[at].text in _OPEN) - (tokens[at].text in _CLOSE)
            if depth == 0:
                return at
    return len(tokens)


def _replaced(text: str) -> str:
    tokens = list(_tokens(text))
    solid = [index for index, token in enumerate(tokens) if token.kind != "space"]
    called = {a for a, b in itertools.pairwise(solid) if tokens[b].text == "(" and tokens[a].kind == "name"}
    return "".join(_OWN.get(t.text, t.text) if i in called else t.text for i, t in enumerate(tokens))
