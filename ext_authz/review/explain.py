"""`srp explain`: why a caller may or may not reach each expert, and which line of the policy decides it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from ext_authz.core import identity
from ext_authz.core.clearance import clearance, deciding
from ext_authz.core.decide import decide
from ext_authz.core.model import Claims, Decision, Identity, Reason, Refusal, Request
from ext_authz.core.policy import Policy
from ext_authz.sources.keys import KeyStore


@dataclass(frozen=True, slots=True)
class Line:
    """One expert: `kept`, or struck for `reason`. `rule` and `line` are the path and line number in the policy."""

    expert: str
    kept: bool
    reason: str
    rule: str
    line: int | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """A decision and what led to it. `tier_rule` names the clearance rule that gave the tier."""

    verdict: str
    reason: str
    serve: tuple[str, ...]
    tier: str
    tier_rule: str
    lines: tuple[Line, ...]
    condition_errors: tuple[str, ...]

    def text(self) -> str:
        """The explanation for people: the caller, one line per expert, and the verdict last."""
        width = max((len(line.expert) for line in self.lines), default=0)
        rows = [f"caller    tier {self.tier} ({self.tier_rule})"]
        for line in self.lines:
            place = f"line {line.line}: {line.rule}" if line.line else line.rule
            rows.append(f"{'kept' if line.kept else 'struck':<9} {line.expert:<{width}}  {line.reason} ({place})")
        rows += [f"error     {where} could not be evaluated: no match" for where in self.condition_errors]
        rows.append(f"verdict   {self.verdict} ({self.reason}){': ' + ', '.join(self.serve) if self.serve else ''}")
        return "\n".join(rows)


def by_token(policy: Policy, token: str) -> Identity | Refusal:
    """The caller that `token` identifies now, verified with keys that are loaded as the policy says."""

    async def loaded() -> identity.Keys:
        store = KeyStore()
        try:
            await store.follow(policy.issuers.values())
            return store.keys
        finally:
            await store.close()

    return identity.verify(policy, asyncio.run(loaded()), token, time.time())


def by_claims(policy: Policy, claims: Claims) -> Identity | Refusal:
    """The caller of a token that verifies and has `claims`, or why it identifies none.

    What the claims leave out does not count against them: the issuer is the policy's first, and the token is new.
    """
    if claims.get("iss", next(iter(policy.issuers), None)) not in policy.issuers:
        return Refusal(Reason.INVALID_TOKEN, "the token's issuer is not trusted")
    if policy.revoked.covers({"iat": inf, **claims}):
        return Refusal(Reason.INVALID_TOKEN, "the token is revoked")
    tier, errors = clearance(policy, claims)
    return Identity(tier, str(claims.get("sub", "")), str(claims.get("iss", "")), claims, errors=errors)


def explain(
    policy: Policy, caller: Identity, experts: Iterable[str], request: Request, downgrade: bool = True
) -> Explanation:
    """The decision of `decide`, line by line. Downgrade targets that are offered are shown as kept."""
    decision = decide(policy, caller, experts, request, downgrade)
    return Explanation(
        decision.verdict.value, decision.reason.value, decision.serve, policy.tiers[caller.tier],
        _tier_rule(policy, caller), tuple(_lines(policy, decision)), decision.errors,
    )  # fmt: skip


def _lines(policy: Policy, decision: Decision) -> Iterable[Line]:
    struck = {s.expert: s for s in decision.struck}
    for name in decision.requested:
        expert = policy.experts[name]
        if name not in struck:
            rule, line = (
                (expert.allow.where, expert.allow.line) if expert.allow else (f"experts.{name}.tier", expert.line)
            )
            yield Line(name, True, "permitted", rule, line)
            continue
        found = struck[name]
        line = expert.allow.line if found.reason is Reason.NOT_ALLOWED and expert.allow else expert.line
        yield Line(name, False, found.reason.value, found.rule, line)
    for name in decision.serve:
        if name not in decision.requested:
            source = next(n for n in decision.requested if name in policy.experts[n].downgrade_to)
            yield Line(name, True, "downgrade", f"experts.{source}.downgrade_to", policy.experts[source].line)
    for name in decision.unknown:
        yield Line(name, False, "unknown_expert", "experts", None)


def _tier_rule(policy: Policy, caller: Identity) -> str:
    if caller.anonymous:
        return "anonymous"
    _, rule, errors = deciding(policy, caller.claims)
    if rule is None:
        return "no clearance rule matched: the lowest tier"
    capped = " could not be evaluated: at most its tier" if rule.when.where in errors else ""
    return f"line {rule.when.line}: {rule.when.where}{capped}"
