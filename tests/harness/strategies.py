"""Hypothesis strategies: policies, callers and requests such as the core may meet, and Envoy's messages.

Each `allow` rule comes with a Python twin, so that a test can judge it without CEL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any, get_args, get_type_hints

from hypothesis import settings
from hypothesis import strategies as st

from ext_authz.core.condition import Condition, compile_condition
from ext_authz.core.model import Identity, Request
from ext_authz.core.policy import Expert, Policy

settings.register_profile("srp", deadline=None)  # machines differ
settings.load_profile("srp")

TIERS = ("bronze", "silver", "gold", "platinum")
EXPERTS = ("A", "B", "C", "D", "E")
UNKNOWN = ("nobody", "Z", "a", "A ")  # near misses of a known name among them

Twin = Callable[[Mapping[str, Any], Request], bool]


@dataclass(frozen=True)
class Rule:
    """A condition, and what it means: `holds` is True exactly where CEL gives `true`."""

    condition: Condition
    holds: Twin


def _rule(source: str, holds: Twin) -> Rule:
    return Rule(compile_condition(source, f"allow `{source}`", 1), holds)


RULES = (
    _rule("true", lambda claims, request: True),
    _rule("false", lambda claims, request: False),
    _rule('claims.org in ["acme", "umbrella"]', lambda claims, request: claims.get("org") in ("acme", "umbrella")),
    _rule('!("org" in claims) || claims.org != "acme"', lambda claims, request: claims.get("org") != "acme"),
    _rule("claims.level", lambda claims, request: False),  # a number is no `true`, and a missing claim is no answer
    _rule('request.headers["x-team"] == "red"', lambda claims, request: request.headers.get("x-team") == "red"),
    _rule('request.method == "GET"', lambda claims, request: request.method == "GET"),
)
HOLDS: Mapping[str, Twin] = {rule.condition.source: rule.holds for rule in RULES}


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """A policy of one to four tiers and one to five experts, with any allow rules and any downgrades."""
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
    """A caller of any tier, with the claims that the rules read, or others, or none."""
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


# ---- messages of envoy-data-plane ------------------------------------------------------------------------------------

_texts = st.text(max_size=12)
_SCALARS: Mapping[str, st.SearchStrategy[Any]] = {
    "string": _texts,
    "bytes": st.binary(max_size=12),
    "bool": st.booleans(),
    "double": st.floats(allow_nan=False),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint32": st.integers(0, 2**32 - 1),
}
_times = st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))


def messages(cls: type, depth: int = 5) -> st.SearchStrategy[Any]:
    """Messages of `cls`, a dataclass of envoy-data-plane: any of its fields set, of each oneof one at most."""
    free: dict[str, st.SearchStrategy[Any]] = {}
    groups: dict[str, list[tuple[str, st.SearchStrategy[Any]]]] = {}
    hints = get_type_hints(cls)
    for field in fields(cls):
        meta = field.metadata["betterproto"]
        values = _field_values(meta, hints[field.name], depth)
        if values is None:
            continue
        if meta.group:
            groups.setdefault(meta.group, []).append((field.name, values))
        else:
            free[field.name] = values
    chosen = [
        st.one_of(st.just({}), *(values.map(lambda v, name=name: {name: v}) for name, values in members))
        for members in groups.values()
    ]
    return st.builds(
        lambda plain, *one: cls(**plain, **{k: v for d in one for k, v in d.items()}),
        st.fixed_dictionaries({}, optional=free),
        *chosen,
    )


def _field_values(meta: Any, hint: Any, depth: int) -> st.SearchStrategy[Any] | None:
    """Values of one field, None where messages would nest too deep."""
    if meta.proto_type == "map":
        inner = _values(meta.map_meta[1], get_args(hint)[1], depth)
        return None if inner is None else st.dictionaries(_texts, inner, max_size=2)
    if meta.repeated:
        inner = _values(meta, get_args(hint)[0], depth)
        return None if inner is None else st.lists(inner, max_size=2)
    return _values(meta, hint, depth)


def _values(meta: Any, hint: Any, depth: int) -> st.SearchStrategy[Any] | None:
    plain = next((a for a in get_args(hint) if a is not type(None)), hint)
    if plain is datetime:
        return _times
    if meta.proto_type == "message" and meta.unwrap is None:
        return messages(plain, depth - 1) if depth else None
    if meta.proto_type == "enum":
        return st.sampled_from(list(plain))
    return _SCALARS["bool" if meta.unwrap else meta.proto_type]
