"""Who may serve a request: docs/policy.md, "The decision", and what an expert's keys say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.oracle.cel_subset import claims_read, holds, truth
from tests.oracle.cel_terms import Variables

Policy = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What is decided. `serve` and `standby` are experts; `struck` are the others that were requested, and why."""

    verdict: str
    reason: str
    serve: Sequence[str] = ()
    standby: Sequence[str] = ()
    struck: Mapping[str, str] = field(default_factory=dict)


def variables_of(policy: Policy, claims: Mapping[str, Any], request: Mapping[str, Any]) -> Variables:
    """What conditions read. None of them can be evaluated if one of them reads a claim that CEL has no value for."""
    rules = [rule["when"] for rule in policy.get("clearance", [])]
    rules += [expert["allow"] for expert in policy["experts"].values() if "allow" in expert]
    read = [claims_read(rule) for rule in rules]
    concerned = [value for name, value in claims.items() if any(names is None or name in names for names in read)]
    return {"claims": claims, "request": request} if all(map(_has_value, concerned)) else {}


def _has_value(value: Any) -> bool:
    """Whether CEL can hold it: no text with half a surrogate pair, no integer beyond a double."""
    if isinstance(value, (dict, list)):
        parts = (*value, *value.values()) if isinstance(value, dict) else value
        return all(map(_has_value, parts))
    try:
        value.encode() if isinstance(value, str) else float(value or 0)
        return True
    except (UnicodeEncodeError, OverflowError):
        return False


def tier_of(policy: Policy, variables: Variables, anonymous: bool) -> str:
    """The caller's tier: the first clearance rule that holds, at most that of any before it that cannot be evaluated;
    otherwise the lowest."""
    if anonymous:
        return str(policy["anonymous"])
    tiers, failed = policy["tiers"], []
    for rule in policy.get("clearance", []):
        outcome = truth(rule["when"], variables)
        if outcome:
            return str(min([rule["tier"], *failed], key=tiers.index))
        if outcome is None:
            failed.append(rule["tier"])
    return str(tiers[0])


def decide(policy: Policy, tier: str, variables: Variables, requested: Sequence[str], downgrade: bool) -> Verdict:
    """The verdict on a request for these experts, all of which exist."""
    struck = {name: why for name in requested if (why := _struck(policy, tier, variables, name))}
    permitted = [name for name in requested if name not in struck]
    others = [other for name in requested for other in policy["experts"][name].get("downgrade_to", [])]
    instead = [name for name in dict.fromkeys(others) if not _struck(policy, tier, variables, name)]
    serve = permitted or instead
    if serve == requested:
        lenient = len(requested) == 1 and policy["experts"][requested[0]].get("unavailable") == "downgrade"
        return Verdict("allow", "permitted", serve, instead if lenient and downgrade else ())
    reason = next(iter(struck.values()))
    if serve and downgrade:
        return Verdict("downgrade", reason, serve, (), struck)
    return Verdict("deny", "downgrade_forbidden" if serve else reason, (), (), struck)


def _struck(policy: Policy, tier: str, variables: Variables, name: str) -> str:
    """Why the caller may not reach an expert; empty if it may."""
    expert, order = policy["experts"][name], policy["tiers"]
    if order.index(expert["tier"]) > order.index(tier):
        return "tier_too_low"
    return "" if "allow" not in expert or holds(expert["allow"], variables) else "not_allowed"
