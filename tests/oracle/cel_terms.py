"""The terms of the part of CEL that the generated policies use, evaluated by the CEL specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Variables = dict[str, Any]
Expression = Callable[[Variables], Any]


class CelError(Exception):
    """An expression cannot be evaluated."""


class _AbsentError(CelError):
    """The last step of a path leads to nothing."""


def variable(variables: Variables, name: str) -> Any:
    if name not in variables:
        raise CelError(name)
    return variables[name]


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise CelError("not a boolean")
    return value


def negated(operand: Expression) -> Expression:
    return lambda v: not _boolean(operand(v))


def either(left: Expression, right: Expression) -> Expression:
    """True if one side is, even if the other cannot be evaluated."""

    def evaluate(variables: Variables) -> bool:
        try:
            return _boolean(left(variables)) or _boolean(right(variables))
        except CelError:
            if _boolean(right(variables)):
                return True
            raise

    return evaluate


def _no(_: Variables) -> bool:
    return False


def some(values: Expression, name: str, test: Expression) -> Expression:
    """`exists`: an `||` over the elements of a list, or the keys of a map."""

    def evaluate(variables: Variables) -> bool:
        found: Expression = _no
        container = values(variables)
        if not isinstance(container, (list, dict)):
            raise CelError("no elements")
        for element in container:
            found = either(found, lambda v, element=element: test({**v, name: element}))
        return bool(found(variables))

    return evaluate


def has(operand: Expression) -> Expression:
    """Whether a member is there; an error if what it would be a member of cannot be evaluated."""

    def evaluate(variables: Variables) -> bool:
        try:
            operand(variables)
        except _AbsentError:
            return False
        return True

    return evaluate


def member(container: Expression, key: Expression) -> Expression:
    def evaluate(variables: Variables) -> Any:
        try:
            value, at = container(variables), key(variables)
        except CelError as e:
            raise CelError(str(e)) from None
        if isinstance(value, dict) and isinstance(at, str):
            if at not in value:
                raise _AbsentError(at)
            return value[at]
        if isinstance(value, list) and isinstance(at, int) and at < len(value):
            return value[at]
        raise CelError("no such overload")

    return evaluate


def size(operand: Expression) -> Expression:
    """Of a text, its bytes in UTF-8."""

    def evaluate(variables: Variables) -> int:
        value = operand(variables)
        if not isinstance(value, (str, list, dict)):
            raise CelError("no size")
        return len(value)

    return evaluate


def text_test(name: str, value: Expression, argument: Expression) -> Expression:
    def evaluate(variables: Variables) -> bool:
        text, part = value(variables), argument(variables)
        if not isinstance(text, str) or not isinstance(part, str):
            raise CelError("not a text")
        tests = {"startsWith": text.startswith(part), "endsWith": text.endswith(part), "contains": part in text}
        return tests[name]

    return evaluate


def comparison(relation: str, left: Expression, right: Expression) -> Expression:
    def evaluate(variables: Variables) -> bool:
        a, b = left(variables), right(variables)
        if relation == "in":
            if isinstance(b, dict):
                return a in b
            if isinstance(b, list):
                return any(_equal(a, element) for element in b)
            raise CelError("not a container")
        if relation in ("==", "!="):
            return _equal(a, b) is (relation == "==")
        if _kind(a) != _kind(b) or _kind(a) not in ("number", "text", "boolean"):
            raise CelError("no order")
        return bool({"<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[relation])

    return evaluate


def _equal(a: Any, b: Any) -> bool:
    """CEL's equality: numbers by value, whatever their type; other types are never equal to one another."""
    if _kind(a) != _kind(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return bool(a == b)


def _kind(value: Any) -> str:
    for kind, types in (("boolean", bool), ("number", (int, float)), ("text", str), ("list", list), ("map", dict)):
        if isinstance(value, types):
            return kind
    return "null"
