"""Identify, gate, decide: in this order; and what a snapshot caches of it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext_authz.core.cache import Cache, CacheCounts
from ext_authz.core.check import MAX_PATH, check, identify, lookup, store
from ext_authz.core.condition import compile_condition
from ext_authz.core.headers import DOWNGRADE
from ext_authz.core.identity import Keys
from ext_authz.core.jwk import parse_jwks
from ext_authz.core.model import Decision, Identity, Outcome, Reason, Refusal, Request, Verdict
from ext_authz.core.policy import Body, ClearanceRule, Expert, GateRule, Header, Issuer, Policy, Revoked
from ext_authz.core.snapshot import CacheSizes, Snapshot, headers_read
from tests.harness import tokens
from tests.harness.strategies import header_texts
from tests.harness.tokens import AUDIENCE, ISSUER

NOW = 1_800_000_000.0
GET_ONLY = compile_condition('request.method == "GET"', "experts.G.allow", 1)

EXPERTS = {
    "A": Expert("A", 0, "expert-a"),
    "C": Expert("C", 1, "expert-c", downgrade_to=("A",)),
    "H": Expert("H", 1, "expert-h"),
}
POLICY = Policy(
    tiers=("low", "high"),
    experts=EXPERTS,
    issuers={ISSUER: Issuer(ISSUER, frozenset({AUDIENCE}), frozenset({"ES256"}))},
    anonymous=0,
    clearance=(ClearanceRule(compile_condition('claims.plan == "premium"', "clearance[0].when", 1), 1),),
    gate=(GateRule("/", exact=False, source=Header("x-expert-names"), default=("A",)),),
    leeway=30,
)


def keys(*names: str) -> Keys:
    """ISSUER's keys with the ES256 key of each of `names`."""
    return {ISSUER: tuple(key for name in names or ("",) for key in parse_jwks(tokens.jwks("ES256", name=name)).keys)}


def token(name: str = "", **over: Any) -> str:
    return tokens.sign(tokens.claims(**{"iat": NOW, "exp": NOW + 300, "plan": "free", **over}), name=name)


