"""The smallest form of a difference: the fewest requests, headers and lines of the policy that still show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ext_authz.policyfile.source import PolicyError
from tests.oracle.answers import Request
from tests.oracle.policies import Case
from tests.oracle.runs import Difference, Step, differs

ATTEMPTS = 4000


def smallest(difference: Difference) -> Difference:
    """A difference that no single omission makes smaller."""
    left = ATTEMPTS
    alone = _tried(difference.case, difference.steps[-1:])
    best = alone or difference
    shrunk = True
    while shrunk and left > 0:
        shrunk = False
        for case, steps in _smaller(best):
            left -= 1
            if left < 0:
                break
            if found := _tried(case, steps):
                best, shrunk = found, True
                break
    return best


def _tried(case: Case, steps: Any) -> Difference | None:
    try:
        return differs(case, steps)
    except PolicyError:
        return None  # less than a policy


def _smaller(difference: Difference) -> Iterator[tuple[Case, Any]]:
    """The same with a bit less, the biggest bits first."""
    case, steps = difference.case, list(difference.steps)
    for size in (len(steps) // 2, len(steps) // 4, 1):
        for at in range(0, len(steps) - 1, max(size, 1)):
            if size:
                yield case, steps[:at] + steps[min(at + size, len(steps) - 1) :]
    if case.newer:
        yield replace(case, newer={}), steps
    if case.grants:
        yield replace(case, grants=False), steps
    for policy in _less(case.policy):
        yield case.with_policy(policy), steps
    for at, step in enumerate(steps):
        for less in _less_of(step):
            yield case, [*steps[:at], less, *steps[at + 1 :]]


def _less(value: Any) -> Iterator[Any]:
    """A mapping or list without one of its parts, or with less of it."""
    if not isinstance(value, (dict, list)):
        return
    keys = list(value) if isinstance(value, dict) else range(len(value))
    build: Callable[[Any], Any] = dict if isinstance(value, dict) else lambda pairs: [v for _, v in pairs]
    for key in keys:
        yield build((k, value[k]) for k in keys if k != key)
    for key in keys:
        for less in _less(value[key]):
            yield build((k, less if k == key else value[k]) for k in keys)


def _less_of(step: Step) -> Iterator[Step]:
    request, now = step
    for at in range(len(request.headers)):
        yield replace(request, headers=(*request.headers[:at], *request.headers[at + 1 :])), now
    plain = Request(request.method, request.path.partition("?")[0], request.headers, request.body)
    for less in (replace(request, body=b""), replace(plain, method="GET"), plain):
        if less != request:
            yield less, now
