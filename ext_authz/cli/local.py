"""`srp demo` and `srp token`: the proxy on one machine, and tokens for it."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ext_authz.cli.command import OK, USAGE, Command, Mistake, pair
from ext_authz.core import strict_json

_DURATION = re.compile(r"(\d{1,9})(s|m|h|d)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _token_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir", type=Path, default=Path(".demo"), metavar="DIR", help="folder with the demo key (default: .demo)"
    )
    parser.add_argument(
        "--claim", action="append", default=[], metavar="NAME=VALUE", help="a claim; VALUE is JSON or text"
    )
    parser.add_argument("--ttl", default="1h", help="how long the token is valid: 30s, 10m, 1h, 1d (default: 1h)")


def _token(args: argparse.Namespace) -> int:
    from ext_authz.demo.keys import DemoKeys

    claims = {name: _value(value) for name, value in (pair(c, "--claim") for c in args.claim)}
    try:
        keys = DemoKeys.load(args.dir)
    except ValueError as e:
        raise Mistake(str(e)) from None
    print(keys.mint(claims, _seconds(args.ttl)))
    return OK


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


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dir",
        type=Path,
        default=Path(".demo"),
        metavar="DIR",
        help="folder for policy, keys, tokens and logs (default: .demo)",
    )
    parser.add_argument(
        "--port", type=int, default=9000, help="Envoy's port on 127.0.0.1; 0 picks a free one (default: 9000)"
    )


def _demo(args: argparse.Namespace) -> int:
    from ext_authz.demo.children import DemoError
    from ext_authz.demo.demo import run

    try:
        return run(args.dir, args.port)
    except DemoError as e:
        raise Mistake(str(e)) from None


TOKEN = Command("token", "mint a token with the demo key (not for production)", _token, _token_flags)
DEMO = Command("demo", "run Envoy, ext_authz and the sample experts on loopback", _demo, _demo_flags)
