"""CEL conditions: compiled at load, with errors of one line; no match if they fail."""

from __future__ import annotations

import json
import subprocess
import sys
import timeit
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_authz.core.cel_source import MAX_LENGTH, MAX_NESTING
from ext_authz.core.condition import VARIABLES, Truth, compile_condition, context
from tests.harness import ROOT
from tests.harness.strategies import header_texts, json_values

CLAIMS = {
    "plan": "premium", "org": "acme", "groups": ["eng", "ops"], "level": 3, "ratio": 0.5, "ok": True, "none": None,
    "realm_access": {"roles": ["admin"]}, "https://example.com/tier": "gold", "huge": 2**63, "vast": 2**70,
}  # fmt: skip
REQUEST = {"method": "GET", "path": "/v1/chat", "headers": {"x-team": "red"}}

YES, NO, ERROR = Truth.YES, Truth.NO, Truth.ERROR

HOLDS = [
    ('claims.plan == "premium"', YES),
    ('claims.plan == "basic"', NO),
    ('claims.org in ["acme", "umbrella"]', YES),
    ('"ops" in claims.groups && claims.level >= 3', YES),
    ('claims.groups.exists(g, g.startsWith("e"))', YES),
    ('claims.realm_access.roles.all(r, r == "admin")', YES),
    ('claims["https://example.com/tier"] == "gold"', YES),
    ("has(claims.org) && !has(claims.absent)", YES),
    ('claims.org.matches("^ac")', YES),
    ("claims.none == null", YES),
    ('request.method == "GET" && request.headers["x-team"] == "red"', YES),
    ("claims.huge > 3 && claims.vast > 3", YES),  # above 64 bits, without wrapping around
    ("claims.vast < 3", NO),
    # no result
    ("claims.absent", ERROR),
    ("!claims.absent", ERROR),
    ('claims.absent == "x"', ERROR),
    ('claims.absent != "x"', ERROR),
    ("claims.plan.name == 1", ERROR),
    ("claims.groups[7] == 'x'", ERROR),
    ("1 / 0 == 1", ERROR),
    ("claims.level + 9223372036854775807 > 0", ERROR),
    ('request.headers["x-absent"] == "x"', ERROR),
    # only true is a yes
    ("claims.ok", YES),
    ("claims.level", ERROR),
    ("claims.plan", ERROR),
    ("claims.groups", ERROR),
    ("claims.none", ERROR),
    ("claims", ERROR),
    ('"true"', ERROR),
    ("1", ERROR),
]  # fmt: skip


@pytest.mark.parametrize(("source", "truth"), HOLDS, ids=[source for source, _ in HOLDS])
def test_only_true_is_a_yes(source: str, truth: Truth) -> None:
    """A condition that returns neither `true` nor `false`, or fails, is an ERROR."""
    assert compile_condition(source, "here", 1).holds(context(CLAIMS, REQUEST)) is truth


READS = [
    ("true", set()),
    ("claims.a == 1", {"claims"}),
    ('request.path == "/"', {"request"}),
    ('claims.a == request.headers["a"]', {"claims", "request"}),
    ("claims.groups.exists(g, g == claims.org)", {"claims"}),
    ("[1, 2].all(i, i in [3]) || [3].exists(k, k > 2)", set()),
    ('claims.a.map(x, x > 1, x) == [2] || "request" == "claims"', {"claims"}),
]


@pytest.mark.parametrize(("source", "reads"), READS, ids=[source for source, _ in READS])
def test_reads_are_the_variables_of_the_condition(source: str, reads: set[str]) -> None:
    """Without those that a macro binds. What may be cached depends on it."""
    assert compile_condition(source, "here", 1).reads == reads


