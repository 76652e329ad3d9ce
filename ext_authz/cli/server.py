"""`srp serve` and `srp status`: run a server and ask it for its status."""

from __future__ import annotations

import argparse
import json
import os

from ext_authz import settings
from ext_authz.cli.command import OK, USAGE, Command, Mistake


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    settings.add_arguments(parser, os.environ)


def _serve(args: argparse.Namespace) -> int:
    # Each check passes through one thread less (docs/performance.md). gRPC reads this once, at import.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")
    from ext_authz.serve.app import run  # grpc and uvloop take time to import, and only the server needs them

    try:
        chosen = settings.read(args)
    except ValueError as e:
        raise Mistake(str(e).replace("\n", "\nsrp serve: "), USAGE) from None
    run(chosen)
    return OK


def _status_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--address", default="127.0.0.1:9902", metavar="HOST:PORT", help="default: 127.0.0.1:9902")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _status(args: argparse.Namespace) -> int:
    from ext_authz.observe import status_text

    report = status_text.fetch(args.address)
    print(json.dumps(report, indent=2) if args.json else status_text.text(report))
    return OK


SERVE = Command("serve", "serve ext_authz and ADS to Envoy from a policy file", _serve, _serve_flags)
STATUS = Command("status", "print the status of a running server", _status, _status_flags)
