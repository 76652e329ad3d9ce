"""The names that an expert's cluster has in Envoy."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from ext_authz.core.condition import compile_condition
from ext_authz.core.policy import Endpoint, Expert, Policy, Traffic

A = Expert("A", 0, "expert-a", (Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80)))
ALLOW = compile_condition("claims.org == 'acme'", "experts.A.allow", 1)


def name_of(expert: Expert, tiers: tuple[str, ...] = ("low", "high")) -> str:
    return Policy(tiers, {expert.name: expert}).envoy_clusters[expert.name]


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "B"},
        {"tier": 1},
        {"cluster": "expert-b"},
        {"endpoints": (Endpoint("10.0.0.1", 80),)},
        {"endpoints": (Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 81))},
        {"allow": ALLOW},
    ],
    ids=str,
)
def test_what_decides_who_may_be_there_changes_the_name(changed: dict[str, Any]) -> None:
    """So a decision under way never means another expert."""
    assert name_of(replace(A, **changed)) != name_of(A)


@pytest.mark.parametrize("tiers", [("high", "low"), ("low", "mid", "high"), ("low",)], ids=str)
def test_so_does_a_change_of_the_tiers(tiers: tuple[str, ...]) -> None:
    assert name_of(A, tiers) != name_of(A)


@pytest.mark.parametrize(
    "changed",
    [
        {"endpoints": A.endpoints[::-1]},
        {"weight": 9},
        {"downgrade_to": ("B",)},
        {"line": 7},
        {"traffic": Traffic(timeout=1.0, max_requests=3)},
    ],
    ids=str,
)
def test_nothing_else_does(changed: dict[str, Any]) -> None:
    """A request is balanced over the old and the new policy alike."""
    assert name_of(replace(A, **changed)) == name_of(A)


def test_the_name_is_the_clusters_with_a_digest() -> None:
    """No static cluster has such a name; least_request.lua takes no other."""
    assert re.fullmatch(r"expert-a\.[0-9a-f]{16}", name_of(A))