MISTAKES = [
    # name, source, what it may read, error
    ("empty", "", VARIABLES, r"ends too early \(at character 1\)"),
    ("syntax", "claims.plan = 1", VARIABLES, r"cannot read `=` \(at character 13\)"),
    ("a word too many", "claims.a claims.b", VARIABLES, r"unexpected `claims` \(at character 10\)"),
    ("a macro in a macro", "claims.a.exists(x, claims.b.all(y, y == x))", VARIABLES, "`all` inside `exists`"),
    ("a macro in the argument of another", "claims.a.map(x, [x].filter(y, true)) == []", VARIABLES, "cannot be nested"),
    ("three macros", "claims.a.map(x, x).filter(x, true).all(x, true)", VARIABLES, "3 macros .*at most 2"),
    ("a long list under a macro", f"[{'1, ' * 64}1].all(x, x == 1)", VARIABLES, "over 64 commas"),
    ("a pattern that is none", 'claims.a.matches("(")', VARIABLES, "not an RE2 pattern: missing"),
    ("a pattern that looks back", r'claims.a.matches("(a)\\1")', VARIABLES, "not an RE2 pattern"),
    ("a pattern that is large", 'claims.a.matches("(a{1,500}){1,500}")', VARIABLES, "RE2 pattern|too large"),
    ("a pattern that is computed", 'claims.a.matches("a" + "b")', VARIABLES, "must be written out"),
    ("a pattern of the caller", "claims.a.matches(claims.b)", VARIABLES, "must be written out"),
    ("a function of ours", "srp_size(claims.a) == 1", VARIABLES, "unknown function `srp_size`"),
    ("a comment", "claims.a == 1 // one", VARIABLES, "a comment"),
    ("triple quotes", 'claims.a == """x"""', VARIABLES, "triple quotes"),
    ("text that turns around", 'claims.a == "\u202ex"', VARIABLES, r"U\+202E is not allowed"),
    ("names the character", 'claims.plan == "', VARIABLES, r"at character \d+"),
    ("unknown variable", "claim.plan == 1", VARIABLES, "unknown variable `claim`; a condition reads `claims` and `req"),
    ("unknown variable behind a macro", "[1].all(x, y == x)", VARIABLES, "unknown variable `y`"),
    ("variable out of place", 'request.path == "/"', frozenset({"claims"}), "`request` cannot be read here; .*`c"),
    ("unknown function", "claims.plan.lowerAscii() == 'x'", VARIABLES, "unknown function `lowerAscii`"),
    ("function that is not a method", "frobnicate(claims)", VARIABLES, "unknown function `frobnicate`"),
    ("macro that hides the request", "[1].exists(request, true) && request.a", VARIABLES, "`request` cannot name"),
    ("macro that hides the claims", "[1].all(claims, claims == 1)", VARIABLES, "`claims` cannot name an element"),
    ("too long", '"' + "x" * MAX_LENGTH + '" == claims.a', VARIABLES, r"of 2062 characters, at most 2048"),
    ("too deep", "(" * 33 + "true" + ")" * 33, VARIABLES, "nested more than 32 brackets deep"),
    ("brackets without end", "[" * 2000, VARIABLES, "nested more than 32 brackets deep"),
    ("control character", "claims.a\x00", VARIABLES, r"U\+0000 is not allowed"),
    ("half a surrogate pair", '"\ud800" == claims.a', VARIABLES, r"U\+D800 is not allowed"),
]


