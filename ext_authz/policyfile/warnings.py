"""What is valid in a policy but certainly not intended. A warning changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ext_authz.core.condition import Condition, Truth, context
from ext_authz.core.jwk import parse_jwks
from ext_authz.core.policy import Policy
from ext_authz.policyfile.source import quoted

MAX_LISTED = 10  # experts that the warnings name


def dropped(old: Policy, new: Policy) -> list[str]:
    """A line for each expert of `old` that `new` lacks."""
    lost = (name for name in old.experts if name not in new.experts)
    return [f"expert {quoted(name)} is gone; a request that names it is now `unknown_expert`" for name in lost]


def warnings(policy: Policy) -> list[str]:
    """What is valid but certainly not intended, one line each."""
    if policy.anonymous is None and not policy.issuers:
        return ["nobody gets in: `anonymous` is `deny`, and there are no issuers"]
    if policy.clearance and not policy.issuers:
        return ["clearance: no rule is ever used, because there are no issuers", *_unreachable(policy)]
    return [*_idle_rules(policy), *_unreachable(policy)]


def key_warnings(policy: Policy) -> Iterator[str]:
    """A line for each key of a JWKS file that will be skipped, and for each file without any key to verify with."""
    for issuer in policy.issuers.values():
        if issuer.jwks is None or issuer.jwks.file is None:
            continue
        found = parse_jwks(Path(issuer.jwks.file).read_bytes())
        yield from (f"issuer {quoted(issuer.issuer)}: {line}; it is skipped" for line in found.skipped)
        if not found.keys:
            yield f"issuer {quoted(issuer.issuer)}: the file holds no usable key, so its tokens are refused"


def _idle_rules(policy: Policy) -> Iterator[str]:
    """The clearance rules that can never give a caller their tier."""
    seen: dict[str, str] = {}
    for rule in policy.clearance:
        where, source = rule.when.where, rule.when.source
        truth = _constant(rule.when)
        if truth in (Truth.NO, Truth.ERROR):
            yield f"line {rule.when.line}: {where}: never true"
        elif source in seen:
            yield f"line {rule.when.line}: {where}: never reached: {seen[source]} is the same condition"
        seen.setdefault(source, where)
        if truth is Truth.YES:
            if rule is not policy.clearance[-1]:
                yield f"line {rule.when.line}: {where}: always true; the rules after it are never reached"
            return


def _unreachable(policy: Policy) -> list[str]:
    """The experts that no caller can reach, by name up to MAX_LISTED."""
    ceiling = max(_clearances(policy))
    high = [e for e in policy.experts.values() if e.tier > ceiling]
    never = [
        e
        for e in policy.experts.values()
        if e.tier <= ceiling and e.allow and _constant(e.allow) in (Truth.NO, Truth.ERROR)
    ]
    if len(high) + len(never) == len(policy.experts):
        return ["nobody gets in: no caller can reach any expert"]
    top = quoted(policy.tiers[ceiling])
    lines = [
        *(f"line {e.line}: experts.{e.name}: nobody can reach it: no caller gets a tier above {top}" for e in high),
        *(f"line {e.line}: experts.{e.name}: nobody can reach it: `allow` is never true" for e in never),
    ]
    more = len(lines) - MAX_LISTED
    return lines if more <= 0 else [*lines[:MAX_LISTED], f"experts: nobody can reach {more} more"]


def _clearances(policy: Policy) -> Iterator[int]:
    """Every tier that some caller may get."""
    if policy.anonymous is not None:
        yield policy.anonymous
    if not policy.issuers:
        return
    for rule in policy.clearance:
        truth = _constant(rule.when)
        if truth not in (Truth.NO, Truth.ERROR):
            yield rule.tier
        if truth is Truth.YES:
            return
    yield 0


def _constant(condition: Condition) -> Truth | None:
    """The outcome of a condition for every caller, if it reads nothing; otherwise None."""
    if condition.reads:
        return None
    return condition.holds(context({}))
