"""The decision: every row of the table, and what holds for any policy, caller and request."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext_authz.core.clearance import clearance
from ext_authz.core.condition import Condition, compile_condition
from ext_authz.core.decide import MAX_WORK, decide, readable
from ext_authz.core.model import STATUS, Decision, Identity, Reason, Refusal, Request, Verdict, refuse
from ext_authz.core.policy import ClearanceRule, Expert, Policy
from tests.harness.strategies import HOLDS, callers, named, policies, requests

LOW, MID, HIGH = 0, 1, 2
GET = Request("GET", "/", {"x-team": "red"})
NEVER = False  # the request forbids a downgrade


def rule(source: str, where: str = "experts.X.allow") -> Condition:
    return compile_condition(source, where, 1)


def experts(*made: Expert) -> dict[str, Expert]:
    return {e.name: e for e in made}


A = Expert("A", LOW, "expert-a")
B = Expert("B", LOW, "expert-b")
C = Expert("C", HIGH, "expert-c")
M = Expert("M", MID, "expert-m")
ONLY_ACME = Expert("P", LOW, "expert-p", allow=rule('claims.org == "acme"', "experts.P.allow"))

TABLE = Policy(tiers=("low", "mid", "high"), experts=experts(A, B, C, M, ONLY_ACME))


def downgrading(name: str, *lesser: str, **changes: Any) -> Policy:
    """TABLE, where `name` may be downgraded to `lesser`, in that order."""
    expert = replace(TABLE.experts[name], downgrade_to=lesser, **changes)
    return replace(TABLE, experts={**TABLE.experts, name: expert})


@dataclass(frozen=True)
class Expected:
    verdict: Verdict
    reason: Reason
    serve: tuple[str, ...] = ()
    struck: tuple[tuple[str, Reason, str], ...] = ()
    unknown: tuple[str, ...] = ()
    required_tier: str | None = None
    status: int = 200


def allow(*serve: str, unknown: tuple[str, ...] = ()) -> Expected:
    return Expected(Verdict.ALLOW, Reason.PERMITTED, serve, unknown=unknown)


def downgrade(*serve: str, struck: tuple[tuple[str, Reason, str], ...], needs: str | None = None) -> Expected:
    return Expected(Verdict.DOWNGRADE, struck[0][1], serve, struck, required_tier=needs)


def deny(reason: Reason, struck: tuple[tuple[str, Reason, str], ...] = (), **more: Any) -> Expected:
    return Expected(Verdict.DENY, reason, (), struck, status=STATUS[reason], **more)


C_STRUCK = ("C", Reason.TIER_TOO_LOW, "experts.C.tier")
M_STRUCK = ("M", Reason.TIER_TOO_LOW, "experts.M.tier")
P_STRUCK = ("P", Reason.NOT_ALLOWED, "experts.P.allow")
TOO_LOW = Reason.TIER_TOO_LOW

ACME, OTHER, NOBODY = {"org": "acme"}, {"org": "other"}, dict[str, Any]()

DECISIONS = [
    # name, policy, tier, claims, names asked, downgrade, expected
    ("low asks what is low", TABLE, LOW, {}, "A,B", True, allow("A", "B")),
    ("in the order asked", TABLE, LOW, {}, "B,A", True, allow("B", "A")),
    ("high asks what is high", TABLE, HIGH, {}, "C", True, allow("C")),
    ("high asks what is low", TABLE, HIGH, {}, "A", True, allow("A")),
    ("a tier permits itself", TABLE, MID, {}, "M", True, allow("M")),
    ("low asks what is high", TABLE, LOW, {}, "C", True, deny(TOO_LOW, (C_STRUCK,), required_tier="high")),
    ("mid asks what is high", TABLE, MID, {}, "C", True, deny(TOO_LOW, (C_STRUCK,), required_tier="high")),
    ("partly permitted", TABLE, LOW, {}, "A,C", True, downgrade("A", struck=(C_STRUCK,), needs="high")),
    ("partly, in order", TABLE, LOW, {}, "C,B,A", True, downgrade("B", "A", struck=(C_STRUCK,), needs="high")),
    (
        "partly permitted, no downgrade",
        TABLE, LOW, {}, "A,C", NEVER, deny(Reason.DOWNGRADE_FORBIDDEN, (C_STRUCK,), required_tier="high"),
    ),
    ("all permitted, no downgrade", TABLE, LOW, {}, "A,B", NEVER, allow("A", "B")),
    (
        "downgrade by policy, in the policy's order",
        downgrading("C", "B", "A"), LOW, {}, "C", True, downgrade("B", "A", struck=(C_STRUCK,), needs="high"),
    ),
    (
        "downgrade by policy, forbidden by the request",
        downgrading("C", "B", "A"), LOW, {}, "C", NEVER,
        deny(Reason.DOWNGRADE_FORBIDDEN, (C_STRUCK,), required_tier="high"),
    ),
    ("permitted needs no downgrade", downgrading("C", "B"), HIGH, {}, "C", NEVER, allow("C")),
    (
        "some permitted: downgrade_to is not looked at",
        downgrading("C", "B"), LOW, {}, "A,C", True, downgrade("A", struck=(C_STRUCK,), needs="high"),
    ),
    (
        "a lesser expert is itself above the tier",
        downgrading("C", "M"), LOW, {}, "C", True, deny(TOO_LOW, (C_STRUCK,), required_tier="high"),
    ),
    (
        "the forbidden one of two lesser experts is left out",
        downgrading("C", "M", "A"), LOW, {}, "C", True, downgrade("A", struck=(C_STRUCK,), needs="high"),
    ),
    (
        "a lesser expert's own allow rule refuses",
        downgrading("C", "P"), LOW, OTHER, "C", True, deny(TOO_LOW, (C_STRUCK,), required_tier="high"),
    ),
    (
        "a lesser expert's own allow rule permits",
        downgrading("C", "P"), LOW, ACME, "C", True, downgrade("P", struck=(C_STRUCK,), needs="high"),
    ),
    (
        "a downgrade does not go on to the lesser expert's own",
        replace(TABLE, experts={**downgrading("C", "M").experts, "M": replace(M, downgrade_to=("A",))}),
        LOW, {}, "C", True, deny(TOO_LOW, (C_STRUCK,), required_tier="high"),
    ),
    (
        "the union of downgrades, each once, in order",
        replace(TABLE, experts={**downgrading("C", "B", "A").experts, "M": replace(M, downgrade_to=("A", "P", "B"))}),
        LOW, ACME, "M,C", True, downgrade("A", "P", "B", struck=(M_STRUCK, C_STRUCK), needs="mid"),
    ),
    (
        "a downgrade to itself leads nowhere",
        downgrading("C", "C"), LOW, {}, "C", True, deny(TOO_LOW, (C_STRUCK,), required_tier="high"),
    ),
    (
        "the lowest of the tiers needed",
        TABLE, LOW, {}, "C,M", True, deny(TOO_LOW, (C_STRUCK, M_STRUCK), required_tier="mid"),
    ),
    ("allow rule holds", TABLE, LOW, ACME, "P", True, allow("P")),
    ("allow rule does not hold", TABLE, HIGH, OTHER, "P", True, deny(Reason.NOT_ALLOWED, (P_STRUCK,))),
    ("allow rule fails", TABLE, HIGH, NOBODY, "P", True, deny(Reason.NOT_ALLOWED, (P_STRUCK,))),
    ("allow rule strikes one of two", TABLE, LOW, OTHER, "P,A", True, downgrade("A", struck=(P_STRUCK,))),
    (
        "the tier is judged before the allow rule",
        downgrading("C", allow=rule("false")), LOW, {}, "C", True, deny(TOO_LOW, (C_STRUCK,), required_tier="high"),
    ),
    (
        "the first expert struck gives the reason",
        TABLE, LOW, OTHER, "P,C", True, deny(Reason.NOT_ALLOWED, (P_STRUCK, C_STRUCK), required_tier="high"),
    ),
    ("asked twice is asked once", TABLE, LOW, {}, "A,B,A,A", True, allow("A", "B")),
    ("asked twice is no downgrade", TABLE, LOW, {}, "A,A", NEVER, allow("A")),
    ("only unknown", TABLE, HIGH, {}, "Z", True, deny(Reason.UNKNOWN_EXPERT, unknown=("Z",))),
    ("only unknown, each once", TABLE, HIGH, {}, "Z,Y,Z", True, deny(Reason.UNKNOWN_EXPERT, unknown=("Z", "Y"))),
    ("unknown beside known", TABLE, LOW, {}, "Z,A", True, allow("A", unknown=("Z",))),
    ("unknown beside known is no downgrade", TABLE, LOW, {}, "Z,A", NEVER, allow("A", unknown=("Z",))),
    (
        "unknown beside what is above the tier",
        TABLE, LOW, {}, "Z,C", True, deny(TOO_LOW, (C_STRUCK,), unknown=("Z",), required_tier="high"),
    ),
    ("names are case-sensitive", TABLE, HIGH, {}, "a", True, deny(Reason.UNKNOWN_EXPERT, unknown=("a",))),
    ("a cluster is no expert", TABLE, HIGH, {}, "expert-a", True, deny(Reason.UNKNOWN_EXPERT, unknown=("expert-a",))),
    ("nothing asked", TABLE, HIGH, {}, "", True, deny(Reason.NO_EXPERTS_REQUESTED)),
    ("nothing known, nothing asked", Policy(tiers=("low",), experts={}), LOW, {}, "", True,
     deny(Reason.NO_EXPERTS_REQUESTED)),
    ("the empty policy denies", Policy(tiers=("low",), experts={}), LOW, {}, "A", True,
     deny(Reason.UNKNOWN_EXPERT, unknown=("A",))),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "tier", "claims", "asked", "may_downgrade", "expected"),
    [row[1:] for row in DECISIONS],
    ids=[row[0] for row in DECISIONS],
)
def test_each_row_gives_its_verdict_reason_experts_and_status(
    policy: Policy, tier: int, claims: dict[str, Any], asked: str, may_downgrade: bool, expected: Expected
) -> None:
    caller = Identity(tier, "ann", "https://idp", claims)
    decision = decide(policy, caller, [n for n in asked.split(",") if n], GET, may_downgrade)
    assert expected == Expected(
        decision.verdict,
        decision.reason,
        decision.serve,
        tuple((s.expert, s.reason, s.rule) for s in decision.struck),
        decision.unknown,
        decision.required_tier,
        decision.status,
    )
    assert decision.caller_tier == policy.tiers[tier]
    assert (decision.detail == "") == bool(decision.serve)


DETAILS = [
    # name, tier, claims, names asked, detail
    ("tier", LOW, {}, "C", "expert C needs tier high, the caller has low"),
    ("allow", HIGH, OTHER, "P", "expert P does not accept this caller"),
    ("unknown", HIGH, {}, "Y,Z", "no such expert: Y, Z"),
    ("nothing", HIGH, {}, "", "the request names no expert"),
    ("forbidden", LOW, {}, "A,C,B", "only A, B may serve this caller, and the request forbids a downgrade"),
]


@pytest.mark.parametrize(
    ("tier", "claims", "asked", "detail"), [row[1:] for row in DETAILS], ids=[row[0] for row in DETAILS]
)
def test_the_detail_says_why(tier: int, claims: dict[str, Any], asked: str, detail: str) -> None:
    """In one sentence for the caller, with names and tiers but no claim."""
    decision = decide(TABLE, Identity(tier, claims=claims), [n for n in asked.split(",") if n], GET, downgrade=NEVER)
    assert decision.detail == detail


def test_every_reason_but_permitted_has_an_error_status() -> None:
    assert set(STATUS) == set(Reason) - {Reason.PERMITTED}
    assert all(400 <= status < 600 for status in STATUS.values())


ALLOW_RULES = [
    # source, what the policy says of requests, claims, permitted, errors
    ("true", False, {}, True, 0),
    ("claims.level > 2", False, {"level": 3}, True, 0),
    ("claims.level > 2", False, {"level": 2}, False, 0),
    ("claims.level > 2", False, {"level": "3"}, False, 1),
    ("claims.level > 2", False, {}, False, 1),
    ("claims.level", False, {"level": True}, True, 0),
    ("claims.level", False, {"level": 1}, False, 1),
    ("!claims.level", False, {}, False, 1),
    ('request.method == "GET"', True, {}, True, 0),
    ('request.path == "/"', True, {}, True, 0),
    ('request.headers["x-team"] == "red"', True, {}, True, 0),
    ('request.headers["x-absent"] == "red"', True, {}, False, 1),
    ('request.headers.exists(h, h.startsWith(":"))', True, {}, False, 0),
    ('request.method == "GET"', False, {}, False, 1),  # rules cannot see the request: nothing is granted
    ('claims.name == "x"', False, {"name": "\ud800"}, False, 1),
]


@pytest.mark.parametrize(("source", "reads_request", "claims", "permitted", "errors"), ALLOW_RULES)
def test_an_allow_rule_permits_only_if_it_is_true(
    source: str, reads_request: bool, claims: dict[str, Any], permitted: bool, errors: int
) -> None:
    """A rule that fails strikes the expert and is named in `errors`."""
    policy = Policy(
        tiers=("low",), experts=experts(Expert("X", 0, "x", allow=rule(source))), reads_request=reads_request
    )
    decision = decide(policy, Identity(0, claims=claims), ["X"], GET)
    assert (decision.serve == ("X",)) is permitted
    assert decision.errors == ("experts.X.allow",) * errors


def test_a_failing_rule_is_counted_once_per_decision() -> None:
    """An expert that is asked for and is also another's fallback is evaluated once."""
    broken = Expert("X", 0, "x", downgrade_to=("Y",), allow=rule("claims.absent", "experts.X.allow"))
    other = Expert("Y", 0, "y", downgrade_to=("X",), allow=rule("claims.absent", "experts.Y.allow"))
    decision = decide(Policy(tiers=("low",), experts=experts(broken, other)), Identity(0), ["X", "Y"], GET)
    assert decision.errors == ("experts.X.allow", "experts.Y.allow")