def request_for(names: str | None = "A", bearer: str | None = None, method: str = "GET", **headers: str) -> Request:
    """A request for `names`; a header's name is written with underscores."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if names is not None:
        sent["x-expert-names"] = names
    if bearer is not None:
        sent["authorization"] = f"Bearer {bearer}"
    return Request(method, "/", sent)


def decided(snapshot: Snapshot, request: Request, now: float = NOW) -> Decision:
    return outcome(snapshot, request, now).decision


def outcome(snapshot: Snapshot, request: Request, now: float = NOW) -> Outcome:
    found = check(snapshot, request, now)
    assert isinstance(found, Outcome), found
    return found


def premium() -> str:
    return token(plan="premium")


DECIDED = [
    # name, policy, request, verdict, reason, candidates, caller's tier
    ("anonymous", POLICY, lambda: request_for("A"), Verdict.ALLOW, Reason.PERMITTED, ("A",), "low"),
    ("anonymous, default", POLICY, lambda: request_for(None), Verdict.ALLOW, Reason.PERMITTED, ("A",), "low"),
    ("premium", POLICY, lambda: request_for("C", premium()), Verdict.ALLOW, Reason.PERMITTED, ("C",), "high"),
    ("free", POLICY, lambda: request_for("H", token()), Verdict.DENY, Reason.TIER_TOO_LOW, (), "low"),
    ("downgrade", POLICY, lambda: request_for("C", token()), Verdict.DOWNGRADE, Reason.TIER_TOO_LOW, ("A",), "low"),
    ("bad gate", POLICY, lambda: request_for("A B", token()), Verdict.DENY, Reason.BAD_GATE, (), "low"),
    ("nobody named", POLICY, lambda: request_for(""), Verdict.DENY, Reason.NO_EXPERTS_REQUESTED, (), "low"),
    ("unknown", POLICY, lambda: request_for("Z", premium()), Verdict.DENY, Reason.UNKNOWN_EXPERT, (), "high"),
    ("bad token", POLICY, lambda: request_for("A", "x.y.z"), Verdict.DENY, Reason.INVALID_TOKEN, (), None),
    ("the token comes first", POLICY, lambda: request_for("A B", "x"), Verdict.DENY, Reason.INVALID_TOKEN, (), None),
    ("expired", POLICY, lambda: request_for("A", token(exp=NOW - 31)), Verdict.DENY, Reason.INVALID_TOKEN, (), None),
    ("no token where one is needed", replace(POLICY, anonymous=None), lambda: request_for("A"),
     Verdict.DENY, Reason.TOKEN_REQUIRED, (), None),
    ("no gate", replace(POLICY, gate=()), lambda: request_for("A"),
     Verdict.DENY, Reason.NO_EXPERTS_REQUESTED, (), "low"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "request_", "verdict", "reason", "serve", "tier"),
    [row[1:] for row in DECIDED],
    ids=[row[0] for row in DECIDED],
)
def test_the_identity_comes_first_then_the_gate_then_the_decision(
    policy: Policy, request_: Any, verdict: Verdict, reason: Reason, serve: tuple[str, ...], tier: str | None
) -> None:
    found = decided(Snapshot(policy, keys()), request_())
    assert (found.verdict, found.reason, found.serve, found.caller_tier) == (verdict, reason, serve, tier)


LARGE = [
    # name, header lines, bytes of headers, whether they are too many
    ("small", 10, 1000, False),
    ("the most", 80, 48 * 1024, False),
    ("a line too many", 81, 1000, True),
    ("a byte too many", 10, 48 * 1024 + 1, True),
]


@pytest.mark.parametrize(("lines", "size", "refused"), [row[1:] for row in LARGE], ids=[row[0] for row in LARGE])
@pytest.mark.parametrize("bearer", [None, "a.b.c"])
def test_headers_that_leave_no_room_for_a_decisions_own_come_before_all_else(
    bearer: str | None, lines: int, size: int, refused: bool
) -> None:
    """Otherwise Envoy would fail with 503 when it adds them."""
    request = request_for("A", bearer)._replace(lines=lines, size=size)
    found = outcome(Snapshot(POLICY, keys()), request)
    assert (found.decision.reason is Reason.HEADERS_TOO_LARGE) is refused
    assert not refused or found.decision.verdict is Verdict.DENY
    assert not refused or "80 headers, or over 48 KiB" in found.decision.detail


REFUSALS = [
    ("unknown kid", keys, lambda: token("new"), Reason.INVALID_TOKEN),
    ("keys not loaded", dict, token, Reason.KEYS_UNAVAILABLE),
]


@pytest.mark.parametrize(("known", "bearer", "reason"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_a_token_that_fresh_keys_might_verify_comes_back_as_a_refusal(known: Any, bearer: Any, reason: Reason) -> None:
    """The refusal names the issuer whose keys to fetch."""
    found = check(Snapshot(POLICY, known()), request_for("A", bearer()), NOW)
    assert isinstance(found, Refusal)
    assert (found.reason, found.issuer) == (reason, ISSUER)


DOWNGRADES: list[tuple[str | None, bool, Verdict]] = [
    (None, False, Verdict.DOWNGRADE),
    ("allow", False, Verdict.DOWNGRADE),
    ("never", False, Verdict.DENY),
    ("NEVER", False, Verdict.DENY),
    ("", False, Verdict.DENY),
    ("Allow", False, Verdict.DENY),
    ("nevr", False, Verdict.DENY),
    ("allow, never", False, Verdict.DENY),
    ("allow", True, Verdict.DENY),
]


@pytest.mark.parametrize(("value", "repeated", "verdict"), DOWNGRADES)
def test_only_allow_or_no_header_at_all_permits_a_downgrade(
    value: str | None, repeated: bool, verdict: Verdict
) -> None:
    """A client that writes anything else means to be strict."""
    headers = {"x-expert-names": "C", **({} if value is None else {DOWNGRADE: value})}
    request = Request("GET", "/", headers, repeated=frozenset({DOWNGRADE} if repeated else ()))
    found = decided(Snapshot(POLICY), request)
    assert found.verdict is verdict
    assert (found.reason is Reason.DOWNGRADE_FORBIDDEN) == (verdict is Verdict.DENY)


# ---- what a snapshot caches ------------------------------------------------------------------------------------------


def identified(snapshot: Snapshot, bearer: str, now: float) -> Identity | Refusal:
    return identify(snapshot, request_for(bearer=bearer), now)


def test_a_verified_token_is_cached() -> None:
    """The same token gives the same Identity object, whichever header carries it; another token gives another."""
    snapshot, bearer = Snapshot(POLICY, keys()), token()
    first = identified(snapshot, bearer, NOW)
    assert isinstance(first, Identity)
    assert identified(snapshot, bearer, NOW + 1) is first
    assert identify(snapshot, Request("GET", "/", {"x-expert-access-token": bearer}), NOW) is first
    assert identified(snapshot, token(), NOW) is not first  # no two ES256 signatures are the same


def test_a_cached_token_is_refused_once_it_has_expired() -> None:
    """From `exp` plus the leeway on, and ever after."""
    snapshot, bearer = Snapshot(POLICY, keys()), token(exp=NOW + 10)
    assert isinstance(identified(snapshot, bearer, NOW), Identity)
    assert isinstance(identified(snapshot, bearer, NOW + 39.999), Identity)
    for late in (40, 41, 10**6):
        refused = identified(snapshot, bearer, NOW + late)
        assert isinstance(refused, Refusal)
        assert refused.reason is Reason.INVALID_TOKEN


def test_a_refusal_is_not_cached() -> None:
    """A token that is not valid yet becomes valid later."""
    snapshot, bearer = Snapshot(POLICY, keys()), token(nbf=NOW + 100)
    assert isinstance(identified(snapshot, bearer, NOW), Refusal)
    assert len(snapshot.tokens) == 0
    assert isinstance(identified(snapshot, bearer, NOW + 100), Identity)


def test_a_cached_token_makes_no_other_text_valid() -> None:
    snapshot, bearer = Snapshot(POLICY, keys()), token()
    assert isinstance(identified(snapshot, bearer, NOW), Identity)
    for other in (bearer + ".", bearer[:-1], bearer + "=", bearer.swapcase(), f"{bearer}\xe9"):
        assert isinstance(identified(snapshot, other, NOW), Refusal)


CHANGES = [
    # a change after which the old token is refused
    ("key gone", POLICY, lambda: keys("new")),
    ("issuer gone", replace(POLICY, issuers={}), keys),
    ("token revoked", replace(POLICY, revoked=Revoked(jti=frozenset({"t1"}))), keys),
    ("subject revoked", replace(POLICY, revoked=Revoked(sub=frozenset({"ada"}))), keys),
    ("all earlier tokens revoked", replace(POLICY, revoked=Revoked(issued_before=NOW + 1)), keys),
]


@pytest.mark.parametrize(("policy", "known"), [f[1:] for f in CHANGES], ids=[f[0] for f in CHANGES])
def test_a_new_snapshot_starts_with_empty_caches(policy: Policy, known: Any) -> None:
    """A change of policy or keys creates a new snapshot, which verifies a token again and may refuse it."""
    bearer = token(jti="t1")
    assert isinstance(identified(Snapshot(POLICY, keys()), bearer, NOW), Identity)
    assert isinstance(identified(Snapshot(policy, known()), bearer, NOW), Refusal)


def test_decisions_of_an_old_policy_do_not_reach_the_new_one() -> None:
    """Neither for tokens nor for anonymous callers."""
    stricter = replace(POLICY, experts={**EXPERTS, "A": replace(EXPERTS["A"], tier=1)})
    old, new, bearer = Snapshot(POLICY, keys()), Snapshot(stricter, keys()), token()
    for caller in (None, bearer):
        assert decided(old, request_for("A", caller)).verdict is Verdict.ALLOW
        assert decided(new, request_for("A", caller)).verdict is Verdict.DENY


def test_a_decision_is_cached_by_tier_names_and_downgrade() -> None:
    """If all three are the same, so is the decision object; if one differs, so does the object."""
    snapshot, bearer = Snapshot(POLICY, keys()), premium()
    first = outcome(snapshot, request_for("C,A", bearer))
    same = [
        outcome(snapshot, request_for(" C , A ", bearer)),
        outcome(snapshot, request_for("C,A", token(plan="premium", sub="bob", exp=NOW + 99))),
    ]
    assert [o.decision for o in same] == [first.decision] * 2
    assert [(o.caller.subject, o.caller.expires) for o in same] == [("ada", NOW + 330), ("bob", NOW + 129)]
    others = [
        decided(snapshot, request_for("A,C", bearer)),
        decided(snapshot, request_for("C,A")),
        decided(snapshot, request_for("C,A", token())),
        decided(snapshot, request_for("C,A", bearer, x_srp_downgrade="never")),
    ]
    assert all(other is not first.decision for other in others)


def test_where_conditions_read_claims_each_caller_has_its_own_decisions() -> None:
    """Two callers of one tier, and an expert that accepts only one of them."""
    ours = compile_condition('claims.sub == "ada"', "experts.A.allow", 1)
    policy = replace(POLICY, experts={**EXPERTS, "A": replace(EXPERTS["A"], allow=ours)})
    snapshot = Snapshot(policy, keys())
    for _ in range(2):
        assert decided(snapshot, request_for("A", token())).verdict is Verdict.ALLOW
        assert decided(snapshot, request_for("A", token(sub="bob"))).reason is Reason.NOT_ALLOWED
        assert decided(snapshot, request_for("A")).reason is Reason.NOT_ALLOWED


def test_an_expired_token_gets_no_cached_decision() -> None:
    """The identity is checked on every request, before any cached decision."""
    snapshot, bearer = Snapshot(POLICY, keys()), token(exp=NOW + 10)
    assert decided(snapshot, request_for("A", bearer)).verdict is Verdict.ALLOW
    assert decided(snapshot, request_for("A", bearer), NOW + 40).reason is Reason.INVALID_TOKEN


def test_where_conditions_read_the_request_no_decision_is_cached() -> None:
    """Two requests that differ only in what a rule reads get two answers."""
    policy = replace(POLICY, experts={"G": Expert("G", 0, "g", allow=GET_ONLY)}, reads_request=True)
    snapshot = Snapshot(policy, keys())
    for bearer in (None, token()):
        assert decided(snapshot, request_for("G", bearer, "GET")).verdict is Verdict.ALLOW
        assert decided(snapshot, request_for("G", bearer, "POST")).reason is Reason.NOT_ALLOWED
        assert decided(snapshot, request_for("G", bearer, "GET")).verdict is Verdict.ALLOW
    assert len(snapshot.decisions) == 0


def test_names_that_anyone_can_invent_are_not_cached() -> None:
    """Unknown names, and names that the gate refuses, take no room in a cache."""
    snapshot = Snapshot(POLICY)
    for n in range(100):
        decided(snapshot, request_for(f"invented-{n},A"))
        decided(snapshot, request_for(f"invented-{n}"))
        decided(snapshot, request_for(f"in vented-{n}"))
    assert len(snapshot.decisions) == 0


def test_the_caches_are_bounded() -> None:
    """With ever new tokens, names and headers, each keeps its size and its newest entries, and counts evictions."""
    sizes = CacheSizes(tokens=4, decisions=2)
    snapshot = sizes.snapshot(POLICY, keys(), 1)
    for n, names in enumerate(["A", "C", "H", "A,C", "A,H"]):
        request = request_for(names, token(sub=f"caller-{n}"))
        for _ in range(2):
            answered(snapshot, request)
    assert (len(snapshot.tokens), len(snapshot.decisions), len(snapshot.requests)) == (3, 2, 2)
    assert sizes.counts == {
        "tokens": CacheCounts(5, 5, 2),
        "decisions": CacheCounts(5, 5, 3),
        "requests": CacheCounts(0, 10, 3),
    }
    newer = sizes.snapshot(POLICY, keys(), 2)
    assert (len(newer.tokens), newer.tokens.counts.misses) == (0, 5)


@given(
    st.integers(1, 8),
    st.lists(st.tuples(st.sampled_from("abcdefghijkl"), st.sampled_from([0, 1, 1, 1, 3])), max_size=60),
)
def test_a_cache_is_bounded_and_keeps_the_latest_half(size: int, used: list[tuple[str, int]]) -> None:
    """A key is looked up (0) or put with a number of places. A hit returns what was last put under its key."""
    cache: Cache[str, int] = Cache(size)
    kept: dict[str, tuple[int, int]] = {}
    order: list[str] = []
    gone = 0
    for n, (key, places) in enumerate(used):
        before = {k for k in kept if k in cache._young or k in cache._old}
        if places:
            cache.put(key, n, places)
            kept[key] = n, places
        elif (found := cache.get(key)) is not None:
            assert found == kept[key][0]
        else:
            assert key not in before
        here = {k for k in kept if k in cache._young or k in cache._old}
        gone += len(before - here)
        if key in here:
            order = [*(k for k in order if k != key), key]
        assert cache.counts.evictions == gone
        assert len(cache) == len(here)
        assert len(cache._young) == 1 or sum(kept[k][1] for k in cache._young) <= max(1, size // 2)
        latest, room = set(), max(1, size // 2)
        for k in reversed(order):
            if k not in here or (room := room - kept[k][1]) < 0:
                break
            latest.add(k)
        assert latest <= here


def test_tokens_that_come_once_evict_no_regular_caller() -> None:
    """A request is cached by its headers when its token comes a second time, not the first."""
    snapshot = CacheSizes(tokens=100, decisions=4).snapshot(POLICY, keys(), 1)
    for regular in (request_for("A"), request_for("A", token(sub="regular"))):
        for _ in range(2):
            answered(snapshot, regular)
    assert len(snapshot.requests) == 2
    once = [request_for("A", token(sub=f"once-{n}")) for n in range(20)]
    for request in once:
        answered(snapshot, request)
    assert (len(snapshot.requests), snapshot.requests.counts.evictions) == (2, 0)
    answered(snapshot, once[0])
    assert len(snapshot.requests) == 3


def test_a_request_with_a_long_path_is_not_cached() -> None:
    """Anyone can send one."""
    snapshot = Snapshot(POLICY)
    for n in (MAX_PATH, MAX_PATH + 1):
        request = request_for("A")._replace(path="/".ljust(n, "x"))
        assert answered(snapshot, request).decision.serve == ("A",)
    assert len(snapshot.requests) == 1


def test_a_request_with_a_repeated_header_is_not_cached() -> None:
    """No cached request has a header twice that matters; leases rely on that."""
    snapshot = Snapshot(POLICY)
    for header in ("x-expert-names", "x-requested-cluster"):
        asked = request_for("A", x_requested_cluster="A")._replace(repeated=frozenset({header}))
        answered(snapshot, asked)
    assert len(snapshot.requests) == 0


GATES = (
    GateRule("/body", exact=True, source=Body(("names",)), default=("A",)),
    GateRule("/other/", exact=False, source=Header("x-other")),
    GateRule("/", exact=False, source=Header("x-expert-names"), default=("A", "C")),
)
CALLERS = (None, token(sub="ann"), token(sub="bob", plan="premium"), token(sub="cy", exp=NOW + 10), "no token")
sent_headers = st.fixed_dictionaries(
    {},
    optional={
        "x-expert-names": st.sampled_from(["A", "C", "A,C", "C,A", "H", "X,A", "X", ""]),
        "x-other": st.sampled_from(["C", "H"]),
        DOWNGRADE: st.sampled_from(["never", "allow"]),
        "content-encoding": st.just("gzip"),
        "x-expert-access-token": st.sampled_from(CALLERS[1:]),
        "x-team": st.sampled_from(["red", "blue"]),
    },
)


bodies = st.sampled_from([b"", b'{"names": ["A"]}', b'{"names": "C"}', b'{"names": 1}', b"{}"])
methods = st.sampled_from(["GET", "POST"])


@st.composite
def requests(draw: st.DrawFn) -> Request:
    headers: dict[str, Any] = draw(sent_headers)
    if caller := draw(st.sampled_from(CALLERS)):
        headers = {"authorization": f"Bearer {caller}", **headers}
    repeated = frozenset(n for n in headers if draw(st.integers(0, 9)) == 0)
    path = draw(st.sampled_from(["/body", "/other/x", "/", "/body/"]))
    return Request(draw(methods), path, headers, draw(bodies), repeated)


RED = compile_condition('request.headers["x-team"] == "red" && request.method == "GET"', "experts.C.allow", 1)
ONCE = replace(POLICY, gate=GATES, experts={**EXPERTS, "C": replace(EXPERTS["C"], downgrade_to=("A",))})
READER = replace(ONCE, experts={**EXPERTS, "C": replace(EXPERTS["C"], allow=RED)}, reads_request=True)


@st.composite
def repetitions(draw: st.DrawFn) -> list[tuple[Request, int]]:
    """A few requests, repeated, sometimes with another body or method; and the seconds that pass before each."""
    few = draw(st.lists(requests(), min_size=1, max_size=3))
    asked = []
    for _ in range(draw(st.integers(2, 12))):
        request = draw(st.sampled_from(few))
        request = draw(st.sampled_from([request, request._replace(body=draw(bodies), method=draw(methods))]))
        asked.append((request, draw(st.sampled_from([0, 0, 0, 20, 60]))))
    return asked


@given(st.sampled_from([ONCE, READER]), repetitions())
@settings(max_examples=400)
def test_earlier_requests_change_no_answer(policy: Policy, asked: list[tuple[Request, int]]) -> None:
    """Any requests in any order, over time: each gets the answer that a new snapshot would give.

    And only the headers that `headers_read` names make a difference.
    """
    used, now = Snapshot(policy, keys()), NOW
    for request, later in asked:
        now = max(now, NOW + later)
        assert contents(answered(used, request, now)) == contents(outcome(Snapshot(policy, keys()), request, now))


def contents(of: Outcome) -> list[Any]:
    caller = of.caller
    whose = (caller.tier, caller.subject, caller.issuer, caller.claims, caller.expires, caller.errors)
    return [whose, *(getattr(of.decision, f.name) for f in fields(of.decision))]


def answered(snapshot: Snapshot, request: Request, now: float = NOW) -> Outcome:
    """As the server does it: from the cache, or decided by the headers that are read and then cached."""
    fingerprint = request.path, repr((request.headers, request.repeated)).encode()
    known = lookup(snapshot, SimpleNamespace(fingerprint=fingerprint, body=request.body), now)
    if known is None:
        reads = headers_read(snapshot.policy)
        request = request._replace(
            headers={n: v for n, v in request.headers.items() if reads is None or n in reads},
            repeated=frozenset(n for n in request.repeated if reads is None or n in reads),
        )
        known = outcome(snapshot, request, now)
        store(snapshot, fingerprint, request, known)
    return known


def test_a_snapshot_that_is_replaced_is_freed() -> None:
    """Nothing else holds its identities and decisions."""
    snapshot = Snapshot(POLICY, keys())
    decision = weakref.ref(decided(snapshot, request_for("A", token())))
    assert decision() is not None
    del snapshot
    gc.collect()
    assert decision() is None


HEADERS = st.sampled_from(["authorization", "x-expert-access-token", "x-expert-names", DOWNGRADE])


@given(st.dictionaries(HEADERS, header_texts), st.text(max_size=20), st.sets(HEADERS))
def test_any_headers_give_a_decision(headers: dict[str, str], path: str, repeated: set[str]) -> None:
    """With anything in a token header it is a denial or a refusal; nobody is let in."""
    found = check(Snapshot(POLICY, keys()), Request("GET", path, headers, repeated=frozenset(repeated)), NOW)
    if "authorization" in headers or "x-expert-access-token" in headers:
        assert isinstance(found, Refusal) or found.decision.reason is Reason.INVALID_TOKEN
    if isinstance(found, Outcome):
        assert (found.decision.serve == ()) == (found.decision.verdict is Verdict.DENY)
        assert set(found.decision.serve) <= {"A"}
