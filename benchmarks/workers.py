"""What more processes gain: the same checks in one process and in several at once, without gRPC, Envoy and clients.

Every process has its own policy, caches and tokens, and decides like `srp serve`, from bytes to bytes, as fast as it
can: the part of the work that `srp serve --workers` distributes. On a machine with few cores, a load generator would
use up the cores to be measured. Prints checks per second of all processes together, as medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import callers
from ext_authz.core.jwk import parse_jwks
from ext_authz.core.snapshot import CacheSizes
from ext_authz.observe.metrics import Tally
from ext_authz.policyfile.parse import parse_policy
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.epoch import Epoch
from ext_authz.sources.keys import KeyStore

KINDS = {"one token": 1, "new RS256 token each time": 1500}


async def work(tokens: int, seconds: float) -> None:
    """One process: prints `ready`, waits for a line, makes checks for `seconds`, and prints its checks per second."""
    with tempfile.TemporaryDirectory(prefix="srp-bench-") as made:
        jwks = json.dumps(callers.jwks())
        (Path(made) / "jwks.json").write_text(jwks)
        policy = parse_policy(callers.policy("127.0.0.1:9").encode(), base=Path(made))
    keys = {callers.ISSUER: parse_jwks(jwks.encode()).keys}
    snapshot = CacheSizes(tokens=1000, decisions=1000).snapshot(policy, keys, 1)
    authorization = Authorization(Epoch.of(snapshot), KeyStore(), Tally())
    requests = [
        callers.check_request({
            "authorization": f"Bearer {callers.token('RS256', f'caller-{n}')}", "x-expert-names": "A,B",
            "user-agent": "benchmark/1",
        })
        for n in range(tokens)
    ]  # fmt: skip
    print("ready", flush=True)
    sys.stdin.readline()
    n, began = 0, time.monotonic()
    while time.monotonic() < began + seconds:
        for _ in range(50):
            await authorization.check(requests[n % tokens])
            n += 1
    print(n / (time.monotonic() - began), flush=True)


def together(processes: int, tokens: int, seconds: float) -> float:
    """The total checks per second of this many processes at once."""
    command = [sys.executable, __file__, "--work", str(tokens), "--seconds", str(seconds)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    for process in running:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in running)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="number to compare with one process (default: 2)")
    parser.add_argument("--seconds", type=float, default=3, help="length of a measurement (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        asyncio.run(work(args.work, args.seconds))
        return 0
    print(f"| checks | 1 process | {args.processes} processes | ratio | lowest to highest |")
    print("|---|---|---|---|---|")
    for kind, tokens in KINDS.items():
        pairs = [
            (together(1, tokens, args.seconds), together(args.processes, tokens, args.seconds))
            for _ in range(args.rounds)
        ]
        one, several = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratios = sorted(b / a for a, b in pairs)
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        print(f"| {kind} | {one:,.0f}/s | {several:,.0f}/s | {statistics.median(ratios):.2f} | {spread} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
