"""The command line `srp`. Every user error is one clear line on stderr and a non-zero exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ext_authz import __version__
from ext_authz.cli import local, policy, server
from ext_authz.cli.command import FAILED, Mistake
from ext_authz.policyfile.source import PolicyError

COMMANDS = (
    server.SERVE, policy.CHECK, policy.TEST, policy.DIFF, policy.EXPLAIN, server.STATUS, local.TOKEN, policy.SCHEMA,
    local.DEMO,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 on success, 1 if it failed, 2 if it was called with wrong arguments."""
    args = _parser().parse_args(argv)
    try:
        sys.exit(args.run(args))
    except Mistake as e:
        print(f"srp {args.command}: {e}", file=sys.stderr)
        sys.exit(e.code)
    except PolicyError as e:
        print(e, file=sys.stderr)
        sys.exit(FAILED)
    except BrokenPipeError:  # the reader of our output has closed it, as `| head` does
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
        prog="srp", description="Secure Routing Proxy: decides which experts a caller may reach, and picks the idlest."
    )
    parser.add_argument("--version", action="version", version=f"srp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        description = command.text[0].upper() + command.text[1:] + "."
        own = commands.add_parser(command.name, help=command.text, description=description)
        own.set_defaults(run=command.run)
        command.flags(own)
    return parser