HIDDEN = [
    ("authorization", Request("GET", "/", {"authorization": "Bearer x"})),
    ("x-expert-access-token", Request("GET", "/", {"x-expert-access-token": "x"})),
    ("x-team", Request("GET", "/", {"x-team": "red"}, repeated=frozenset({"x-team"}))),
    (":path", Request("GET", "/", {":path": "/?token=x"})),
]


@pytest.mark.parametrize(("header", "request_"), HIDDEN, ids=[header for header, _ in HIDDEN])
def test_rules_cannot_read_tokens_or_repeated_headers(header: str, request_: Request) -> None:
    """Nor pseudo headers."""
    policy = Policy(
        tiers=("low",),
        experts=experts(Expert("X", 0, "x", allow=rule(f'"{header}" in request.headers'))),
        reads_request=True,
    )
    assert decide(policy, Identity(0), ["X"], request_).serve == ()


CLEARANCE = [
    # claims, tier, rules that failed
    ({"plan": "premium"}, HIGH, ()),
    ({"plan": "basic", "groups": ["staff"]}, MID, ()),
    ({"plan": "premium", "groups": ["staff"]}, HIGH, ()),
    ({"plan": "basic", "groups": []}, LOW, ()),
    ({"groups": ["staff"]}, MID, ("clearance[0].when",)),  # at most HIGH
    ({}, LOW, ("clearance[0].when", "clearance[1].when")),
    ({"plan": True, "groups": "staff"}, LOW, ("clearance[1].when",)),
    ({"plan": "premium", "name": "\udc00"}, LOW, ("clearance[0].when", "clearance[1].when")),
]


