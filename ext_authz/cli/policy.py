"""`srp check`, `test`, `diff`, `explain` and `schema`: commands for policy files, before and after they are live."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ext_authz.cli.command import FAILED, OK, USAGE, Command, Mistake, pair
from ext_authz.core import strict_json
from ext_authz.core.model import Identity, Refusal, Request
from ext_authz.core.policy import Policy
from ext_authz.policyfile.parse import load_policy
from ext_authz.policyfile.schema import json_schema
from ext_authz.policyfile.source import PolicyError
from ext_authz.policyfile.warnings import key_warnings, warnings


def _check_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")


def _check(args: argparse.Namespace) -> int:
    policy = load_policy(args.file)
    for warning in (*warnings(policy), *key_warnings(policy)):
        print(f"{args.file}: warning: {warning}", file=sys.stderr)
    print(f"{args.file}: ok: {len(policy.experts)} experts, {len(policy.tiers)} tiers, digest {policy.digest}")
    return OK


def _test_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="FILE|DIR", help="a test file, or a folder: all `*_test.yaml` in it")
    parser.add_argument("-v", "--verbose", action="store_true", help="print a line for each case")
    parser.add_argument("--coverage", action="store_true", help="list the parts of the policy that no case covers")
    parser.add_argument("--fail-under", type=float, default=0.0, metavar="PCT", help="fail if coverage is lower")


def _test(args: argparse.Namespace) -> int:
    from ext_authz.review import run_cases

    def out(text: str) -> None:
        print(text, end="", flush=True)

    return run_cases.main(args.path, out, args.verbose, args.coverage, args.fail_under)


def _diff_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, metavar="OLD", help="the policy in force")
    parser.add_argument(
        "new", type=Path, metavar="NEW", help="the new policy; relative paths in both start in its folder"
    )
    parser.add_argument(
        "--decisions", type=Path, action="append", default=[], metavar="LOG",
        help="replay the decisions of this log under both policies (repeatable)",
    )  # fmt: skip
    parser.add_argument("--fail-on", choices=["widening"], help="exit 1 if any caller may reach more")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _diff(args: argparse.Namespace) -> int:
    from ext_authz.progress import Progress
    from ext_authz.review import diff

    try:
        old, new = diff.load(args.old, args.new)
        with Progress("replaying", sys.stderr) as progress:
            found = diff.compare(old, new, args.decisions, progress)
    except PolicyError as e:
        print(e, file=sys.stderr)
        return USAGE
    except OSError as e:
        raise Mistake(f"{e.strerror or e}: {e.filename}", USAGE) from None
    except ValueError as e:
        raise Mistake(str(e), USAGE) from None
    print(json.dumps(found.as_json(), indent=2) if args.json else found.text())
    reasons = found.widens() if args.fail_on else []
    for reason in reasons:
        print(f"srp diff: widening: {reason}", file=sys.stderr)
    return FAILED if reasons else OK


def _explain_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", type=Path, required=True, metavar="FILE")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--token", metavar="FILE", help="the caller's JWT (`-` reads standard input)")
    who.add_argument("--claims", metavar="JSON", help="the claims of a verified token")
    who.add_argument("--anonymous", action="store_true", help="a caller without a token")
    parser.add_argument("--experts", required=True, metavar="A,C", help="the experts asked for")
    parser.add_argument("--path", default="/", help="the request's path, for conditions that read it (default: /)")
    parser.add_argument("--method", default="POST", help="the request's method (default: POST)")
    parser.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="a header of the request")
    parser.add_argument("--no-downgrade", action="store_true", help="as if the request had `x-srp-downgrade: never`")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _explain(args: argparse.Namespace) -> int:
    from ext_authz.review.explain import explain

    policy = load_policy(args.policy)
    names = [n.strip() for n in args.experts.split(",") if n.strip()]
    headers = {name.lower(): value for name, value in (pair(h, "--header") for h in args.header)}
    request = Request(args.method, args.path, headers)
    found = explain(policy, _caller(policy, args), names, request, not args.no_downgrade)
    print(json.dumps(dataclasses.asdict(found), indent=2) if args.json else found.text())
    return OK


def _caller(policy: Policy, args: argparse.Namespace) -> Identity:
    from ext_authz.core import identity
    from ext_authz.review.explain import by_claims, by_token

    if args.claims is not None:
        caller = by_claims(policy, _object(args.claims, "--claims"))
    elif args.token is not None:
        with sys.stdin.buffer if args.token == "-" else Path(args.token).open("rb") as file:
            text = file.read(2 * identity.MAX_TOKEN).decode("latin-1")  # tokens are ASCII and never longer
        caller = by_token(policy, text.strip())
    else:
        caller = identity.anonymous(policy)
    if isinstance(caller, Refusal):
        raise Mistake(f"401 {caller.reason.value}: {caller.detail}")
    return caller


def _object(text: str, flag: str) -> dict[str, Any]:
    try:
        value = strict_json.loads(text.encode())
    except ValueError as e:
        raise Mistake(f"{flag}: the text {e}", USAGE) from None
    if not isinstance(value, dict):
        raise Mistake(f"{flag}: expected a JSON object", USAGE)
    return value


def _schema(_: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=2))
    return OK


CHECK = Command("check", "check a policy file; print one line per error", _check, _check_flags)
TEST = Command("test", "run the test cases of a policy", _test, _test_flags)
DIFF = Command("diff", "show what a new policy would change", _diff, _diff_flags)
EXPLAIN = Command("explain", "explain why a caller may or may not reach each expert", _explain, _explain_flags)
SCHEMA = Command("schema", "print the JSON Schema of the policy file, for editors", _schema)
