"""A CEL condition, compiled at load. A condition that fails is a non-match, never a grant.

Source: the Common Expression Language (cel-spec), as the package `common-expression-language` implements it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import cel
import re2

from ext_authz.core.cel_source import MATCHES, SIZE, prepare

MAX_PATTERN = 1000  # instructions of a compiled pattern

VARIABLES = frozenset({"claims", "request"})

# Operators appear in Program.functions() as `_==_` and the like; these are the named functions that can be called.
FUNCTIONS = frozenset(
    (
        "size", "contains", "startsWith", "endsWith", "matches", "string", "int", "uint", "double", "bytes", "has",
        "type", "all", "exists", "exists_one", "map", "filter", "max", "min", "duration", "timestamp", "getFullYear",
        "getMonth", "getDayOfYear", "getDayOfMonth", "getDate", "getDayOfWeek", "getHours", "getMinutes", "getSeconds",
        "getMilliseconds",
    )
)  # fmt: skip
# What `type` gives, which look like variables.
TYPES = frozenset(("int", "uint", "double", "bool", "string", "bytes", "list", "map", "null_type", "type"))

_CALLABLE = FUNCTIONS - {"size", "matches"} | {SIZE, MATCHES}


class Truth(Enum):
    """The three outcomes of a condition. ERROR counts as a non-match."""

    YES = "yes"
    NO = "no"
    ERROR = "error"


@dataclass(frozen=True, slots=True, eq=False)
class Condition:
    """A compiled condition. `where` is its path in the policy (`clearance[0].when`), `line` its line number.

    `max_entries` is how many entries its macros may range over, None if it has no macro.
    """

    source: str
    where: str
    line: int
    reads: frozenset[str]
    program: cel.Program
    max_entries: int | None = None

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
        return cel.Context(variables=variables, functions=_OWN)
    except ValueError:
        return cel.Context(variables={}, functions=_OWN)


def _size(value: Any) -> int:
    """`size` of CEL: code points of a text, where `cel` counts bytes. TypeError for what has none."""
    return len(value)


def _matches(text: str, pattern: str) -> bool:
    """`matches` of CEL, with a pattern that is compiled once and takes time linear in the text."""
    return _pattern(pattern).search(text.encode()) is not None


@lru_cache(4096)
def _pattern(text: str) -> Any:
    """A compiled RE2 pattern. ValueError if it is none, or too large."""
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.max_mem = 256 * 1024
    try:
        compiled = re2.compile(text, options=options)
    except re2.error as e:
        reason = e.args[0].decode("utf-8", "replace") if isinstance(e.args[0], bytes) else str(e.args[0])
        raise ValueError(f"not an RE2 pattern: {reason}") from None
    if compiled.programsize > MAX_PATTERN:
        raise ValueError("the pattern is too large")
    return compiled


_OWN: dict[str, Callable[..., Any]] = {SIZE: _size, MATCHES: _matches}


def compile_condition(source: str, where: str, line: int, allowed: frozenset[str] = VARIABLES) -> Condition:
    """Compile `source`. Raises a one-line ValueError if it does not parse or reads a variable not in `allowed`."""
    try:
        text = prepare(source)
        cel.compile(source)  # for its messages, which name places in this text
        program = cel.compile(text.compiled)
        for literal in text.patterns:
            _pattern(str(cel.compile(literal).execute(cel.Context())))
    except ValueError as e:
        raise ValueError(_plain(str(e))) from None
    if hidden := sorted(text.elements & VARIABLES):
        raise ValueError(f"`{hidden[0]}` cannot name an element here: it is a variable of conditions")
    named = {f for f in program.functions() if not f.startswith(("_", "@", "!", "-"))}
    reads = frozenset(program.variables()) - text.elements - (TYPES if "type" in named else frozenset())
    if unknown := sorted(reads - VARIABLES):
        raise ValueError(f"unknown variable `{unknown[0]}`; a condition reads {_names(allowed)}")
    if forbidden := sorted(reads - allowed):
        raise ValueError(f"`{forbidden[0]}` cannot be read here; this condition reads {_names(allowed)}")
    if unknown := sorted(named - _CALLABLE):
        raise ValueError(f"unknown function `{unknown[0]}`")
    return Condition(source, where, line, reads, program, text.max_entries)


def _names(names: frozenset[str]) -> str:
    return " and ".join(f"`{n}`" for n in sorted(names))


_PARSER = re.compile(r"<input>:\d+:(\d+): (?:Syntax error: )?(.*)")
_UNEXPECTED = re.compile(r"(?:mismatched|extraneous) input '(.*?)' expecting|no viable alternative at input '(.*?)'$")
_UNREADABLE = re.compile(r"token recognition error at: '(.*)'$")


def _plain(message: str) -> str:
    """A parser's message in words; any other as it is. Its first line is `...<input>:1:8: Syntax error: ...`."""
    found = _PARSER.search(message)
    if found is None:
        return message.splitlines()[0]
    at, what = found[1], found[2]
    if unexpected := _UNEXPECTED.search(what):
        word = unexpected[1] or unexpected[2]
        what = "ends too early" if word == "<EOF>" else f"unexpected `{word}`"
    elif unreadable := _UNREADABLE.search(what):
        what = f"cannot read `{unreadable[1].strip()}`"
    return f"{what} (at character {at})"
