"""Clearance: from verified claims to a tier. Pure."""

from __future__ import annotations

from ext_authz.core.condition import Truth, context
from ext_authz.core.model import Claims
from ext_authz.core.policy import ClearanceRule, Policy

MAX_KEY = 512  # characters of a set of claims; the tiers of larger sets are not cached


def clearance(policy: Policy, claims: Claims) -> tuple[int, tuple[str, ...]]:
    """The tier for verified claims, and the rules that could not be evaluated.

    The first rule that holds gives the tier; if none holds, it is the lowest. A rule that could not be evaluated might
    have held, so it caps the tier: nobody gets more because a rule failed than if it had held, or had not.
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
    tier, _, errors = deciding(policy, claims)
    return tier, errors


def deciding(policy: Policy, claims: Claims) -> tuple[int, ClearanceRule | None, tuple[str, ...]]:
    """The tier for claims, the rule that gave it (None: no rule, so the lowest tier), and the rules that failed."""
    variables = context(claims_read(policy, claims))
    errors: list[str] = []
    cap: ClearanceRule | None = None
    for rule in policy.clearance:
        truth = rule.when.holds(variables)
        if truth is Truth.YES:
            lower = cap if cap is not None and cap.tier < rule.tier else rule
            return lower.tier, lower, tuple(errors)
        if truth is Truth.ERROR:
            errors.append(rule.when.where)
            cap = rule if cap is None or rule.tier < cap.tier else cap
    return 0, None, tuple(errors)


def claims_read(policy: Policy, claims: Claims) -> Claims:
    """The claims that conditions may read. Converting the others to CEL values would be expensive and useless."""
    if policy.claims_read is None:
        return claims
    return {name: claims[name] for name in policy.claims_read if name in claims}
