"""Latency at a steady rate: SRP compared with the empty gRPC server, behind the same Envoy configuration.

wrk sends a Poisson stream of requests over many connections. Each pauses between requests, so that a late response
delays only its own connection. The servers take turns, round after round. Prints the medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks import parts
from benchmarks.check import VARIANTS, Bench

NAMES = ("none", "native", "lease", "floor", "floor-batch", "hot")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=1000, help="requests per second (default: 1000)")
    parser.add_argument("--seconds", type=int, default=5, help="length of a measurement (default: 5)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--clients", type=int, default=200, help="connections (default: 200)")
    parser.add_argument("--busy", action="store_true", help="with a busy loop running on each core")
    args = parser.parse_args()
    variants = [v for v in VARIANTS if v.name in NAMES]
    found: dict[str, list[tuple[float, float, float]]] = {v.name: [] for v in variants}
    with tempfile.TemporaryDirectory(prefix="srp-bench-") as made, ExitStack() as stack:
        bench = Bench(variants, Path(made), stack, apart=False)
        pause = round(args.clients / args.rate * 1000)
        for v in variants:
            bench.warm(v)
        for n in range(len(os.sched_getaffinity(0)) if args.busy else 0):
            busy = parts.Process([sys.executable, "-c", "while True: pass"], Path(made), f"busy-{n}")
            stack.callback(busy.stop)
        for _ in range(args.rounds):
            for v in variants:
                requests = Path(made) / f"{v.name}.requests"
                sample = parts.load(bench.ports[v.name], requests, 0, args.clients, args.seconds, pause)
                good = sample["requests"] - sample["refused"] - sample["broken"]
                found[v.name].append((sample["p50_ms"], sample["p99_ms"], good / sample["seconds"]))
    print(f"{args.rate} requests/s, {args.clients} connections; p99: median, lowest to highest of {args.rounds} rounds")
    print("| variant | answers/s | p50 ms | p99 ms | lowest to highest |")
    print("|---|---|---|---|---|")
    for v in variants:
        p50, p99, rate = (statistics.median(column) for column in zip(*found[v.name], strict=True))
        tails = sorted(t for _, t, _ in found[v.name])
        print(f"| {v.what} | {rate:,.0f} | {p50:.2f} | {p99:.2f} | {tails[0]:.2f} to {tails[-1]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
