"""Experts that stand in for another that is down or full: who may, and what Envoy is told of it."""

from __future__ import annotations

from typing import Any

import pytest
from envoy_data_plane.envoy.config.core.v3 import HeaderValueOptionHeaderAppendAction as AppendAction

from ext_authz.core import leases
from ext_authz.core.decide import decide
from ext_authz.core.model import Identity, Outcome, Request
from ext_authz.core.policy import Policy
from ext_authz.wire.check import Writer
from tests.harness import asks, policies

ASK = Request("POST", "/", {})
LOW, HIGH = 0, 1


def policy(**c: Any) -> Policy:
    """A and B are low, D is high; C is high and is stood in for by B, D and A."""
    experts = {
        "A": {"tier": "low", "endpoints": ["a:1"]},
        "B": {"tier": "low", "endpoints": ["b:1"], "weight": 3, "allow": "claims.org == 'acme'"},
        "C": {"tier": "high", "endpoints": ["c:1"], "downgrade_to": ["B", "D", "A"], "unavailable": "downgrade", **c},
        "D": {"tier": "high", "endpoints": ["d:1"]},
    }
    return policies.policy(experts=experts, lease="30s", gate=[{"prefix": "/", "header": "x-expert-names"}])


CASES: list[tuple[dict[str, Any], int, dict[str, str], list[str], bool, str, str]] = [
    # expert C, the caller's tier and claims, asked, downgrades taken, serve, standby
    ({}, HIGH, {"org": "acme"}, ["C"], True, "C", "BDA"),
    ({}, HIGH, {}, ["C"], True, "C", "DA"),  # B does not accept this caller
    ({}, HIGH, {}, ["C", "Z"], True, "C", "DA"),
    ({}, HIGH, {}, ["C"], False, "C", ""),
    ({}, HIGH, {}, ["C", "A"], True, "CA", ""),
    ({}, HIGH, {}, ["A"], True, "A", ""),
    ({}, LOW, {}, ["C"], True, "A", ""),  # a downgrade from the start
    ({"unavailable": "refuse"}, HIGH, {}, ["C"], True, "C", ""),
    ({"downgrade_to": []}, HIGH, {}, ["C"], True, "C", ""),
]


@pytest.mark.parametrize(("c", "tier", "claims", "asked", "downgrade", "serve", "standby"), CASES)
def test_who_stands_in(
    c: dict[str, Any], tier: int, claims: dict[str, str], asked: list[str], downgrade: bool, serve: str, standby: str
) -> None:
    decision = decide(policy(**c), Identity(tier, claims=claims), asked, ASK, downgrade)
    assert ("".join(decision.serve), "".join(decision.standby)) == (serve, standby)


def test_envoy_is_told_who_stands_in_and_that_the_verdict_depends_on_who_answers() -> None:
    it = policy()
    caller = Identity(HIGH, claims={"org": "acme"})
    decision = decide(it, caller, ["C"], ASK)
    response = asks.response_of(Writer(it).write(decision))
    assert response.ok_response is not None
    headers = {o.header.key: o.header.value for o in response.ok_response.headers if o.header}
    assert headers["x-target-cluster"] == "c;w=1;m=1024,b;w=3;m=1024;s,d;w=1;m=1024;s,a;w=1;m=1024;s"
    told = {o.header.key: o.append_action for o in response.ok_response.response_headers_to_add if o.header}
    absent = {"x-srp-decision", "x-srp-reason"}
    assert {k for k, v in told.items() if v == AppendAction.ADD_IF_ABSENT} == absent
    assert leases.grant(it, Outcome(decision, caller), ASK, 0.0) is None
    assert leases.grant(it, Outcome(decide(it, caller, ["A"], ASK), caller), ASK, 0.0) == 30.0
