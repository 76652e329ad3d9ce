"""What happens under overload: answers, refusals and latencies behind one Envoy.

wrk keeps one request in flight per connection (a closed loop). The throughput with 32 connections is the capacity; with
twice the limit, the excess is refused. Each check verifies a new RS256 token, the most expensive case.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks import callers, parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=5, help="length of one measurement (default: 5)")
    parser.add_argument(
        "--connections", default="32,128,512,1024,2048", metavar="N,N", help="default: 32,128,512,1024,2048"
    )
    parser.add_argument(
        "--limits", default="1024,128", metavar="N,N", help="values of --max-concurrent (default: 1024,128)"
    )
    args = parser.parse_args()
    print("| limit | requests in flight | answered/s | refused (503) | p50 ms | p99 ms |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="srp-bench-") as made, ExitStack() as stack:
        directory = Path(made)
        upstream, *ports = parts.free_ports(1 + len(args.limits.split(",")))
        (directory / "jwks.json").write_text(json.dumps(callers.jwks()))
        (directory / "policy.yaml").write_text(callers.policy(f"{parts.HOST}:{upstream}"))
        tokens = [callers.token("RS256", f"new-{i}") for i in range(2500)]
        requests = directory / "requests"
        requests.write_bytes(b"".join(callers.request("A,B", t) + b"\0" for t in tokens))
        stack.callback(parts.upstream(directory, upstream).stop)
        flags = ("--cached-tokens", "1000", "--cached-decisions", "1000")
        for limit, port in zip(args.limits.split(","), ports, strict=True):
            name = f"srp-{limit}"
            server = parts.serve(directory, name, "--max-concurrent", limit, *flags)
            stack.callback(server.stop)
            stack.callback(parts.envoy(directory, name, port, name, control=name).stop)
            start = 0
            for connections in args.connections.split(","):
                found = parts.load(port, requests, start, int(connections), args.seconds)
                n = found["requests"]
                start += n
                answered = (n - found["refused"]) / found["seconds"]
                share = found["refused"] / max(n, 1)
                print(
                    f"| {limit} | {connections} | {answered:,.0f} | {share:.1%} | {found['p50_ms']:.1f} | {found['p99_ms']:.1f} |"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
