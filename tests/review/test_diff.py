"""`srp diff`: what the policies show, what the log shows, and what cannot be known."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ext_authz.cli.main import main
from ext_authz.core.check import check
from ext_authz.core.difference import Difference
from ext_authz.core.model import Reason, Verdict
from ext_authz.core.policy import Policy
from ext_authz.observe.decision_record import Record, RecordWriter
from ext_authz.review.changes import Effect, changes
from ext_authz.review.diff import MAX_LINE, compare
from ext_authz.review.reads import Cause, NotReplayable
from ext_authz.review.replay import Replay, Replayed
from ext_authz.wire import check as wire
from tests.harness import tokens
from tests.harness.authorization import POLICY, authorization, load_policy, snapshot, write_policy
from tests.harness.checks import check_request, token

Edit = tuple[str, str]


def pair(directory: Path, *edits: Edit, before: tuple[Edit, ...] = ()) -> tuple[Policy, Policy]:
    """The policy with the edits `before`, and the policy with `edits` as well."""
    return load_policy(directory, *before), load_policy(directory, *before, *edits)


ISSUER_LINE = POLICY[POLICY.index("  - {issuer") : POLICY.index("anonymous:")]
OTHER_ISSUER = ISSUER_LINE.replace(tokens.ISSUER, "https://other.example/")
RULE = "  - {when: 'claims.plan == \"premium\"', tier: high}\n"
GATE = POLICY[POLICY.index("gate:") :]
C = 'C: {tier: high, cluster: expert-c, endpoints: ["127.0.0.1:3"]'

# ---- two policies ----------------------------------------------------------------------------------------------------

CHANGES: list[tuple[str, list[Edit], list[str]]] = [
    ("nothing", [("version: 1\n", "version: 1 # the same\n")], []),
    ("a lower tier", [("C: {tier: high", "C: {tier: low")],
     ["wider tier low gains C", "neutral experts.C.tier high → low"]),
    ("a higher tier", [("A: {tier: low", "A: {tier: high"), ("[B, A]", "[B]"), ], [
        "narrower tier low loses A", "neutral experts.A.tier low → high",
        "neutral experts.D.downgrade_to [B, A] → [B]",
    ]),
    ("a new expert", [(C, 'E: {tier: high, endpoints: ["127.0.0.1:5"]}\n  ' + C)],
     ["wider tier high gains E", "neutral experts.E is new"]),
    ("an expert that goes", [(f"  {C}}}\n", "")], ["narrower tier high loses C", "neutral experts.C is gone"]),
    ("a new tier between", [("[low, high]", "[low, mid, high]")],
     ["neutral tiers [low, high] → [low, mid, high]", "neutral tier mid is new and reaches A, B"]),
    ("no anonymous callers", [("anonymous: low", "anonymous: deny")], ["narrower anonymous low → deny"]),
    ("anonymous callers high", [("anonymous: low", "anonymous: high")], ["wider anonymous low → high"]),
    ("a clearance rule's tier", [(RULE, RULE.replace("tier: high", "tier: low"))],
     ["narrower clearance[0].tier high → low"]),
    ("another clearance rule", [(RULE, RULE + RULE.replace("premium", "gold"))],
     ['unclear clearance[1] added: `claims.plan == "gold"` → high']),
    ("another condition", [("premium", "gold")], [
        'unclear clearance[0] removed: `claims.plan == "premium"` → high',
        'unclear clearance[0] added: `claims.plan == "gold"` → high',
    ]),
    ("an allow rule", [(C, C + ", allow: 'claims.org == \"acme\"'")],
     ['narrower experts.C.allow none → `claims.org == "acme"`']),
    ("another issuer", [(ISSUER_LINE, ISSUER_LINE + OTHER_ISSUER)],
     ["wider issuers https://other.example/ is now trusted"]),
    ("another audience", [(tokens.AUDIENCE, f"{tokens.AUDIENCE}, more")],
     [f"wider issuers {tokens.ISSUER} audiences [{tokens.AUDIENCE}] → [{tokens.AUDIENCE}, more]"]),
    ("keys from elsewhere", [("file: jwks.json", "url: https://idp.example.com/jwks")],
     [f"unclear issuers {tokens.ISSUER} the source of its keys changed"]),
    ("revocation", [("version: 1\n", "version: 1\nrevoked: {jti: [a, b], issued_before: 2030-01-01T00:00:00Z}\n")], [
        "narrower revoked.jti 2 added, 0 removed", "narrower revoked.issued_before none → 1893456000.0",
    ]),
    ("the gate", [("default: [A, B]", "default: [A]")], [
        "neutral gate[0] removed: path /route: json /expert_names, default [A, B]",
        "neutral gate[0] added: path /route: json /expert_names, default [A]",
    ]),
    ("a gate without choice", [(GATE, "gate:\n  - {prefix: /, default: [A]}\n")], [
        "narrower gate requests can no longer ask for B, C, D",
        "neutral gate[0] removed: path /route: json /expert_names, default [A, B]",
        "neutral gate[1] removed: prefix /: header x-expert-names",
        "neutral gate[0] added: prefix /: the default only, default [A]",
    ]),
    ("traffic", [('["127.0.0.1:1"]', '["127.0.0.1:9"], weight: 2, timeout: 5s')],
     ["neutral experts.A changed endpoints, weight, timeout"]),
    ("a cluster", [("cluster: expert-a", "cluster: expert-x")], ["neutral experts.A.cluster expert-a → expert-x"]),
    ("leases", [("version: 1\n", "version: 1\nlease: 1m\n")], ["neutral lease 30s → 60s"]),
    ("the rest", [("log_claims: [plan, org]", "leeway: 1m\nforward_token: true")], [
        "wider leeway 30s → 60s", "neutral forward_token false → true", "neutral log_claims [plan, org] → []",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "expected"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_every_change_is_listed_with_its_effect(tmp_path: Path, edits: list[Edit], expected: list[str]) -> None:
    """In one line; there is no other line."""
    found = changes(*pair(tmp_path, *edits))
    assert [f"{c.effect.value} {c.path} {c.text}" for c in found] == expected


def test_the_reverse_change_has_the_opposite_effect(tmp_path: Path) -> None:
    """What is wider in one direction is narrower in the other, for every change with a clear effect."""
    turned = {Effect.WIDER: Effect.NARROWER, Effect.NARROWER: Effect.WIDER}
    for _, edits, _ in CHANGES:
        old, new = pair(tmp_path, *edits)
        there, back = ({c.effect for c in changes(*p)} for p in ((old, new), (new, old)))
        assert {turned.get(e, e) for e in there} == back


# ---- one record under two policies -----------------------------------------------------------------------------------


def made(*experts: str, **over: Any) -> Record:
    """The record of a low caller's request for `experts`, with members replaced."""
    whole = Record(
        time=1.8e9, decision_id="1" * 16, policy="another", verdict=Verdict.ALLOW, reason=Reason.PERMITTED,
        requested=experts, serve=experts, downgrade=True, tier="low", anonymous=False,
        claims={"plan": "free"}, absent=frozenset({"org"}), method="POST", path="/x",
    )  # fmt: skip
    return replace(whole, **over)