@pytest.mark.parametrize(("source", "allowed", "error"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_reported_in_one_line(source: str, allowed: frozenset[str], error: str) -> None:
    """The ValueError says what is wrong."""
    with pytest.raises(ValueError, match=error) as raised:
        compile_condition(source, "here", 1, allowed)
    assert "\n" not in str(raised.value)
    assert "ERROR:" not in str(raised.value)


def test_the_bounds_are_exact() -> None:
    """The longest and the deepest expressions compile."""
    compile_condition('"' + "x" * (MAX_LENGTH - len('"" == "x"')) + '" == "x"', "here", 1)
    compile_condition("(" * MAX_NESTING + "true" + ")" * MAX_NESTING, "here", 1)
    compile_condition('"' + "(" * 100 + '" == claims.a', "here", 1)  # brackets in a string do not nest


OWN = [
    # what `cel` alone would get wrong, or take long for
    ('size("é€𝄞") == 3', YES),
    ('"é".size() == 1', YES),
    ("size(claims.groups) == 2 && claims.groups.size() == 2", YES),
    ("size(claims) > 3 && size({}) == 0 && size(b'ab') == 2", YES),
    ("size(claims.level) != 0", ERROR),
    ("claims.size() > 1", YES),
    ('has(claims.size) || claims.org == "size(claims)"', NO),
    (r'claims.org.matches("^[\\w.-]{1,64}$")', YES),
    (r'matches(claims.org, r"^a\w{3}$")', YES),
    ('claims.org.matches("c")', YES),
    ('"naïve".matches("^na.ve$")', YES),
    ('claims.level.matches("3")', ERROR),
    ("type(claims.level) == int && type(claims.org) == string && type(claims.groups) == list", YES),
    ("type(claims.level) == double", NO),
]


@pytest.mark.parametrize(("source", "truth"), OWN)
def test_size_counts_code_points_and_patterns_are_re2(source: str, truth: Truth) -> None:
    assert compile_condition(source, "here", 1).holds(context(CLAIMS, REQUEST)) is truth


@pytest.mark.parametrize(
    ("source", "entries"),
    [
        ("claims.a == 1", None),
        ('"ops" in claims.groups', None),
        ('claims.groups.exists(g, g == "ops")', 256),
        ('size(claims.groups.filter(g, g != "guest")) > 2', 64),
        ("claims.a.all(x, true) && claims.b.map(x, x) == []", 64),
        ('claims.plan == "a.exists(x, y)"', None),
        ("claims.map == 1 && claims.filter(x, true) == []", 64),
    ],
)
def test_a_macro_bounds_what_it_may_range_over(source: str, entries: int | None) -> None:
    assert compile_condition(source, "here", 1).max_entries == entries


@pytest.mark.parametrize("macro", ["all(x, true)", "exists(x, false)", "filter(x, true) == []", "map(x, x + x) == []"])
def test_the_largest_admissible_claims_take_a_fraction_of_a_millisecond(macro: str) -> None:
    """A caller's token must not hold up the event loop. The bound here is generous: machines differ."""
    condition = compile_condition(f"claims.g.{macro}", "here", 1)
    variables = context({"g": [f"{n:016x}" for n in range(condition.max_entries or 0)]})
    took = min(timeit.repeat(lambda: condition.holds(variables), number=1, repeat=20))
    assert took < 0.003


HOSTILE = [
    ("nots", "!" * (MAX_LENGTH - 4) + "true"),
    ("signs", "-" * (MAX_LENGTH - 1) + "1"),
    ("sums", "+".join("1" * 1024)),
    ("choices", "true ? 1 : " * 180 + "1"),
    ("ors", " || ".join(["false"] * 227)),
    ("members", "claims" + ".a" * 1021),
    ("indexes", "claims" + "[0]" * 680),
    ("nested macros", "[0].all(a, " * 31 + "true" + ")" * 31),
    ("nested comparisons", "!(" * 32 + "true" + ")" * 32),
    ("comparisons", "1 < " * 500 + "1"),
    ("a backslash run", '"' + "\\" * 2000),
    ("many binders", ".all(" * 400),
]


def test_hostile_sources_do_not_end_the_process() -> None:
    """The longest and the deepest expressions are refused, or compiled and evaluated."""
    script = (
        "import sys, json\n"
        "from ext_authz.core.condition import compile_condition, context\n"
        "for source in json.load(sys.stdin):\n"
        "    try: compile_condition(source, 'here', 1).holds(context({'a': [1]}))\n"
        "    except ValueError: pass\n"
        "print('alive')\n"
    )
    sources = json.dumps([source for _, source in HOSTILE])
    ran = subprocess.run(
        [sys.executable, "-c", script], input=sources, capture_output=True, text=True, timeout=20, cwd=ROOT, check=False
    )
    assert ran.stdout == "alive\n", ran.stderr[-500:]


def test_claims_that_cel_cannot_represent_are_no_match() -> None:
    """Half a surrogate pair, legal in JSON, fails the conditions that read claims, not the request."""
    variables = context({"plan": "premium", "name": "\ud800"}, REQUEST)
    assert compile_condition('claims.plan == "premium"', "here", 1).holds(variables) is ERROR
    assert compile_condition("!has(claims.blocked)", "here", 1).holds(variables) is ERROR
    assert compile_condition("true", "here", 1).holds(variables) is YES


@given(st.dictionaries(st.text(st.characters(), max_size=5), json_values, max_size=4), header_texts)
def test_any_claims_and_headers_give_a_result(claims: dict[str, Any], header: str) -> None:
    """Any JSON and latin-1 text: a condition never raises."""
    variables = context(claims, {"method": header, "path": header, "headers": {"x-team": header}})
    for source in ("claims.a == request.method", 'claims.exists(k, k == "a")', 'request.headers["x-team"] == "red"'):
        assert compile_condition(source, "here", 1).holds(variables) in Truth
