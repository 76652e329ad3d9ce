"""A CEL condition, compiled at load. A condition that fails is a non-match, never a grant.

Source: the Common Expression Language (cel-spec), as the package `common-expression-language` implements it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import cel

MAX_LENGTH = 2048  # characters; the parser's stack and its error printer are not made for more
MAX_NESTING = 32  # brackets open at once

VARIABLES = frozenset({"claims", "request"})

# Operators appear in Program.functions() as `_==_` and the like; these are the named functions that cel implements.
FUNCTIONS = frozenset(
    (
        "size", "contains", "startsWith", "endsWith", "matches", "string", "int", "uint", "double", "bytes", "has",
        "type", "all", "exists", "exists_one", "map", "filter", "max", "min", "duration", "timestamp", "getFullYear",
        "getMonth", "getDayOfYear", "getDayOfMonth", "getDate", "getDayOfWeek", "getHours", "getMinutes", "getSeconds",
        "getMilliseconds",
    )
)  # fmt: skip

_BINDERS = re.compile(r"\.\s*(?:all|exists|exists_one|existsOne|map|filter)\s*\(\s*([A-Za-z_]\w*)\s*,")
_STRINGS = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'")


class Truth(Enum):
    """The three outcomes of a condition. ERROR counts as a non-match."""

    YES = "yes"
    NO = "no"
    ERROR = "error"


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """A compiled condition. `where` is its path in the policy (`clearance[0].when`), `line` its line number."""

    source: str
    where: str
    line: int
    reads: frozenset[str]
    program: cel.Program

    def holds(self, context: cel.Context) -> Truth:
        """Whether the condition holds in `context`. Any result other than a CEL `true` or `false` is an ERROR."""
        try:
            value = self.program.execute(context)
        except Exception:  # noqa: BLE001 - the binding raises KeyError, TypeError, ValueError and RuntimeError
            return Truth.ERROR
        return Truth.YES if value is True else Truth.NO if value is False else Truth.ERROR


def context(claims: Mapping[str, Any], request: Mapping[str, Any] | None = None) -> cel.Context:
    """The variables that a condition may read. Build it once and evaluate many conditions with it.

    If CEL cannot hold a value (a lone surrogate in a claim), the context is empty: conditions that read it are ERROR.
    """
    variables: dict[str, Any] = {"claims": dict(claims)}
    if request is not None:
        variables["request"] = dict(request)
    try:
        return cel.Context(variables=variables)
    except ValueError:
        return cel.Context(variables={})


def compile_condition(source: str, where: str, line: int, allowed: frozenset[str] = VARIABLES) -> Condition:
    """Compile `source`. Raises a one-line ValueError if it does not parse or reads a variable not in `allowed`."""
    bare = _STRINGS.sub('""', source)
    if len(source) > MAX_LENGTH:
        raise ValueError(f"expression of {len(source)} characters, at most {MAX_LENGTH} are allowed")
    if _nesting(bare) > MAX_NESTING:
        raise ValueError(f"expression nested more than {MAX_NESTING} brackets deep")
    try:
        program = cel.compile(source)
    except ValueError as e:
        raise ValueError(_first_line(str(e))) from None
    bound = frozenset(_BINDERS.findall(bare))
    if hidden := sorted(bound & VARIABLES):
        raise ValueError(f"`{hidden[0]}` cannot name an element here: it is a variable of conditions")
    reads = frozenset(program.variables()) - bound
    if unknown := sorted(reads - VARIABLES):
        raise ValueError(f"unknown variable `{unknown[0]}`; a condition reads {_names(allowed)}")
    if forbidden := sorted(reads - allowed):
        raise ValueError(f"`{forbidden[0]}` cannot be read here; this condition reads {_names(allowed)}")
    named = {f for f in program.functions() if not f.startswith(("_", "@", "!", "-"))}
    if unknown := sorted(named - FUNCTIONS):
        raise ValueError(f"unknown function `{unknown[0]}`")
    return Condition(source, where, line, reads, program)


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth -= 1
    return deepest


def _names(names: frozenset[str]) -> str:
    return " and ".join(f"`{n}`" for n in sorted(names))


def _first_line(message: str) -> str:
    """The error and its position in `Failed to parse expression 'X': ERROR: <input>:1:8: Syntax error: ...`."""
    found = re.search(r"<input>:\d+:(\d+): (.*)", message)
    return f"{found[2]} (at character {found[1]})" if found else message.splitlines()[0]