C_IS_LOW: Edit = ("C: {tier: high", "C: {tier: low")
ALLOW_C: Edit = (C, C + ", allow: 'claims.org == \"acme\"'")
BY_EMAIL: Edit = (RULE, RULE.replace("claims.plan", "claims.email"))
BY_ANY: Edit = (RULE, "  - {when: 'size(claims) > 3', tier: high}\n")
PREMIUM = {"claims": {"plan": "premium", "org": "acme"}, "absent": frozenset()}
ANONYMOUS = {"anonymous": True, "claims": {}, "absent": frozenset()}
BAD_GATE = {"requested": None, "reason": Reason.BAD_GATE, "verdict": Verdict.DENY, "serve": ()}
NEW_DEFAULT: Edit = ("default: [A, B]", "default: [A]")
BY_PATH: Edit = (C, C + ", allow: 'request.path.startsWith(\"/x\")'")
BY_HEADER: Edit = (C, C + ', allow: \'request.headers["x-team"] == "red"\'')
REVOKED: Edit = ("version: 1\n", "version: 1\nrevoked: {jti: [a]}\n")
EARLIER: Edit = ("version: 1\n", "version: 1\nrevoked: {issued_before: 2030-01-01T00:00:00Z}\n")

REPLAYS: list[tuple[str, list[Edit], list[str], dict[str, Any], str]] = [
    # name, edits, experts asked, the record's members, outcome (`+` for widening) or cause
    ("unchanged", [C_IS_LOW], ["A"], {}, "unchanged"),
    ("deny to allow", [C_IS_LOW], ["C"], {}, "deny_to_allow +"),
    ("downgrade to allow", [C_IS_LOW], ["A", "C"], {}, "downgrade_to_allow +"),
    ("allow to deny", [ALLOW_C], ["C"], {"claims": {"plan": "premium"}}, "allow_to_deny"),
    ("an allow rule that holds", [ALLOW_C], ["C"], PREMIUM, "unchanged"),
    ("allow to downgrade", [("A: {tier: low", "A: {tier: high"), ("[B, A]", "[B]")], ["A", "B"], {},
     "allow_to_downgrade"),
    ("a stand-in that was permitted before", [(C, C + ", downgrade_to: [A]")], ["C"], {}, "deny_to_downgrade"),
    ("no downgrade wanted", [(C, C + ", downgrade_to: [A]")], ["C"], {"downgrade": False}, "unchanged"),
    ("another stand-in that was permitted", [("[B, A]", "[A]")], ["D"], {}, "experts_changed"),
    ("an expert that is new", [(C, C.replace("C: {tier: high", "E: {tier: low"))], ["E"], {}, "deny_to_allow +"),
    ("anonymous callers out", [("anonymous: low", "anonymous: deny")], ["A"], ANONYMOUS, "allow_to_deny"),
    ("anonymous callers up", [("anonymous: low", "anonymous: high")], ["C"], ANONYMOUS, "deny_to_allow +"),
    ("an unlogged claim, anonymous", [BY_EMAIL], ["C"], ANONYMOUS, "unchanged"),
    ("any claim, anonymous", [BY_ANY], ["C"], ANONYMOUS, "unchanged"),
    ("an unlogged claim", [BY_EMAIL], ["C"], {}, "claims not logged: clearance[0].when reads claims.email"),
    ("any claim", [BY_ANY], ["C"], {}, "claims not logged: clearance[0].when may read any claim"),
    ("no claims at all", [C_IS_LOW], ["C"], {"claims": None},
     "claims not logged: clearance[0].when reads claims.plan"),
    ("an allow rule of an expert not asked for", [(C, C + ", allow: 'claims.email == \"x\"'")], ["A"], {}, "unchanged"),
    ("the allow rule of a stand-in", [("B: {", "B: {allow: 'claims.email == \"x\"', ")], ["D"], {},
     "claims not logged: experts.B.allow reads claims.email"),
    ("the path is logged", [BY_PATH], ["C"], PREMIUM, "unchanged"),
    ("the path holds no more", [BY_PATH], ["C"], PREMIUM | {"path": "/y"}, "allow_to_deny"),
    ("a path too long", [BY_PATH], ["C"], PREMIUM | {"path": None},
     "request not logged: experts.C.allow reads more than method and path"),
    ("headers are not logged", [BY_HEADER], ["C"], PREMIUM,
     "request not logged: experts.C.allow reads more than method and path"),
    ("another default elsewhere", [NEW_DEFAULT], ["A"], {}, "unchanged"),
    ("another default", [NEW_DEFAULT], ["A", "B"], {"path": "/route"}, "gate changed: the default may apply"),
    ("another header", [("header: x-expert-names", "header: x-names")], ["A"], {},
     "gate changed: other names may be read"),
    ("a gate for other paths", [("header: x-expert-names", "header: x-names")], ["A"], {"path": "/route"}, "unchanged"),
    ("a bad gate", [C_IS_LOW], [], BAD_GATE, "unchanged"),
    ("a bad gate, and another gate", [NEW_DEFAULT], [], BAD_GATE | {"path": "/route"},
     "gate changed: the default may apply"),
    ("a bad token", [C_IS_LOW], [], {"requested": None, "reason": Reason.INVALID_TOKEN}, "refused before the gate"),
    ("another audience", [(tokens.AUDIENCE, "more")], ["A"], {}, "issuers changed: needs claims.iss"),
    ("another audience, anonymous", [(tokens.AUDIENCE, "more")], ["A"], ANONYMOUS, "unchanged"),
    ("an issuer that goes", [(tokens.ISSUER, "https://other.example/")], ["A"],
     {"claims": {"plan": "free", "iss": tokens.ISSUER}}, "allow_to_deny"),
    ("an issuer that comes", [(tokens.ISSUER, "https://other.example/")], ["A"],
     {"claims": {"plan": "free", "iss": "https://other.example/"}}, "deny_to_allow +"),
    ("revoked, perhaps", [REVOKED], ["A"], {}, "revocation changed: needs claims.jti"),
    ("revoked", [REVOKED], ["A"], {"claims": {"plan": "x", "jti": "a"}}, "allow_to_deny"),
    ("not revoked", [REVOKED], ["A"], {"claims": {"plan": "x", "jti": "b"}}, "unchanged"),
    ("issued too early", [EARLIER], ["A"], {"claims": {"plan": "x", "iat": 1.8e9}}, "allow_to_deny"),
    ("issued at an unknown time", [EARLIER], ["A"], {"absent": frozenset({"org", "iat"})}, "allow_to_deny"),
    ("issued late enough", [EARLIER], ["A"], {"claims": {"plan": "x", "iat": 1.9e9}}, "unchanged"),
]  # fmt: skip