@pytest.mark.parametrize(("claims", "tier", "errors"), CLEARANCE)
def test_clearance_is_the_first_rule_that_holds(claims: dict[str, Any], tier: int, errors: tuple[str, ...]) -> None:
    """If none holds, it is the lowest tier. A rule that fails is named."""
    rules = (
        ClearanceRule(rule('claims.plan == "premium"', "clearance[0].when"), HIGH),
        ClearanceRule(rule('"staff" in claims.groups', "clearance[1].when"), MID),
    )
    assert clearance(replace(TABLE, clearance=rules), claims) == (tier, errors)
    reads = replace(TABLE, clearance=rules, claims_read=frozenset({"plan", "groups"}))
    odd = "name" in claims  # a claim that CEL cannot represent fails only the rules that may read it
    assert clearance(reads, claims) == ((HIGH, ()) if odd else (tier, errors))


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("/a%3Ab%40c%24%2B%2b", "/a:b@c$++"),
        ("/a%21%26%27%28%29%2A%2C%3B%3D", "/a!&'()*,;="),
        ("/a%253Ab", "/a%253Ab"),
        ("/a%20b%C3%A9%2F%3F", "/a%20b%C3%A9%2F%3F"),
        ("/a%3", "/a%3"),
    ],
)
def test_a_condition_reads_a_path_without_the_escapes_that_it_needs_not(path: str, read: str) -> None:
    """An expert unescapes them, so a condition on `/a:b` must see it."""
    assert readable(Request("GET", path, {}))["path"] == read


