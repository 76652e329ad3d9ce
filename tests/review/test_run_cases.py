"""`srp test`: cases that pass, fail or cannot be used, and what of the policy they touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ext_authz.review import cases as policy_cases
from ext_authz.review import run_cases as policy_test
from tests.harness import tokens
from tests.harness.authorization import write_policy

POLICY = f"""\
version: 1
tiers: [low, high]
issuers:
  - {{issuer: "{tokens.ISSUER}", audiences: [x], algorithms: [ES256], jwks: {{file: jwks.json}}}}
anonymous: low
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
  - {{when: '"ops" in claims.groups', tier: high}}
experts:
  A: {{tier: low, endpoints: ["127.0.0.1:1"]}}
  B: {{tier: low, endpoints: ["127.0.0.1:2"], allow: 'request.headers["x-team"] == "red"'}}
  C: {{tier: high, endpoints: ["127.0.0.1:3"], downgrade_to: [B, A]}}
gate:
  - {{path: /route, json: /expert_names, default: [A]}}
  - {{prefix: /, header: x-expert-names}}
revoked: {{jti: [gone], sub: [mallory], issued_before: 2026-01-01T00:00:00Z}}
"""


def write_cases(directory: Path, *cases: str, name: str = "policy_test.yaml", policy: str = POLICY) -> Path:
    """The policy, and a test file with these cases, each one line of flow mapping."""
    write_policy(directory, policy)
    path = directory / name
    path.write_text("policy: policy.yaml\ncases:\n" + "".join(f"  - {{{case}}}\n" for case in cases))
    return path


def run(path: Path, **options: Any) -> tuple[int, str]:
    told: list[str] = []
    return policy_test.main(path, told.append, **options), "".join(told)


CASES = [
    # name, case without its name
    ("allowed", "anonymous: true, experts: [A], expect: {verdict: allow, experts: [A], reason: permitted, tier: low}"),
    ("only the verdict", "anonymous: true, experts: [A], expect: {verdict: allow}"),
    ("by claims", "claims: {plan: premium}, experts: [C], expect: {verdict: allow, tier: high}"),
    ("by the second rule", "claims: {groups: [ops]}, experts: [C], expect: {verdict: allow, tier: high}"),
    ("no claims", "claims: {}, experts: [A], expect: {verdict: allow, tier: low}"),
    ("denied", "claims: {plan: free}, experts: [C], downgrade: false, expect: {verdict: deny, experts: []}"),
    ("downgraded", "anonymous: true, experts: [C], expect: {verdict: downgrade, experts: [A], reason: tier_too_low}"),
    ("a header for a condition",
     "anonymous: true, request: {path: /, headers: {X-Expert-Names: 'A,B', x-team: red}}, "
     "expect: {verdict: allow, experts: [A, B]}"),
    ("a JSON body", "anonymous: true, request: {path: /route, json: {expert_names: A}}, expect: {verdict: allow}"),
    ("a body as text",
     "anonymous: true, request: {path: /route, body: '{'}, expect: {verdict: deny, reason: bad_gate}"),
    ("a body that is null",
     "anonymous: true, request: {path: /route, json: null}, expect: {verdict: deny, reason: bad_gate}"),
    ("the default", "anonymous: true, request: {method: GET, path: /route}, expect: {verdict: allow, experts: [A]}"),
    ("never downgrade, through the gate",
     "anonymous: true, downgrade: false, request: {path: /, headers: {x-expert-names: C}}, "
     "expect: {verdict: deny, reason: downgrade_forbidden}"),
    ("so says the request itself",
     "anonymous: true, request: {path: /, headers: {x-expert-names: C, x-srp-downgrade: never}}, "
     "expect: {verdict: deny, reason: downgrade_forbidden}"),
    ("unknown", "anonymous: true, experts: [X], expect: {verdict: deny, reason: unknown_expert}"),
    ("nobody", "anonymous: true, experts: [], expect: {verdict: deny, reason: no_experts_requested}"),
    ("revoked by id", "claims: {jti: gone}, experts: [A], expect: {verdict: deny, reason: invalid_token}"),
    ("revoked by subject", "claims: {sub: mallory}, experts: [A], expect: {verdict: deny, reason: invalid_token}"),
    ("issued too early", "claims: {iat: 1.0e+9}, experts: [A], expect: {verdict: deny, reason: invalid_token}"),
    ("another issuer", "claims: {iss: 'https://x/'}, experts: [A], expect: {verdict: deny, reason: invalid_token}"),
    ("its issuer", f"claims: {{iss: '{tokens.ISSUER}'}}, experts: [A], expect: {{verdict: allow}}"),
]  # fmt: skip


@pytest.mark.parametrize("case", [c[1] for c in CASES], ids=[c[0] for c in CASES])
def test_a_case_that_holds_passes(tmp_path: Path, case: str) -> None:
    """Through the gate or past it, with claims or without."""
    status, told = run(write_cases(tmp_path, f"name: it, {case}"))
    assert (status, told.splitlines()[-1].split(" in ")[0]) == (0, "1 passed, 0 failed"), told


FAILS = [
    # name, case, what is told of it
    ("verdict", "anonymous: true, experts: [C], downgrade: false, expect: {verdict: allow}", [
        "  verdict   expected allow, got deny",
        "  | struck    C  tier_too_low (line 12: experts.C.tier)",
    ]),
    ("experts in another order", "anonymous: true, request: {path: /, headers: {x-expert-names: 'A,B', x-team: red}}, "
     "expect: {verdict: allow, experts: [B, A]}", ["  experts   expected [B, A], got [A, B]"]),
    ("one expert too many", "anonymous: true, experts: [A], expect: {verdict: allow, experts: []}",
     ["  experts   expected [], got [A]"]),
    ("reason", "anonymous: true, experts: [B], expect: {verdict: deny, reason: tier_too_low}", [
        "  reason    expected tier_too_low, got not_allowed",
        "  | struck    B  not_allowed (line 11: experts.B.allow)",
    ]),
    ("tier", "claims: {plan: premium}, experts: [A], expect: {verdict: allow, tier: low}", [
        "  tier      expected low, got high",
        "  | caller    tier high (line 7: clearance[0].when)",
    ]),
    ("a token that is refused", "claims: {jti: gone}, experts: [A], expect: {verdict: allow, tier: low}", [
        "  verdict   expected allow, got deny", "  tier      expected low, got none", "  | the token is revoked",
    ]),
    ("a gate that refuses",
     "anonymous: true, request: {path: /route, json: {expert_names: 7}}, expect: {verdict: allow}",
     ["  | body member /expert_names is not a string or a list of strings"]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "lines"), [f[1:] for f in FAILS], ids=[f[0] for f in FAILS])
def test_a_failure_tells_expected_got_and_the_rule_that_decided(tmp_path: Path, case: str, lines: list[str]) -> None:
    """With file and line of the case."""
    path = write_cases(tmp_path, f"name: it, {case}")
    status, told = run(path)
    assert status == 1
    assert f"FAILED {path}:3: it\n" in told
    assert [line for line in lines if line not in told.splitlines()] == [], told
    assert "0 passed, 1 failed in " in told


def test_the_output_has_a_dot_a_case_or_a_line(tmp_path: Path) -> None:
    """As pytest does it."""
    good, bad = (
        "anonymous: true, experts: [A], expect: {verdict: allow}",
        "claims: {}, experts: [A], expect: {verdict: deny}",
    )
    path = write_cases(tmp_path, f"name: one, {good}", f"name: two, {bad}", f"name: three, {good}")
    assert run(path)[1].startswith(f"{path} .F.\n")
    assert run(path, verbose=True)[1].startswith(f"{path}:3: one: ok\n{path}:4: two: FAILED\n{path}:5: three: ok\n")


GOOD = "name: it, anonymous: true, experts: [A], expect: {verdict: allow}"

UNUSABLE = [
    # name, the file's cases, the message after FILE:
    ("unknown key", "name: it, anonymous: true, expert: [A], expect: {verdict: allow}",
     "3:33: cases[0].expert: unknown key; did you mean `experts`?"),
    ("unknown key inside", "name: it, anonymous: true, request: {pth: /}, expect: {verdict: allow}",
     "3:43: cases[0].request.pth: unknown key; did you mean `path`?"),
    ("no such verdict", "name: it, anonymous: true, experts: [A], expect: {verdict: alow}",
     "3:65: cases[0].expect.verdict: found `alow`, expected `allow`, `downgrade` or `deny`"),
    ("no such reason", "name: it, anonymous: true, experts: [A], expect: {verdict: deny, reason: tier_low}",
     "3:79: cases[0].expect.reason: found `tier_low`, expected a reason code; did you mean `tier_too_low`?"),
    ("no caller", "name: it, experts: [A], expect: {verdict: allow}",
     "3:5: cases[0]: exactly one of `claims` and `anonymous` is needed, found neither"),
    ("two callers", "name: it, anonymous: true, claims: {}, experts: [A], expect: {verdict: allow}",
     "3:5: cases[0]: exactly one of `claims` and `anonymous` is needed, found both"),
    ("nothing asked", "name: it, anonymous: true, expect: {verdict: allow}",
     "3:5: cases[0]: exactly one of `experts` and `request` is needed, found neither"),
    ("two bodies", "name: it, anonymous: true, request: {path: /, body: a, json: 1}, expect: {verdict: allow}",
     "3:33: cases[0].request: at most one of `body` and `json` is allowed, found both"),
    ("not anonymous", "name: it, anonymous: false, experts: [A], expect: {verdict: allow}",
     "3:27: cases[0].anonymous: found the boolean `false`, expected `true`, or `claims` instead"),
    ("no expectation", "name: it, anonymous: true, experts: [A]", "3:5: cases[0].expect: required key is missing"),
    ("claims that JSON cannot hold", "name: it, claims: {n: .nan}, experts: [A], expect: {verdict: allow}",
     "3:16: cases[0].claims: found a mapping, expected claims that JSON can represent, without `.inf` and `.nan`"),
    ("an expert that is none", "name: it, anonymous: true, experts: [A], expect: {verdict: allow, experts: [a]}",
     "3:82: cases[0].expect.experts[0]: unknown expert `a`; expected `A`, `B` or `C`"),
    ("a tier that is none", "name: it, anonymous: true, experts: [A], expect: {verdict: allow, tier: hihg}",
     "3:78: cases[0].expect.tier: unknown tier `hihg`; did you mean `high`?"),
    ("one name twice", GOOD + "}\n  - {" + GOOD, "4:12: cases[1].name: `it` is the name of an earlier case"),
    ("a policy of another place", GOOD + "}\npolicy: x\nq: {", "4:1: policy: duplicate key; the first is in line 1"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "message"), [u[1:] for u in UNUSABLE], ids=[u[0] for u in UNUSABLE])
def test_a_file_that_cannot_be_used_is_said_with_line_and_column(tmp_path: Path, case: str, message: str) -> None:
    """And the exit status is 2."""
    path = write_cases(tmp_path, case)
    status, told = run(path)
    assert status == 2
    assert f"{path}:{message}" in told.splitlines()


HARSH: list[tuple[str, Callable[[Path], object], str]] = [
    ("no test file", lambda p: (p / "policy_test.yaml").unlink(), "contains no *_test.yaml"),
    ("no policy", lambda p: (p / "policy.yaml").unlink(), "policy.yaml:1:1: cannot be read: No such file or directory"),
    ("a broken policy", lambda p: (p / "policy.yaml").write_text("version: 2\n"), "policy.yaml:1:10: version: "),
    ("no YAML", lambda p: (p / "policy_test.yaml").write_text("{"), "policy_test.yaml:1:2: not valid YAML"),
    ("empty", lambda p: (p / "policy_test.yaml").write_text(""), "policy_test.yaml:1:1: the file is empty"),
    ("no cases", lambda p: (p / "policy_test.yaml").write_text("policy: policy.yaml\ncases: []"),
     "policy_test.yaml:2:1: cases: found 0 items, expected at least 1"),
    ("not UTF-8", lambda p: (p / "policy_test.yaml").write_bytes(b"\xff"), "policy_test.yaml:1:1: byte 0xff"),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "message"), [h[1:] for h in HARSH], ids=[h[0] for h in HARSH])
def test_files_that_are_not_there_or_not_whole(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    """2, and the file is named."""
    write_cases(tmp_path, GOOD)
    harm(tmp_path)
    status, told = run(tmp_path)
    assert status == 2
    assert message in told


def test_a_folder_is_all_the_test_files_below_it(tmp_path: Path) -> None:
    """But not those in hidden folders, such as a ConfigMap's `..data`."""
    for name in ("b_test.yaml", "a_test.yaml", "test_c.yaml", "d_test.yml"):
        write_cases(tmp_path, GOOD, name=name)
    for folder in ("inner", "..data"):
        (tmp_path / folder).mkdir()
        write_cases(tmp_path / folder, GOOD)
    found = [str(p.relative_to(tmp_path)) for p in policy_cases.find(tmp_path)]
    assert found == ["a_test.yaml", "b_test.yaml", "inner/policy_test.yaml"]
    status, told = run(tmp_path)
    assert status == 0
    assert "3 passed, 0 failed" in told


