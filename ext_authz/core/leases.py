"""Leases: which decisions Envoy may repeat without asking again, and for how long. Pure.

A lease rests on three things. The filter finds it by the exact text of everything that its decision read, so whatever
a decision reads beyond the lease's key forbids one. The decision must hold until the lease ends, so it ends with the
caller's token. And everything else that a decision depends on, the policy and the keys, is the epoch: the filter takes
only leases of its own epoch, and the next epoch brings a new filter, which starts empty.
"""

from __future__ import annotations

from typing import assert_never

from ext_authz.core.gate import rule_for
from ext_authz.core.headers import READ_BY_EVERY_DECISION
from ext_authz.core.model import Decision, Outcome, Request
from ext_authz.core.policy import Body, DefaultOnly, Expert, GateRule, Header, Policy

ENTRIES = 4096  # leases in one generation of the table of one of Envoy's worker threads

_READ = frozenset(READ_BY_EVERY_DECISION)


def grant(policy: Policy, outcome: Outcome, request: Request, now: float) -> float | None:
    """Until when, in seconds since the epoch, Envoy may repeat the `outcome` of `now`; None if it may not.

    Whether the key is too long is for the filter to judge.
    """
    decision, caller, _ = outcome
    if not decision.serve or decision.standby:  # who answers may change what the client is told
        return None
    rule = rule_for(policy, request.path)
    if rule is None or not leasable(rule):
        return None
    if request.repeated and not request.repeated.isdisjoint(_read(rule)):
        return None
    seconds = _seconds(policy, decision)
    return min(caller.expires, now + seconds) if seconds else None


def possible(policy: Policy) -> bool:
    """Whether there is a request whose decision may be leased."""
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
    """For how many seconds Envoy may repeat a decision about `expert`; 0: not at all."""
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