def outcome(found: Replayed | NotReplayable) -> str:
    if isinstance(found, NotReplayable):
        return f"{found.cause.value}: {found.detail}".removesuffix(": ")
    return found.difference.value + (" +" if found.widening else "")


@pytest.mark.parametrize(("edits", "asked", "over", "expected"), [r[1:] for r in REPLAYS], ids=[r[0] for r in REPLAYS])
def test_a_record_is_replayed_or_the_cause_why_not_is_given(
    tmp_path: Path, edits: list[Edit], asked: list[str], over: dict[str, Any], expected: str
) -> None:
    """The outcome is never guessed."""
    old, new = pair(tmp_path, *edits)
    # The gate rules that applied are those of the policy that wrote the record.
    of_old = {"policy": old.digest} if "gate" in expected or "default" in expected or NEW_DEFAULT in edits else {}
    record = made(*asked, **({"claims": {"plan": "free"}} | over | of_old))
    replay = Replay(old, new)
    found = replay(record)
    if isinstance(found, NotReplayable) and found.cause is Cause.OTHERWISE:
        found = replay(replace(record, verdict=Verdict.DENY, serve=()))
    assert outcome(found) == expected


def test_a_record_of_the_old_policy_shows_that_the_caller_was_admitted(tmp_path: Path) -> None:
    """By a trusted issuer, with a token that was not revoked."""
    for before, edit in (((), (ISSUER_LINE, ISSUER_LINE + OTHER_ISSUER)), ((REVOKED,), REVOKED[::-1])):
        old, new = pair(tmp_path, edit, before=before)  # type: ignore[arg-type]
        replay = Replay(old, new)
        assert outcome(replay(made("A", policy=old.digest))) == "unchanged"
        assert isinstance(replay(made("A")), NotReplayable)


