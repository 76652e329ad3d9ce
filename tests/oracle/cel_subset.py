"""The part of CEL that the generated policies use, parsed by hand: a condition becomes a function of its variables."""

from __future__ import annotations

import re
from functools import lru_cache

from tests.oracle import cel_terms
from tests.oracle.cel_terms import CelError, Expression, Variables

_TOKEN = re.compile(r'\s*("[^"\\]*"|\d+\.\d+|\d+|\w+|\|\||&&|==|!=|<=|>=|[!<>()\[\].,])\s*')
_CLAIM = re.compile(r'\bclaims\.(\w+)\b(?!\()|\bclaims\["(\w+)"\]|"(\w+)" in claims\b(?![.\[])')
_HEADER = re.compile(r'request\.headers\["([^"]+)"\]|"([^"]+)" in request\.headers\b(?![.\[])')
_RELATIONS = ("==", "!=", "<=", ">=", "<", ">", "in")


def holds(text: str, variables: Variables) -> bool:
    """Whether a condition evaluates to `true`: neither an error nor any other value does."""
    return truth(text, variables) is True


def truth(text: str, variables: Variables) -> bool | None:
    """What a condition evaluates to; None: neither `true` nor `false`."""
    try:
        value = compiled(text)(variables)
    except CelError:
        return None
    return value if isinstance(value, bool) else None


def claims_read(text: str) -> set[str] | None:
    """The claims that a condition reads; None: all of them, as in `size(claims)`."""
    named = {next(filter(None, found)) for found in _CLAIM.findall(text)}
    return named if len(_CLAIM.findall(text)) == len(re.findall(r"\bclaims\b", text)) else None


def headers_read(text: str) -> set[str] | None:
    """The headers that a condition reads; None: all of them, as in `size(request.headers)`."""
    named = {next(filter(None, found)) for found in _HEADER.findall(text)}
    return named if len(_HEADER.findall(text)) == len(re.findall(r"\brequest\.headers\b", text)) else None


@lru_cache(1024)
def compiled(text: str) -> Expression:
    parser = _Parser(_TOKEN.findall(text))
    expression = parser.either()
    if parser.tokens or _TOKEN.sub("", text):
        raise SyntaxError(text)
    return expression


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens

    def either(self) -> Expression:
        left = self.both()
        while self._next("||"):
            left = cel_terms.either(left, self.both())
        return left

    def both(self) -> Expression:
        left = self.relation()
        while self._next("&&"):
            left = cel_terms.negated(cel_terms.either(cel_terms.negated(left), cel_terms.negated(self.relation())))
        return left

    def relation(self) -> Expression:
        left = self.unary()
        if self.tokens and self.tokens[0] in _RELATIONS:
            return cel_terms.comparison(self.tokens.pop(0), left, self.unary())
        return left

    def unary(self) -> Expression:
        return cel_terms.negated(self.unary()) if self._next("!") else self.member()

    def member(self) -> Expression:
        value = self.primary()
        while self.tokens and self.tokens[0] in (".", "["):
            if self.tokens.pop(0) == "[":
                value = cel_terms.member(value, self.either())
                self._expect("]")
                continue
            name = self.tokens.pop(0)
            value = self._call(name, value) if self._next("(") else cel_terms.member(value, lambda _, name=name: name)
        return value

    def primary(self) -> Expression:
        token = self.tokens.pop(0)
        if token == "(":
            inner = self.either()
            self._expect(")")
            return inner
        if token == "[":
            items = self._arguments("]")
            return lambda v: [item(v) for item in items]
        if token[0] == '"':
            return lambda _: token[1:-1]
        if token[0].isdigit():
            number = float(token) if "." in token else int(token)
            return lambda _: number
        if token in ("true", "false", "null"):
            return lambda _: {"true": True, "false": False, "null": None}[token]
        if not self._next("("):
            return lambda v: cel_terms.variable(v, token)
        [operand] = self._arguments(")")
        return cel_terms.has(operand) if token == "has" else cel_terms.size(operand)

    def _call(self, name: str, value: Expression) -> Expression:
        arguments = self._arguments(")") if name not in ("exists", "all") else []
        if arguments:
            return cel_terms.text_test(name, value, arguments[0])
        bound = self.tokens.pop(0)
        self._expect(",")
        test = self.either()
        self._expect(")")
        if name == "exists":
            return cel_terms.some(value, bound, test)
        return cel_terms.negated(cel_terms.some(value, bound, cel_terms.negated(test)))

    def _arguments(self, end: str) -> list[Expression]:
        found: list[Expression] = []
        while not self._next(end):
            found.append(self.either())
            self._next(",")
        return found

    def _next(self, token: str) -> bool:
        found = self.tokens[:1] == [token]
        if found:
            self.tokens.pop(0)
        return found

    def _expect(self, token: str) -> None:
        if not self._next(token):
            raise SyntaxError(f"expected {token} before {self.tokens}")
