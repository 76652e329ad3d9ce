"""The command line `srp`. Every mistake of the user is one clear line on stderr and a non-zero exit."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ext_authz import __version__, settings
from ext_authz.core import strict_json
from ext_authz.core.model import Identity, Refusal, Request
from ext_authz.core.policy import Policy
from ext_authz.policyfile import compile as policy_file
from ext_authz.policyfile import warnings as policy_warnings

OK, FAILED, USAGE = 0, 1, 2
_DURATION = re.compile(r"(\d{1,9})(s|m|h|d)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Mistake(Exception):
    """Something the user got wrong; its text is what they are told. Exits with `code`."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.code = code


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 it failed, 2 it was asked wrongly."""
    args = _parser().parse_args(argv)
    try:
        sys.exit(args.run(args))
    except Mistake as e:
        print(f"srp {args.command}: {e}", file=sys.stderr)
        sys.exit(e.code)
    except policy_file.PolicyError as e:
        print(e, file=sys.stderr)
        sys.exit(FAILED)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except OSError as e:
        place = f": {e.filename}" if e.filename else ""
        print(f"srp {args.command}: {e.strerror or e}{place}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="srp", description="Secure Routing Proxy: who may reach which expert, and which expert is idlest."
    )
    parser.add_argument("--version", action="version", version=f"srp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        made.set_defaults(run=run)
        return made

    settings.add_arguments(command("serve", _serve, "serve Envoy's ext_authz and ADS by a policy file"), os.environ)

    check = command("check", _check, "check a policy file; every error on a line of its own")
    check.add_argument("file", type=Path, metavar="FILE")

    cases = command("test", _test, "run the test cases beside a policy")
    cases.add_argument("path", type=Path, metavar="FILE|DIR", help="a test file, or a folder: all `*_test.yaml` below")
    cases.add_argument("-v", "--verbose", action="store_true", help="a line for each case")
    cases.add_argument("--coverage", action="store_true", help="list what of the policy no case touched")
    cases.add_argument("--fail-under", type=float, default=0.0, metavar="PCT", help="fail if less of it is touched")

    diff = command("diff", _diff, "say what a new policy would change")
    diff.add_argument("old", type=Path, metavar="OLD", help="the policy in force")
    diff.add_argument("new", type=Path, metavar="NEW", help="the policy to come; relative paths in both start here")
    diff.add_argument(
        "--decisions", type=Path, action="append", default=[], metavar="LOG",
        help="replay the decisions of this log under both (may be given again)",
    )  # fmt: skip
    diff.add_argument("--fail-on", choices=["widening"], help="exit 1 if anybody may reach more")
    diff.add_argument("--json", action="store_true", help="print JSON")

    why = command("explain", _explain, "say why a caller may or may not reach each expert")
    why.add_argument("--policy", type=Path, required=True, metavar="FILE")
    who = why.add_mutually_exclusive_group(required=True)
    who.add_argument("--token", metavar="FILE", help="the caller's JWT (`-` reads standard input)")
    who.add_argument("--claims", metavar="JSON", help="the claims of a verified token")
    who.add_argument("--anonymous", action="store_true", help="a caller without a token")
    why.add_argument("--experts", required=True, metavar="A,C", help="the experts asked for")
    why.add_argument("--path", default="/", help="the request's path, for conditions that read it (default: /)")
    why.add_argument("--method", default="POST", help="the request's method (default: POST)")
    why.add_argument("--header", action="append", default=[], metavar="NAME=VALUE", help="a header of the request")
    why.add_argument("--no-downgrade", action="store_true", help="as with `x-srp-downgrade: never`")
    why.add_argument("--json", action="store_true", help="print JSON")

    status = command("status", _status, "print what a running server says of itself")
    status.add_argument("--address", default="127.0.0.1:9902", metavar="HOST:PORT", help="default: 127.0.0.1:9902")
    status.add_argument("--json", action="store_true", help="print JSON")

    token = command("token", _token, "mint a token with the demo key (never for production)")
    token.add_argument(
        "--dir", type=Path, default=Path(".demo"), metavar="DIR", help="where the demo key is (default: .demo)"
    )
    token.add_argument(
        "--claim", action="append", default=[], metavar="NAME=VALUE", help="a claim; VALUE is JSON, or text"
    )
    token.add_argument("--ttl", default="1h", help="how long it is valid: 30s, 10m, 1h, 1d (default: 1h)")

    command("schema", _schema, "print the JSON Schema of the policy file, for editors")

    demo = command("demo", _demo, "run Envoy, ext_authz and the sample experts on loopback")
    demo.add_argument(
        "--dir", type=Path, default=Path(".demo"), metavar="DIR", help="policy, keys, tokens, logs (default: .demo)"
    )
    demo.add_argument(
        "--port", type=int, default=9000, help="Envoy's port on 127.0.0.1, 0 for any free one (default: 9000)"
    )
    return parser


def _serve(args: argparse.Namespace) -> int:
    # One thread less on a check's way (docs/performance.md). gRPC reads it once, when it is imported.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
    from ext_authz.serve.app import run  # grpc and uvloop take time to import, and only the server needs them

    try:
        chosen = settings.read(args)
    except ValueError as e:
        raise Mistake(str(e).replace("\n", "\nsrp serve: "), USAGE) from None
    run(chosen)
    return OK


def _check(args: argparse.Namespace) -> int:
    policy = policy_file.load(args.file)
    for warning in policy_warnings.warnings(policy):
        print(f"{args.file}: warning: {warning}", file=sys.stderr)
    print(f"{args.file}: ok: {len(policy.experts)} experts, {len(policy.tiers)} tiers, digest {policy.digest}")
    return OK


def _test(args: argparse.Namespace) -> int:
    from ext_authz.review import run_cases as policy_test

    def out(text: str) -> None:
        print(text, end="", flush=True)

    return policy_test.main(args.path, out, args.verbose, args.coverage, args.fail_under)


def _diff(args: argparse.Namespace) -> int:
    from ext_authz.progress import Progress
    from ext_authz.review import diff as policy_diff

    try:
        old, new = policy_diff.load(args.old, args.new)
        with Progress("replaying", sys.stderr) as progress:
            found = policy_diff.compare(old, new, args.decisions, progress)
    except policy_file.PolicyError as e:
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


def _explain(args: argparse.Namespace) -> int:
    from ext_authz.review.explain import explain

    policy = policy_file.load(args.policy)
    names = [n.strip() for n in args.experts.split(",") if n.strip()]
    headers = {name.lower(): value for name, value in (_pair(h, "--header") for h in args.header)}
    found = explain(
        policy, _caller(policy, args), names, Request(args.method, args.path, headers), not args.no_downgrade
    )
    print(json.dumps(dataclasses.asdict(found), indent=2) if args.json else found.text())
    return OK


def _caller(policy: Policy, args: argparse.Namespace) -> Identity:
    from ext_authz.core import identity
    from ext_authz.review.explain import by_claims, by_token

    if args.claims is not None:
        return by_claims(policy, _object(args.claims, "--claims"))
    if args.token is not None:
        with sys.stdin.buffer if args.token == "-" else Path(args.token).open("rb") as file:
            text = file.read(2 * identity.MAX_TOKEN).decode("latin-1")  # no token is longer, or holds more than ASCII
        caller = by_token(policy, text.strip())
    else:
        caller = identity.anonymous(policy)
    if isinstance(caller, Refusal):
        raise Mistake(f"401 {caller.reason.value}: {caller.detail}")
    return caller


def _status(args: argparse.Namespace) -> int:
    from ext_authz.observe import status_text

    report = status_text.fetch(args.address)
    print(json.dumps(report, indent=2) if args.json else status_text.text(report))
    return OK


def _token(args: argparse.Namespace) -> int:
    from ext_authz.demo.keys import DemoKeys

    claims = {name: _value(value) for name, value in (_pair(c, "--claim") for c in args.claim)}
    try:
        keys = DemoKeys.load(args.dir)
    except ValueError as e:
        raise Mistake(str(e)) from None
    print(keys.mint(claims, _seconds(args.ttl)))
    return OK


def _schema(_: argparse.Namespace) -> int:
    print(json.dumps(policy_file.json_schema(), indent=2))
    return OK


def _demo(args: argparse.Namespace) -> int:
    from ext_authz.demo.demo import DemoError, run

    try:
        return run(args.dir, args.port)
    except DemoError as e:
        raise Mistake(str(e)) from None


def _object(text: str, flag: str) -> dict[str, Any]:
    try:
        value = strict_json.loads(text.encode())
    except ValueError as e:
        raise Mistake(f"{flag}: the text {e}", USAGE) from None
    if not isinstance(value, dict):
        raise Mistake(f"{flag}: expected a JSON object", USAGE)
    return value


def _pair(text: str, flag: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise Mistake(f"{flag}: expected NAME=VALUE, found `{text}`", USAGE)
    return name, value


def _value(text: str) -> Any:
    try:
        return strict_json.loads(text.encode())
    except ValueError:
        return text


def _seconds(text: str) -> int:
    found = _DURATION.fullmatch(text)
    if not found:
        raise Mistake(f"--ttl: expected a time such as 30s, 10m, 1h or 1d, found `{text}`", USAGE)
    return int(found[1]) * _UNITS[found[2]]
