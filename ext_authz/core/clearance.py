"""Clearance: from verified claims to a tier. Pure."""

from __future__ import annotations

from ext_authz.core.condition import Truth, context
from ext_authz.core.model import Claims
from ext_authz.core.policy import Policy

MAX_KEY = 512  # characters of a set of claims; the tiers of larger sets are not cached


def clearance(policy: Policy, claims: Claims) -> tuple[int, tuple[str, ...]]:
    """The tier for verified claims, and the rules that could not be evaluated.

    The first rule that holds gives the tier. If none holds, it is the lowest tier.
    """
    if not policy.clearance:
        return 0, ()
    if policy.claims_read is None:
        return _clearance(policy, claims)
    read = claims_read(policy, claims)
    key = repr(read)  # distinguishes all JSON values: 1, 1.0, True and "1" differ
    if len(key) > MAX_KEY:
        return _clearance(policy, read)
    tier = policy.tiers_cached.get(key)
    if tier is None:
        tier = _clearance(policy, read)
        policy.tiers_cached.put(key, tier)
    return tier


def _clearance(policy: Policy, claims: Claims) -> tuple[int, tuple[str, ...]]:
    variables = context(claims)
    errors: list[str] = []
    for rule in policy.clearance:
        truth = rule.when.holds(variables)
        if truth is Truth.YES:
            return rule.tier, tuple(errors)
        if truth is Truth.ERROR:
            errors.append(rule.when.where)
    return 0, tuple(errors)


def claims_read(policy: Policy, claims: Claims) -> Claims:
    """The claims that conditions may read. Converting the others to CEL values would be expensive and useless."""
    if policy.claims_read is None:
        return claims
    return {name: claims[name] for name in policy.claims_read if name in claims}
