"""Leases: which decisions Envoy may repeat without asking again, and for how long. Pure.

A lease is safe for three reasons. Its key is the exact text of everything that the decision read; a decision that
reads more than the key can hold gets no lease. It ends no later than the caller's token. And everything else that a
decision depends on, the policy and the keys, is the epoch: the filter accepts only leases of its own epoch, and the
next epoch brings a new filter, which starts empty.
"""

from __future__ import annotations

from typing import assert_never

from ext_authz.core.gate import rule_for
from ext_authz.core.headers import READ_BY_EVERY_DECISION
from ext_authz.core.model import Decision, Outcome, Request
from ext_authz.core.policy import Body, DefaultOnly, Expert, GateRule, Header, Policy

ENTRIES = 4096  # leases per generation of the table in each of Envoy's worker threads

_READ = frozenset(READ_BY_EVERY_DECISION)


def grant(policy: Policy, outcome: Outcome, request: Request, now: float) -> float | None:
    """Until when Envoy may repeat `outcome`, decided at `now` (both in seconds since the epoch); None if it may not.

    The filter itself ignores requests whose key is too long.
    """
    decision, caller, _ = outcome
    if not decision.serve or decision.standby:  # the client's headers depend on who answers
        return None
    rule = rule_for(policy, request.path)
    if rule is None or not leasable(rule):
        return None
    if request.repeated and not request.repeated.isdisjoint(_read(rule)):
        return None
    seconds = _seconds(policy, decision)
    return min(caller.expires, now + seconds) if seconds else None


def possible(policy: Policy) -> bool:
    """Whether any request's decision may get a lease."""
    lasting = any(lease_of(policy, e) for e in policy.experts.values())
    return lasting and any(map(leasable, policy.gate))


def leasable(rule: GateRule) -> bool:
    """Whether a lease's key can hold what the rule reads."""
    match rule.source:
        case Header() | DefaultOnly():
            return True
        case Body():
            return False
        case unknown:
            assert_never(unknown)


def lease_of(policy: Policy, expert: Expert) -> float:
    """How many seconds Envoy may repeat a decision about `expert`; 0: not at all."""
    return policy.lease if expert.lease is None else expert.lease


def _seconds(policy: Policy, decision: Decision) -> float:
    """The shortest lease of the experts that the decision is about; 0 if it may have read more than the key holds."""
    asked = [policy.experts[n] for n in decision.requested]
    judged = asked + [policy.experts[n] for e in asked for n in e.downgrade_to]
    if policy.reads_request and any(e.allow is not None and "request" in e.allow.reads for e in judged):
        return 0.0
    about = asked + [policy.experts[n] for n in decision.serve]
    return min(lease_of(policy, e) for e in about)


def _read(rule: GateRule) -> frozenset[str]:
    return _READ | {rule.source.name} if isinstance(rule.source, Header) else _READ