def test_all_unusable_files_are_told_at_once(tmp_path: Path) -> None:
    """And no case is run."""
    for name in ("a_test.yaml", "b_test.yaml"):
        write_cases(tmp_path, "name: it", name=name)
    status, told = run(tmp_path)
    assert status == 2
    assert ("a_test.yaml:3:5" in told, "b_test.yaml:3:5" in told, "passed" in told) == (True, True, False)


# ---- coverage --------------------------------------------------------------------------------------------------------

ALL_PARTS = {
    "clearance[0].when", "clearance[1].when", "experts.A", "experts.B", "experts.B.allow", "experts.C",
    "experts.C.downgrade_to[0]", "experts.C.downgrade_to[1]", "gate[0]", "gate[1]",
}  # fmt: skip

TOUCHES = [
    # name, case, what it touches
    ("an expert", "anonymous: true, experts: [A]", {"experts.A"}),
    ("an unknown expert", "anonymous: true, experts: [X]", set()),
    ("a clearance rule", "claims: {plan: premium}, experts: [A]", {"experts.A", "clearance[0].when"}),
    ("only the first that holds", "claims: {plan: premium, groups: [ops]}, experts: [A]",
     {"experts.A", "clearance[0].when"}),
    ("an allow rule", "anonymous: true, experts: [B]", {"experts.B", "experts.B.allow"}),
    ("a stand-in", "anonymous: true, experts: [C]",
     {"experts.C", "experts.A", "experts.B.allow", "experts.C.downgrade_to[1]"}),
    ("no stand-in, for it is not needed", "claims: {plan: premium}, experts: [C]", {"experts.C", "clearance[0].when"}),
    ("a gate rule", "anonymous: true, request: {path: /route}", {"experts.A", "gate[0]"}),
    ("a gate rule that refuses", "anonymous: true, request: {path: /x}", {"gate[1]"}),
    ("a revoked caller touches nothing", "claims: {jti: gone, plan: premium}, experts: [A]", set()),
]  # fmt: skip


