"""Hypothesis strategies: policies, callers and requests that the core may get.

Each `allow` rule comes with a Python twin, so that a test can evaluate it without CEL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from ext_authz.core.condition import Condition, compile_condition
from ext_authz.core.model import Identity, Request
from ext_authz.core.policy import Expert, Policy

TIERS = ("bronze", "silver", "gold", "platinum")
EXPERTS = ("A", "B", "C", "D", "E")
UNKNOWN = ("nobody", "Z", "a", "A ")  # some are near misses of a known name

Twin = Callable[[Mapping[str, Any], Request], bool]


@dataclass(frozen=True)
class Rule:
    """A condition, and what it means: `holds` is True exactly where CEL returns `true`."""

    condition: Condition
    holds: Twin


def _rule(source: str, holds: Twin) -> Rule:
    return Rule(compile_condition(source, f"allow `{source}`", 1), holds)


RULES = (
    _rule("true", lambda claims, request: True),
    _rule("false", lambda claims, request: False),
    _rule('claims.org in ["acme", "umbrella"]', lambda claims, request: claims.get("org") in ("acme", "umbrella")),
    _rule('!("org" in claims) || claims.org != "acme"', lambda claims, request: claims.get("org") != "acme"),
    _rule("claims.level", lambda claims, request: False),  # a number is not `true`, and a missing claim is an error
    _rule('request.headers["x-team"] == "red"', lambda claims, request: request.headers.get("x-team") == "red"),
    _rule('request.method == "GET"', lambda claims, request: request.method == "GET"),
)
HOLDS: Mapping[str, Twin] = {rule.condition.source: rule.holds for rule in RULES}


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """A policy with one to four tiers and one to five experts, with any allow rules and any downgrades."""
    tiers = TIERS[: draw(st.integers(1, len(TIERS)))]
    names = draw(st.lists(st.sampled_from(EXPERTS), min_size=1, unique=True))
    tier, lesser = st.integers(0, len(tiers) - 1), st.lists(st.sampled_from(names), unique=True, max_size=3)
    allow = st.one_of(st.none(), st.sampled_from([rule.condition for rule in RULES]))
    experts = {
        name: Expert(name, draw(tier), f"expert-{name.lower()}", downgrade_to=tuple(draw(lesser)), allow=draw(allow))
        for name in names
    }
    reads_request = any(e.allow is not None and "request" in e.allow.reads for e in experts.values())
    return Policy(tiers=tiers, experts=experts, reads_request=reads_request)


def callers(policy: Policy) -> st.SearchStrategy[Identity]:
    """A caller of any tier, with the claims that the rules read, with other claims or with none."""
    orgs = st.sampled_from(["acme", "umbrella", "other", "", 7, None])
    claims = st.fixed_dictionaries({}, optional={"org": orgs, "level": st.integers()})
    return st.builds(Identity, tier=st.integers(0, len(policy.tiers) - 1), claims=claims)


named = st.lists(st.sampled_from(EXPERTS + UNKNOWN), max_size=8)

requests = st.builds(
    Request,
    method=st.sampled_from(["GET", "POST"]),
    path=st.just("/"),
    headers=st.fixed_dictionaries({}, optional={"x-team": st.sampled_from(["red", "blue"])}),
)

header_texts = st.text(st.characters(max_codepoint=255), max_size=60)  # what a latin-1 header can hold

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