def test_a_record_that_its_own_policy_does_not_reproduce_is_not_used(tmp_path: Path) -> None:
    """If the old policy, by whose digest it was made, decides otherwise, something was not logged."""
    old, new = pair(tmp_path, C_IS_LOW)
    found = Replay(old, new)(made("C", policy=old.digest))
    assert isinstance(found, NotReplayable)
    assert found.cause is Cause.OTHERWISE


def test_similar_records_are_distinguished_by_everything_that_matters(tmp_path: Path) -> None:
    """What is cached for one record is not used for another."""
    old, new = pair(tmp_path, C_IS_LOW)
    replay = Replay(old, new)
    for over, expected in (
        ({"claims": {"plan": "free"}}, "deny_to_allow +"),
        ({"claims": {"plan": "premium"}}, "unchanged"),
        ({"claims": {"plan": 1}}, "deny_to_allow +"),
        ({"claims": {}, "absent": frozenset({"plan"})}, "deny_to_allow +"),
        ({"claims": {}, "absent": frozenset()}, "claims not logged: clearance[0].when reads claims.plan"),
        (ANONYMOUS, "deny_to_allow +"),
    ):
        assert [outcome(replay(made("C", **over))) for _ in range(2)] == [expected] * 2  # type: ignore[arg-type]