@pytest.mark.parametrize(("case", "touched"), [t[1:] for t in TOUCHES], ids=[t[0] for t in TOUCHES])
def test_coverage_tells_what_no_case_touched(tmp_path: Path, case: str, touched: set[str]) -> None:
    """Each part of the policy with its line, and the percentage."""
    _, told = run(write_cases(tmp_path, f"name: it, {case}, expect: {{verdict: allow}}"), coverage=True)
    rows = [line.split(": ")[:2] for line in told.splitlines() if line.startswith(f"{tmp_path}/policy.yaml:")]
    assert {path for _, path in rows} == ALL_PARTS - touched
    percent = 100 * len(touched) // len(ALL_PARTS)
    assert f"policy.yaml: {len(touched)} of {len(ALL_PARTS)} ({percent} %)\n" in told
    lines = {path: int(place.rpartition(":")[2]) for place, path in rows}
    policy = POLICY.splitlines()
    assert all(path.split(".")[1] + ":" in policy[n - 1] for path, n in lines.items() if path.startswith("experts"))


def test_fail_under(tmp_path: Path) -> None:
    """The exit status is 1 if less is touched, and what is missing is listed without being asked for."""
    path = write_cases(tmp_path, GOOD)
    assert run(path, fail_under=10.0)[0] == 0
    status, told = run(path, fail_under=10.5)
    assert status == 1
    assert "coverage is under 10.5 %" in told
    assert "experts.B: no case asks for it or is offered it" in told


def test_all_files_of_a_policy_count_together(tmp_path: Path) -> None:
    """What one file's cases do not touch, another's may."""
    write_cases(tmp_path, GOOD, name="a_test.yaml")
    write_cases(tmp_path, GOOD.replace("[A]", "[B]").replace("allow", "deny"), name="b_test.yaml")
    _, told = run(tmp_path, coverage=True)
    assert told.count("coverage of ") == 1
    assert "policy.yaml: 3 of 10 (30 %)" in told


def test_a_policy_without_a_gate_has_no_gate_to_cover(tmp_path: Path) -> None:
    """The gate that is there by default is nobody's to test."""
    policy = POLICY[: POLICY.index("gate:")]
    _, told = run(write_cases(tmp_path, GOOD, policy=policy), coverage=True)
    assert "1 of 8" in told
