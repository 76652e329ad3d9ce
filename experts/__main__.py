"""`python -m experts`: run one sample expert until SIGTERM or SIGINT, then drain it."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import uvloop
from aiohttp import web

from experts.delay import parse_delay, parse_service
from experts.profile import Profile
from experts.service import make_app

DRAIN_SECONDS = 10.0
"""How long requests in flight may take to finish after SIGTERM."""

ENDPOINTS = """\
endpoints:
  POST /process     {"token_id": 101} -> {"expert", "input_token_id", "status", "latency_ms"}
  POST /...         {"expert", "path", "model", "status"}; server-sent events if the body has "stream": true
  GET  /healthz     200 while the expert runs
  GET  /load        in_flight, queued, served, failed, concurrency, security_level
  GET  /seen        counts of the latest requests by `x-srp-tier|x-srp-subject`

exit status: 0 after SIGTERM or SIGINT, 1 if the address cannot be bound, 2 for bad arguments
"""

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> int:
    """Run an expert with these arguments. Returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        profile = Profile(args.name, args.security_level, args.delay, args.concurrency, args.queue, args.fail_rate)
    except ValueError as mistake:
        parser.error(str(mistake))
    try:
        uvloop.run(serve(profile, args.host, args.port))
    except OSError as failure:
        print(f"experts: cannot listen on {args.host}:{args.port}: {failure.strerror or failure}", file=sys.stderr)
        return 1
    return 0


async def serve(profile: Profile, host: str, port: int) -> None:
    """Serve until SIGTERM or SIGINT. Then refuse new connections, and let requests finish for `DRAIN_SECONDS`.

    Prints the address once it is bound. Raises OSError if it cannot be bound.
    """
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # aiohttp waits `shutdown_timeout` twice: for requests to finish, and again after it has cut off their bodies.
    # A client that disconnects cancels its request, so that no request queues behind work that no client awaits.
    runner = web.AppRunner(
        make_app(profile), access_log=None, handler_cancellation=True, shutdown_timeout=DRAIN_SECONDS / 2
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        bound_host, bound_port = runner.addresses[0][:2]
        authority = f"[{bound_host}]" if ":" in bound_host else bound_host
        print(f"{profile.name} listening on http://{authority}:{bound_port}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="experts",
        description="A sample expert: responds like a model server, after a delay, but does no work.",
        epilog=ENDPOINTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--name", required=True, help="name in every response and in the header x-expert, e.g. Expert_A")
    add("--port", required=True, type=_argument(_port), help="TCP port; 0 picks a free one and prints it")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--security-level", default="low", metavar="LEVEL", help="shown at /load (default: %(default)s)")
    time = parser.add_mutually_exclusive_group()
    time.add_argument(
        "--delay",
        default="0.1:0.5",
        type=_argument(parse_delay),
        metavar="LO:HI",
        help="service time in seconds, uniformly distributed; one number for a fixed time (default: %(default)s)",
    )
    time.add_argument(
        "--service",
        dest="delay",
        default=argparse.SUPPRESS,
        type=_argument(parse_service),
        metavar="exponential:MEAN",
        help="instead of --delay: exponentially distributed service times with a mean of MEAN seconds",
    )
    add("--concurrency", default=8, type=int, metavar="N", help="requests served at once (default: %(default)s)")
    add(
        "--queue", default=64, type=int, metavar="N", help="requests that may wait; more get 503 (default: %(default)s)"
    )
    add("--fail-rate", default=0.0, type=float, metavar="P", help="fraction of requests, 0 to 1, answered with 503")
    return parser


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() else -1
    if not 0 <= port <= 65535:
        raise ValueError(f"expected 0 to 65535, found `{text}`")
    return port


def _argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` for argparse, which shows the message of an ArgumentTypeError but not that of a ValueError."""

    def parse_argument(text: str) -> T:
        try:
            return parse(text)
        except ValueError as mistake:
            raise argparse.ArgumentTypeError(str(mistake)) from None

    return parse_argument


if __name__ == "__main__":
    sys.exit(main())