def test_a_servers_log_is_reproduced_by_its_policy(tmp_path: Path) -> None:
    """Replayed under the same policy, every decision after the gate comes out the same."""
    policy = load_policy(tmp_path)
    callers = [None, token(plan="premium"), token(plan="free", org="acme"), token(plan=None)]
    calls = [
        check_request(*experts, caller=caller, **headers)
        for caller in callers
        for experts in (["A"], ["C"], ["A", "C"], ["D"], ["X"], ["X", "A"], [])
        for headers in ({}, {"x_srp_downgrade": "never"})
    ]
    calls += [
        check_request(path="/route", body=b) for b in (b"", b"{", b'{"expert_names": []}', b'{"expert_names": ["D"]}')
    ]
    found = [Replay(policy, policy)(record) for record in logged(policy, calls)]
    assert {outcome(f) for f in found} == {"unchanged"}


CALLERS: list[dict[str, Any] | None] = [
    None,
    {"plan": "premium", "org": "acme", "jti": "a"},
    {"plan": "free", "email": "premium", "jti": "b"},
    {"email": "x", "org": "acme", "iat": None},
    {"plan": "premium", "team": "\ud800"},  # claims that no condition can read
]
ALL_EDITS = [edits for _, edits, *_ in REPLAYS] + [edits for _, edits, _ in CHANGES]


@pytest.mark.parametrize("edits", ALL_EDITS, ids=[str(n) for n in range(len(ALL_EDITS))])
def test_a_replay_agrees_with_the_new_policys_decision(tmp_path: Path, edits: list[Edit]) -> None:
    """Each request is decided by both policies; no replay may contradict the new one."""
    old, new = pair(tmp_path, *edits)
    calls = [
        check_request(*experts, caller=None if claims is None else token(**claims), path=path, **headers)
        for claims in CALLERS
        for experts in (["A"], ["C"], ["A", "C"], ["D", "E"], ["B", "X"], [])
        for path, headers in (("/x", {}), ("/route", {"x_srp_downgrade": "never"}), ("/y", {"x_team": "red"}))
    ]
    calls += [
        check_request(path="/route", body=b) for b in (b"{", b'{"expert_names": []}', b'{"expert_names": ["A", "B"]}')
    ]
    replay, epoch = Replay(old, new), snapshot(new)
    for call, record in zip(calls, logged(old, calls), strict=True):
        found = replay(record)
        if isinstance(found, Replayed):
            actual = check(epoch, wire.read(call), time.time())
            assert isinstance(actual, tuple)
            made = actual.decision
            assert (found.new.verdict, set(found.new.serve)) == (made.verdict, set(made.serve)), record


def logged(policy: Policy, calls: list[bytes]) -> list[Record]:
    lines: list[bytes] = []
    it, writer = authorization(policy), RecordWriter()

    async def make() -> None:
        it.witness = lambda *seen: lines.append(writer.line(*seen))
        for call in calls:
            await it.check(call)
        await asyncio.sleep(0)

    asyncio.run(make())
    return [Record.read(line) for line in lines]


# ---- a log -----------------------------------------------------------------------------------------------------------


def as_line(record: Record) -> str:
    names = {"requested": record.requested, "serve": record.serve, "absent": sorted(record.absent)}
    plain = {name: getattr(record, name) for name in Record.__slots__}
    return json.dumps({**plain, **{k: v if v is None else list(v) for k, v in names.items()}}) + "\n"


def write_log(path: Path, *records: Record) -> Path:
    path.write_text("".join(map(as_line, records)))
    return path


def test_a_log_is_counted_with_examples(tmp_path: Path) -> None:
    """Each kind has its count and up to three examples; records that cannot be replayed are counted by cause."""
    old, new = pair(tmp_path, C_IS_LOW, BY_EMAIL)
    log = write_log(
        tmp_path / "log",
        *(made("C", **ANONYMOUS) for _ in range(5)),
        *(made("A", **ANONYMOUS) for _ in range(2)),
        *(made("A") for _ in range(4)),
        made(requested=None, reason=Reason.INVALID_TOKEN),
    )
    found = compare(old, new, [log]).replayed
    assert found is not None
    assert found.records == 12
    assert found.differences == {Difference.DENY_TO_ALLOW: 5, Difference.UNCHANGED: 2}
    assert found.widening == 5
    assert found.not_replayable == {
        (Cause.CLAIMS, "clearance[0].when reads claims.email"): 4,
        (Cause.EARLY, ""): 1,
    }
    assert found.examples == {
        "deny_to_allow": ["2027-01-15T08:00:00Z 1111111111111111 asks C: low: 403 tier_too_low → low: C (widening)"] * 3
    }


