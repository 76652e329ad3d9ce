"""For how long a decision may be repeated without asking again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ext_authz.core import leases
from ext_authz.core.check import check
from ext_authz.core.model import Outcome, Request
from ext_authz.core.policy import Policy
from tests.harness import checks
from tests.harness.authorization import POLICY, load_policy, snapshot

RULES = POLICY + "lease: 20s\n"


def granted(policy: Policy, now: float, **headers: str) -> float | None:
    """When the lease for a request with these headers ends, if one is granted."""
    request = Request("GET", "/x", {name.replace("_", "-"): value for name, value in headers.items()})
    outcome = check(snapshot(policy), request, now)
    assert isinstance(outcome, Outcome)
    return leases.grant(policy, outcome, request, now)


def test_a_lease_ends_with_its_time_or_its_token_whichever_is_first(tmp_path: Path) -> None:
    """min(now + lease, exp + leeway)."""
    policy = load_policy(tmp_path, text=RULES)
    now = time.time()
    for life, expected in ((300, now + 20), (5, int(now) + 5 + 30 if int(now) + 35 < now + 20 else now + 20)):
        caller = checks.token(plan="premium", exp=int(now) + life)
        assert granted(policy, now, authorization=f"Bearer {caller}", x_expert_names="C") == pytest.approx(expected)
    short = load_policy(tmp_path, ("version: 1", "version: 1\nleeway: 1s"), text=RULES)
    caller = checks.token(exp=int(now) + 5)
    assert granted(short, now, authorization=f"Bearer {caller}", x_expert_names="A") == int(now) + 6


def test_the_shortest_lease_of_the_experts_concerned_counts(tmp_path: Path) -> None:
    """Those that the request names, and those that serve it."""
    policy = load_policy(tmp_path, ("A: {tier: low,", "A: {tier: low, lease: 5s,"), text=RULES)
    assert granted(policy, 1e9, x_expert_names="B") == 1e9 + 20
    assert granted(policy, 1e9, x_expert_names="A,B") == 1e9 + 5
    assert granted(policy, 1e9, x_expert_names="D") == 1e9 + 5  # downgraded to B, A
    longer = load_policy(tmp_path, ("B: {tier: low,", "B: {tier: low, lease: 1m,"), text=RULES)
    assert granted(longer, 1e9, x_expert_names="B") == 1e9 + 60
    off = load_policy(tmp_path, text=POLICY + "lease: 0\n")
    assert granted(off, 1e9, x_expert_names="B") is None
    assert leases.possible(policy)
    assert not leases.possible(off)
