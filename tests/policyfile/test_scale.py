"""The largest allowed policy decides as a small one does."""

from __future__ import annotations

import pytest

from ext_authz.core.clearance import clearance
from ext_authz.core.decide import decide
from ext_authz.core.model import Identity, Reason, Request, Verdict
from ext_authz.core.policy import Policy
from ext_authz.policyfile.compile import MAX_MACRO_RULES
from ext_authz.policyfile.parse import parse_policy
from ext_authz.policyfile.schema import MAX_CLEARANCE, MAX_EXPERTS
from ext_authz.policyfile.source import PolicyError

GET = Request("GET", "/", {})


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Odd-numbered experts are high and downgrade to the one before; rules clear odd-numbered plans for high."""
    lines = ["version: 1", "tiers: [low, high]", "anonymous: low", "clearance:"]
    lines += [f"  - {{when: 'claims.plan == {n}', tier: {'high' if n % 2 else 'low'}}}" for n in range(MAX_CLEARANCE)]
    lines += ["experts:"]
    for n in range(MAX_EXPERTS):
        tier = f"high, downgrade_to: [E{n - 1}]" if n % 2 else "low"
        lines += [f"  E{n}: {{tier: {tier}, cluster: e{n}, endpoints: ['e{n}:8001']}}"]
    return parse_policy("\n".join(lines).encode())


def test_more_clearance_rules_with_macros_than_one_token_may_cost_are_a_mistake() -> None:
    """Each may be evaluated for one token; those without macros do not count."""
    rule = "  - {when: 'claims.groups.exists(g, g == \"N\")', tier: low}\n"
    head = "version: 1\ntiers: [low]\nanonymous: low\nexperts:\n  A: {tier: low, endpoints: [a:1]}\nclearance:\n"
    plain = "  - {when: 'claims.plan == \"N\"', tier: low}\n"
    rules = [rule.replace("N", str(n)) for n in range(MAX_MACRO_RULES)]
    parse_policy(head + plain + "".join(rules))
    with pytest.raises(PolicyError, match=rf":{8 + MAX_MACRO_RULES}:1: clearance: over 16 rules"):
        parse_policy(head + plain + "".join([*rules, rule]))


@pytest.mark.parametrize("plan", [0, 1, MAX_CLEARANCE - 2, MAX_CLEARANCE - 1, MAX_CLEARANCE])
def test_the_first_clearance_rule_that_holds_counts(policy: Policy, plan: int) -> None:
    """The first and last rules, and none."""
    assert clearance(policy, {"plan": plan}) == (plan % 2 if plan < MAX_CLEARANCE else 0, ())


@pytest.mark.parametrize("n", [1, 4_999, MAX_EXPERTS - 1])
def test_each_expert_is_found(policy: Policy, n: int) -> None:
    """By a caller who is permitted it, and by one who gets the downgrade."""
    high, low = (decide(policy, Identity(tier), [f"E{n}"], GET) for tier in (1, 0))
    assert (high.verdict, high.serve) == (Verdict.ALLOW, (f"E{n}",))
    assert (low.verdict, low.reason, low.serve) == (Verdict.DOWNGRADE, Reason.TIER_TOO_LOW, (f"E{n - 1}",))


def test_no_other_expert_is_found(policy: Policy) -> None:
    """The one after the last."""
    assert decide(policy, Identity(1), [f"E{MAX_EXPERTS}"], GET).reason is Reason.UNKNOWN_EXPERT