def test_corrupt_lines_are_counted_with_their_places(tmp_path: Path) -> None:
    """The lines after them are still read."""
    old, new = pair(tmp_path, C_IS_LOW)
    log = tmp_path / "log"
    good = as_line(made("C", **ANONYMOUS)).encode()
    huge = b'{"time": "' + b"x" * (2 * MAX_LINE) + b'"}\n'
    log.write_bytes(good + b"{\n" + good + huge + good + b"\xff\xfe\n" + good + b"\n" + good[:-9])
    found = compare(old, new, [log]).replayed
    assert found is not None
    assert found.differences == {Difference.DENY_TO_ALLOW: 4}
    assert (found.corrupt, found.corrupt_at) == (5, [f"{log}:2", f"{log}:4", f"{log}:6"])


def test_a_file_without_a_single_record_is_refused(tmp_path: Path) -> None:
    """Otherwise it could be mistaken for a log without differences. An empty file may be a new log."""
    old, new = pair(tmp_path, C_IS_LOW)
    good, other, empty = write_log(tmp_path / "good", made("C")), tmp_path / "other", tmp_path / "empty"
    empty.touch()
    assert compare(old, new, [empty, good]).replayed is not None
    for text in ("no record\n", "{}\n{}\n"):
        other.write_text(text)
        with pytest.raises(ValueError, match="other is not a decision log: none of its lines is a record"):
            compare(old, new, [good, other])


def test_control_characters_in_a_log_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """A log may come from anywhere."""
    old, new = pair(tmp_path, C_IS_LOW)
    log = write_log(tmp_path / "log", made("C", "\x1b[2J\n", decision_id="\x1b]0;x\x07", **ANONYMOUS))
    text = compare(old, new, [log]).text()
    assert "asks C" in text
    assert "\x1b" not in text


WIDENS: list[tuple[str, list[Edit], list[dict[str, Any]] | None, bool]] = [
    # name, edits, records' members (None: no log), whether it widens
    ("nothing", [], None, False),
    ("narrower", [("anonymous: low", "anonymous: deny")], None, False),
    ("wider", [C_IS_LOW], None, True),
    ("wider, though the log has none of it", [C_IS_LOW], [{"requested": ("A",)}], True),
    ("unclear", [("premium", "gold")], None, True),
    ("unclear, and the log shows no widening", [("premium", "gold")], [{}], False),
    ("unclear, and the log shows widening", [("premium", "gold")], [{"claims": {"plan": "gold"}}], True),
    ("unclear, and a record cannot be replayed", [BY_EMAIL], [{}, ANONYMOUS], True),
    ("unclear, and the log is empty", [("premium", "gold")], [], True),
    ("early refusals prove nothing", [("premium", "gold")],
     [{}, {"requested": None, "reason": Reason.INVALID_TOKEN}], False),
]  # fmt: skip


@pytest.mark.parametrize(("edits", "records", "expected"), [w[1:] for w in WIDENS], ids=[w[0] for w in WIDENS])
def test_fail_on_widening_exits_1_if_and_only_if_access_may_widen(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    edits: list[Edit],
    records: list[dict[str, Any]] | None,
    expected: bool,
) -> None:
    """And says why, on stderr."""
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    text = POLICY
    for before, after in edits:
        text = text.replace(before, after)
    write_policy(tmp_path, POLICY, "old.yaml")
    write_policy(tmp_path, text, "new.yaml")
    command = ["diff", str(old), str(new)]
    if records is not None:
        log = write_log(tmp_path / "log", *(made("C", **members) for members in records))
        command += ["--decisions", str(log)]
    assert exit_of(*command) == 0
    capsys.readouterr()
    assert exit_of(*command, "--fail-on", "widening") == int(expected)
    assert ("srp diff: widening: " in capsys.readouterr().err) is expected