def test_one_decision_evaluates_a_bounded_number_of_conditions() -> None:
    """A caller that names experts with long lists of stand-ins must not hold up the others. No match, never a grant."""
    allow = compile_condition('claims.groups.exists(g, g == "x")', "allow", 1)
    experts = {f"E{n}": Expert(f"E{n}", 0, f"e{n}", allow=allow) for n in range(MAX_WORK)}
    caller = Identity(0, claims={"groups": ["x"]})
    decision = decide(Policy(tiers=("low",), experts=experts), caller, experts, Request("GET", "/", {}))
    assert decision.verdict is Verdict.DOWNGRADE
    assert len(decision.serve) == MAX_WORK // 16
    assert len(decision.errors) == MAX_WORK - MAX_WORK // 16


CAPPED = [
    # tiers of the rules, in order: `!` fails, `-` does not hold, `+` holds; the tier
    ("!low +high", LOW),
    ("!high +mid", MID),
    ("!mid +high", MID),
    ("!high !low !mid +high", LOW),
    ("!high +high", HIGH),
    ("+high !low", HIGH),
    ("!high -high", LOW),
    ("-low +high", HIGH),
]


@pytest.mark.parametrize(("rules", "tier"), CAPPED, ids=[rules for rules, _ in CAPPED])
def test_a_rule_that_fails_caps_the_tier(rules: str, tier: int) -> None:
    """It might have held, so nobody gets more by its failure than by its holding."""
    sources = {"!": "claims.absent", "-": "false", "+": "true"}
    tiers = ("low", "mid", "high")
    made = tuple(ClearanceRule(rule(sources[r[0]], r), tiers.index(r[1:])) for r in rules.split())
    assert clearance(replace(TABLE, clearance=made), {})[0] == tier


