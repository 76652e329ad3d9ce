"""Experts that stand in for one that is down or full."""

from __future__ import annotations

from typing import Any

import pytest

from ext_authz.core import leases
from ext_authz.core.decide import decide
from ext_authz.core.model import Identity, Outcome, Request
from tests.harness.policies import with_stand_ins

ASK = Request("POST", "/", {})
LOW, HIGH = 0, 1


CASES: list[tuple[dict[str, Any], int, dict[str, str], list[str], bool, str, str]] = [
    # keys of expert C, the caller's tier and claims, asked, whether a downgrade is accepted, serve, standby
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
def test_only_permitted_experts_stand_in_and_only_for_the_one_expert_asked_for(
    c: dict[str, Any], tier: int, claims: dict[str, str], asked: list[str], downgrade: bool, serve: str, standby: str
) -> None:
    decision = decide(with_stand_ins(**c), Identity(tier, claims=claims), asked, ASK, downgrade)
    assert ("".join(decision.serve), "".join(decision.standby)) == (serve, standby)


def test_a_decision_with_stand_ins_is_not_leased() -> None:
    """Its verdict depends on who answers."""
    policy, caller = with_stand_ins(), Identity(HIGH, claims={"org": "acme"})
    assert leases.grant(policy, Outcome(decide(policy, caller, ["C"], ASK), caller), ASK, 0.0) is None
    assert leases.grant(policy, Outcome(decide(policy, caller, ["A"], ASK), caller), ASK, 0.0) == 30.0