GATES = [
    # name, old gate, new gate, whether it widens
    ("a fixed list becomes a header", "{prefix: /, default: [A]}", "{prefix: /, header: x-names}", True),
    ("a fixed list becomes a member", "{prefix: /, default: [A]}", "{prefix: /, json: /names}", True),
    ("a header becomes a fixed list", "{prefix: /, header: x-names}", "{prefix: /, default: [A]}", False),
    ("the list has one more", "{prefix: /, default: [A]}", "{prefix: /, default: [A, C]}", True),
    ("one that can be downgraded to others", "{prefix: /, default: [B]}", "{prefix: /, default: [D]}", True),
    ("the list has one fewer", "{prefix: /, default: [A, C]}", "{prefix: /, default: [A]}", False),
    ("another header", "{prefix: /, header: x-names}", "{prefix: /, header: x-others}", False),
    ("another path", "{path: /x, default: [A]}", "{path: /y, default: [A]}", False),
]


@pytest.mark.parametrize(("before", "after", "widens"), [g[1:] for g in GATES], ids=[g[0] for g in GATES])
def test_a_gate_widens_if_requests_can_ask_for_more_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, widens: bool
) -> None:
    """An expert that no request can name is out of everybody's reach."""
    rules = POLICY[: POLICY.index("gate:")]
    for name, rule in (("old.yaml", before), ("new.yaml", after)):
        write_policy(tmp_path, f"{rules}gate:\n  - {rule}\n", name)
    command = ("diff", str(tmp_path / "old.yaml"), str(tmp_path / "new.yaml"), "--fail-on", "widening")
    assert exit_of(*command) == int(widens)
    assert ("requests can now ask for" in capsys.readouterr().out) is widens


def exit_of(*command: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(command)
    return int(ended.value.code or 0)


def test_the_old_policy_may_be_anywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After `git show HEAD:policy.yaml > /tmp/old.yaml`, its keys are read from the new policy's folder."""
    (tmp_path / "repository").mkdir()
    new = write_policy(tmp_path / "repository", POLICY.replace("anonymous: low", "anonymous: deny"))
    old = tmp_path / "old.yaml"
    old.write_text(POLICY)
    assert exit_of("diff", str(old), str(new)) == 0
    assert "  narrower  anonymous: low → deny\n" in capsys.readouterr().out


def test_json_has_what_the_text_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write_policy(tmp_path, POLICY, "old.yaml")
    new = write_policy(tmp_path, POLICY.replace(*C_IS_LOW), "new.yaml")
    log = write_log(tmp_path / "log", made("C", **ANONYMOUS))
    assert exit_of("diff", str(old), str(new), "--decisions", str(log), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["changes"][0] == {"effect": "wider", "path": "tier low", "text": "gains C"}
    assert printed["decisions"]["differences"]["deny_to_allow"] == 1
    assert printed["decisions"]["widening"] == 1
    assert printed["widens"] == ["tier low: gains C", "1 logged decisions widen"]


@pytest.mark.parametrize("what", ["old", "new", "log", "broken", "no log"])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    """In one line, with exit status 2."""
    files = {name: write_policy(tmp_path, POLICY, f"{name}.yaml") for name in ("old", "new")}
    files["log"] = write_log(tmp_path / "log")
    if what == "broken":
        files["new"].write_text("tiers: [")
    elif what == "no log":
        files["log"].write_text("no record\n")
    else:
        files[what].unlink()
    assert exit_of("diff", str(files["old"]), str(files["new"]), "--decisions", str(files["log"])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(files[{"broken": "new", "no log": "log"}.get(what, what)]) in line


def test_many_records_are_quick(tmp_path: Path) -> None:
    """20,000 records of different callers take at most a fifth of the time allowed for 100,000."""
    old, new = pair(tmp_path, C_IS_LOW)
    base = made("A", "C")
    log = write_log(
        tmp_path / "log",
        *(replace(base, claims={"plan": f"plan {n}"}, absent=frozenset({"org"})) for n in range(20_000)),
    )
    found = compare(old, new, [log]).replayed
    assert found is not None
    assert found.differences == {Difference.DOWNGRADE_TO_ALLOW: 20_000}
    print(f"20,000 distinct callers: {found.seconds:.2f} s")
    assert found.seconds < 10  # on a machine that is busy with other tests