@given(st.lists(st.tuples(st.sampled_from("!-+"), st.integers(0, 2)), max_size=6))
def test_a_rule_that_fails_never_raises_the_tier(rules: list[tuple[str, int]]) -> None:
    """The tier is the lowest that the caller might have had, whatever the failed rules would have said."""

    def tier(outcomes: list[tuple[str, int]]) -> int:
        sources = {"!": "claims.absent", "-": "false", "+": "true"}
        made = tuple(ClearanceRule(rule(sources[sign], "here"), level) for sign, level in outcomes)
        return clearance(replace(TABLE, clearance=made), {})[0]

    possible = [[]]
    for sign, level in rules:
        possible = [[*p, (s, level)] for p in possible for s in ("-+" if sign == "!" else sign)]
    assert tier(rules) == min(map(tier, possible))


def test_without_clearance_rules_the_tier_is_the_lowest() -> None:
    """Whatever the claims of a verified caller say."""
    assert clearance(TABLE, {"tier": "high"}) == (LOW, ())


@pytest.mark.parametrize("asked", [["A"], ["C"], ["Z"], []], ids=["allow", "deny", "unknown", "nothing"])
def test_a_decision_names_the_clearance_rules_that_failed(asked: list[str]) -> None:
    """So they are counted whatever the verdict."""
    caller = Identity(LOW, errors=("clearance[0].when",))
    assert decide(TABLE, caller, asked, GET).errors == ("clearance[0].when",)


def test_a_refusal_is_a_denial() -> None:
    """With the refusal's reason and status, and no expert to serve."""
    decision = refuse(Refusal(Reason.BAD_GATE, "why"), "low")
    assert (decision.verdict, decision.status, decision.serve) == (Verdict.DENY, 400, ())
    assert (decision.detail, decision.caller_tier) == ("why", "low")


# ---- what holds for every policy, caller and request -----------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    policy: Policy
    caller: Identity
    asked: list[str]
    request: Request
    may_downgrade: bool

    def decide(self, **changes: Any) -> Decision:
        case = replace(self, **changes)
        return decide(case.policy, case.caller, case.asked, case.request, case.may_downgrade)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    policy = draw(policies())
    return Case(policy, draw(callers(policy)), draw(named), draw(requests), draw(st.booleans()))


def may_have(case: Case, name: str) -> bool:
    expert = case.policy.experts[name]
    allowed = expert.allow is None or HOLDS[expert.allow.source](case.caller.claims, case.request)
    return expert.tier <= case.caller.tier and allowed


