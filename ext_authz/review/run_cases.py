"""`srp test`: decides each test case of a policy, and reports which decisions differ from the expected ones.

The caller of a case has a token that verifies, with the claims of the case.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ext_authz.core import gate, identity
from ext_authz.core.check import may_downgrade
from ext_authz.core.decide import decide
from ext_authz.core.model import Decision, Identity, Refusal, Request, refuse
from ext_authz.core.policy import Policy
from ext_authz.policyfile.source import PolicyError
from ext_authz.review import cases as test_cases
from ext_authz.review.cases import Case, Expect, Suite
from ext_authz.review.coverage import Coverage
from ext_authz.review.explain import by_claims, explain

Out = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What was expected and what the decision was, as text."""

    what: str
    expected: str
    got: str


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one case. `caller` and `request` led to `decision`; `why` explains it by lines of the policy."""

    name: str
    line: int
    caller: Identity | Refusal
    request: Request | None
    decision: Decision
    mismatches: tuple[Mismatch, ...]
    why: str

    @property
    def passed(self) -> bool:
        return not self.mismatches


def run(suite: Suite) -> Iterator[Result]:
    """Decide each case, in order."""
    for case, line in zip(suite.cases, suite.lines, strict=True):
        caller, request = _caller(suite.policy, case), case.gate_request()
        decision, why = _decide(suite.policy, caller, case.experts, request, case.downgrade)
        yield Result(case.name, line, caller, request, decision, tuple(_mismatches(case.expect, decision)), why)


def main(path: Path, out: Out, verbose: bool = False, coverage: bool = False, fail_under: float = 0.0) -> int:
    """Run the cases of a file, or of all test files below a folder, and write the results to `out`.

    Returns the exit status: 0 if all passed, 1 if a case failed or a policy's coverage is under `fail_under` percent, 2
    if a file is invalid.
    """
    began = time.perf_counter()
    suites, errors = _load(path)
    if errors or not suites:
        out(errors or f"{path}: contains no {test_cases.PATTERN}\n")
        return 2
    failed: list[tuple[Suite, Result]] = []
    cases = 0
    covered = {suite.policy_path: Coverage(suite.policy) for suite in suites}
    for suite in suites:
        out("" if verbose else f"{suite.path} ")
        for result in run(suite):
            cases += 1
            covered[suite.policy_path].add(result.caller, result.request, result.decision)
            if not result.passed:
                failed.append((suite, result))
            verdict = "ok" if result.passed else "FAILED"
            out(f"{suite.path}:{result.line}: {result.name}: {verdict}\n" if verbose else "." if result.passed else "F")
        out("" if verbose else "\n")
    for suite, result in failed:
        out(_failure(suite, result))
    too_low = False
    for policy_path, of_policy in covered.items():
        if coverage or of_policy.percent < fail_under:
            out(_coverage(policy_path, of_policy))
        too_low |= of_policy.percent < fail_under
    if too_low:
        out(f"coverage is under {fail_under:g} %\n")
    out(f"{cases - len(failed)} passed, {len(failed)} failed in {time.perf_counter() - began:.2f}s\n")
    return 1 if failed or too_low else 0


def _load(path: Path) -> tuple[list[Suite], str]:
    """The suites, and the errors of files that are invalid."""
    suites: list[Suite] = []
    errors = ""
    for file in test_cases.find(path):
        try:
            suites.append(test_cases.load(file))
        except PolicyError as e:
            errors += f"{e}\n"
    return suites, errors


def _failure(suite: Suite, result: Result) -> str:
    rows = [f"FAILED {suite.path}:{result.line}: {result.name}"]
    rows += [f"  {m.what:<9} expected {m.expected}, got {m.got}" for m in result.mismatches]
    rows += [f"  | {row}" for row in result.why.splitlines()]
    return "\n".join(["", *rows, ""])


def _coverage(policy_path: Path, coverage: Coverage) -> str:
    rows = [f"{policy_path}:{part.line}: {part.path}: {part.gap}" for part in coverage.missed]
    covered = coverage.total - len(rows)
    return "\n".join(
        [f"coverage of {policy_path}: {covered} of {coverage.total} ({coverage.percent:.0f} %)", *rows, ""]
    )


def _caller(policy: Policy, case: Case) -> Identity | Refusal:
    return identity.anonymous(policy) if case.anonymous else by_claims(policy, case.claims)


def _decide(
    policy: Policy, caller: Identity | Refusal, experts: list[str], request: Request | None, downgrade: bool
) -> tuple[Decision, str]:
    if isinstance(caller, Refusal):
        return refuse(caller), caller.detail
    names: tuple[str, ...] | Refusal = tuple(experts)
    if request is None:
        request = Request("POST", "/", {})
    else:
        names, downgrade = gate.read(policy, request), may_downgrade(request)
    if isinstance(names, Refusal):
        return refuse(names, policy.tiers[caller.tier]), names.detail
    why = explain(policy, caller, names, request, downgrade).text()
    return decide(policy, caller, names, request, downgrade), why


def _mismatches(expect: Expect, decision: Decision) -> Iterator[Mismatch]:
    got = {
        "verdict": decision.verdict.value,
        "experts": list(decision.serve),
        "reason": decision.reason.value,
        "tier": decision.caller_tier or "",
    }
    for what, value in got.items():
        expected = getattr(expect, what)
        if what in expect.model_fields_set and expected != value:
            yield Mismatch(what, _shown(expected), _shown(value))


def _shown(value: str | list[str]) -> str:
    return value or "none" if isinstance(value, str) else f"[{', '.join(value)}]"
