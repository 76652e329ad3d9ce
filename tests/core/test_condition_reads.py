"""Which claims a condition reads: exactly these, or any."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_authz.core.condition import compile_condition, context
from ext_authz.core.condition_reads import headers, members

READS = [
    # source, members of `claims` (None: any)
    ("true", set()),
    ('request.path == "/claims.a"', set()),
    ('request.headers.claims == "x"', set()),
    ('claims.plan == "premium"', {"plan"}),
    ('claims . plan == "premium"', {"plan"}),
    ('claims["https://example.com/tier"] == "gold"', {"https://example.com/tier"}),
    ("claims['a']['b'] == 1 && claims.c.d.e", {"a", "c"}),
    ('has(claims.org) && claims.org.name in ["claims.x"]', {"org"}),
    ("claims.groups.exists(g, g == claims.org)", {"groups", "org"}),
    ('"org" in claims && claims.plan == "x"', {"org", "plan"}),
    ('!("org" in claims) || claims.org != "acme"', {"org"}),
    ('"ops" in claims.groups', {"groups"}),
    ('claims.plan == request.headers["x-plan"]', {"plan"}),
    ('claims.team in "abc"', {"team"}),
    # any of them
    ("claims == claims", None),
    ("size(claims) > 1", None),
    ('claims.exists(k, k == "plan")', None),
    ("claims[request.method] == 1", None),
    ("claims[claims.which] == 1", None),
    ('{"a": claims}.a.plan == "x"', None),
    ('(claims).plan == "x"', None),
    ('"a" + "b" in claims', None),
    ('!"a" in claims', None),
    ('"a" in claims == true', None),
    ('"a" in (true ? claims : claims)', None),
    ('claims["a\\x62"] == 1', None),
    ('claims[r"a"] == 1', None),
    ('claims["""a"""] == 1', None),
    ("claims.a == 1 // claims", None),
]


@pytest.mark.parametrize(("source", "expected"), READS, ids=[source for source, _ in READS])
def test_members_are_those_that_the_result_can_depend_on(source: str, expected: set[str] | None) -> None:
    """Or None, if they can be any."""
    try:
        condition = compile_condition(source, "here", 1)
    except ValueError:
        pytest.skip("CEL does not accept it")
    assert members(condition, "claims") == expected


def test_members_of_the_request_are_found_apart_from_those_of_the_claims() -> None:
    """`request` has members, too."""
    condition = compile_condition('request.method == "GET" && claims.a == request["path"]', "here", 1)
    assert members(condition, "request") == {"method", "path"}


NAMES = ("a", "b", "plan", "claims", "request")
CLAIMS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["a", "plan", 1, True, None, ["a"]]), max_size=4)
ATOMS = st.sampled_from(
    [
        "claims.a", "claims.b", 'claims["plan"]', '"a" in claims', '("b" in claims)', 'has(claims.plan)', "true", '"a"',
        '"claims.a"', "claims.claims", 'claims["request"]', "claims", "[claims.a]", "1",
    ]
)  # fmt: skip
SOURCES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" && ", " || ", " == ", " + ", " in ", " ? true : "]), inner).map("".join),
        inner.map("!{}".format),
        inner.map("({})".format),
    ),
    max_leaves=5,
)


@given(SOURCES, CLAIMS, CLAIMS)
def test_claims_that_are_not_read_change_nothing(source: str, some: dict[str, Any], others: dict[str, Any]) -> None:
    """Two callers with the same values of what is read get the same result."""
    try:
        condition = compile_condition(source, "here", 1)
    except ValueError:
        return
    read = members(condition, "claims")
    if read is None:
        return
    twin = {k: v for k, v in some.items() if k in read} | {k: v for k, v in others.items() if k not in read}
    assert condition.holds(context(some)) is condition.holds(context(twin))


HEADERS: list[tuple[str, frozenset[str] | None]] = [
    ('!("x-debug" in request.headers)', frozenset({"x-debug"})),
    ('request.headers["x-team"] == "red" || request.headers.accept == "a"', frozenset({"x-team", "accept"})),
    ("has(request.headers.foo)", frozenset({"foo"})),
    ('request.path == "/x" && claims.headers == "y"', frozenset()),
    ('request.headers.exists(k, k == "a")', None),
    ("claims.h in request.headers", None),
    ('request.headers[claims.h] == "x"', None),
    ('request["headers"]["a"] == "x"', frozenset({"a"})),
    ("size(request.headers) > 1", None),
]


@pytest.mark.parametrize(("source", "expected"), HEADERS)
def test_the_headers_that_a_condition_reads_are_known_or_may_be_any(
    source: str, expected: frozenset[str] | None
) -> None:
    assert headers(compile_condition(source, "allow", 1)) == expected