def reference(case: Case) -> tuple[str, list[str]]:
    """The rule once more, written independently of the code."""
    known = case.policy.experts
    requested = [n for i, n in enumerate(case.asked) if n in known and n not in case.asked[:i]]
    serve = [n for n in requested if may_have(case, n)]
    if not serve:
        lesser = [d for n in requested for d in known[n].downgrade_to]
        serve = [d for i, d in enumerate(lesser) if d not in lesser[:i] and may_have(case, d)]
    if requested and serve == requested:
        return "allow", serve
    return ("downgrade", serve) if serve and case.may_downgrade else ("deny", [])


@given(cases())
def test_verdict_and_experts_are_those_of_an_independent_implementation(case: Case) -> None:
    decision = case.decide()
    assert (decision.verdict, list(decision.serve)) == reference(case)


@given(cases())
def test_only_permitted_experts_serve(case: Case) -> None:
    """Each expert that serves is known, is itself permitted to the caller, and is named once."""
    decision = case.decide()
    assert len(set(decision.serve)) == len(decision.serve)
    assert all(n in case.policy.experts and may_have(case, n) for n in decision.serve)


@given(cases())
def test_verdicts_mean_what_they_say(case: Case) -> None:
    """Allow: every known expert asked for. Deny: none. Downgrade: others or fewer, and never if forbidden."""
    decision = case.decide()
    assert (decision.verdict is Verdict.ALLOW) == (decision.serve == decision.requested != ())
    assert (decision.verdict is Verdict.DENY) == (decision.serve == ())
    assert (decision.status == 200) == (decision.verdict is not Verdict.DENY)
    assert case.may_downgrade or decision.verdict is not Verdict.DOWNGRADE
    assert (decision.reason is Reason.PERMITTED) == (decision.verdict is Verdict.ALLOW)


@given(cases(), st.data())
def test_a_lower_clearance_adds_no_expert(case: Case, data: st.DataObject) -> None:
    """Of the experts asked for, a lower tier permits a subset of what a higher tier does, and denies all it denies."""
    lower = replace(case.caller, tier=data.draw(st.integers(0, case.caller.tier)))
    before, after = case.decide(), case.decide(caller=lower)
    asked = set(before.requested)
    assert set(after.serve) & asked <= set(before.serve) & asked
    assert all(case.policy.experts[n].tier <= lower.tier for n in after.serve)
    if before.verdict is Verdict.DENY and before.reason is not Reason.DOWNGRADE_FORBIDDEN:
        assert after.verdict is Verdict.DENY


@given(cases(), st.data())
def test_an_unknown_name_changes_no_verdict(case: Case, data: st.DataObject) -> None:
    """Among known names it changes only what is reported, and it never reverses a denial."""
    place = data.draw(st.integers(0, len(case.asked)))
    before, after = case.decide(), case.decide(asked=[*case.asked[:place], "nobody-at-all", *case.asked[place:]])
    assert (after.verdict, after.serve) == (before.verdict, before.serve)
    assert after.unknown != ()
    assert after.reason is before.reason or before.reason is Reason.NO_EXPERTS_REQUESTED


@given(cases())
def test_forbidding_a_downgrade_only_removes_experts(case: Case) -> None:
    """`x-srp-downgrade: never` does not change an allow and turns a downgrade into a denial."""
    free, strict = case.decide(may_downgrade=True), case.decide(may_downgrade=False)
    assert set(strict.serve) <= set(free.serve)
    assert strict.serve == (free.serve if free.verdict is Verdict.ALLOW else ())
    assert (strict.reason is Reason.DOWNGRADE_FORBIDDEN) == (free.verdict is Verdict.DOWNGRADE)


@given(cases())
def test_a_decision_is_deterministic_and_lists_every_struck_expert(case: Case) -> None:
    """Each expert asked for is either struck or permitted."""
    first, again = case.decide(), case.decide()
    fields = ("verdict", "reason", "requested", "serve", "struck", "unknown", "detail", "required_tier", "errors")
    assert [getattr(first, f) for f in fields] == [getattr(again, f) for f in fields]
    struck = {s.expert for s in first.struck}
    assert struck == {n for n in first.requested if not may_have(case, n)}
    too_low = [case.policy.experts[s.expert].tier for s in first.struck if s.reason is Reason.TIER_TOO_LOW]
    assert first.required_tier == (case.policy.tiers[min(too_low)] if too_low else None)
