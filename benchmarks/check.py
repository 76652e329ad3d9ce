"""What a Check costs: SRP compared with an empty gRPC server, with Envoy's own filters and with no filter at all.

A round starts everything on loopback, runs the variants for a second each, in alternating order, and stops everything:
one process may be a tenth slower than another of its kind for as long as it lives. Each variant has its own Envoy (one
worker thread) with the same configuration; all forward to the same upstream. Prints a table of medians over the rounds.
Each ratio is the median of the ratios of the rounds, so that a slow machine affects both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import callers, parts
from ext_authz.core.decide import decide
from ext_authz.core.model import Identity, Request
from ext_authz.policyfile.parse import parse_policy
from ext_authz.wire import check as wire

SMALL_CACHE = 1000  # entries in the caches of the server for new tokens
NEW_TOKENS = 2500  # sent in turn: each is evicted long before it is sent again
CALLERS = 10_000
CONNECTIONS = (1, 32, 256)


@dataclass(frozen=True)
class Variant:
    """`server` is the server's socket (None: no server), `requests` what to send, `refused` whether to expect a 4xx."""

    name: str
    what: str
    server: str | None
    requests: Callable[[], Sequence[bytes]]
    refused: bool = False
    baseline: str = "floor"  # the variant to compare it with


def hot() -> list[bytes]:
    return [callers.request("A,B", callers.token("ES256"))]


def body() -> list[bytes]:
    return [callers.request("A,B", callers.token("ES256"), body=True)]


def new(alg: str) -> Callable[[], list[bytes]]:
    return lambda: [callers.request("A,B", callers.token(alg, f"new-{i}")) for i in range(NEW_TOKENS)]


def many() -> list[bytes]:
    return [callers.request("A,B", callers.token("ES256", f"caller-{i}")) for i in range(CALLERS)]


VARIANTS = (
    Variant("none", "no filter", None, hot),
    Variant("native", "Envoy's jwt_authn + RBAC", None, hot),
    Variant("lease", "lease hit", "leased", hot),
    Variant("floor", "empty gRPC server", "floor", hot),
    Variant("floor-body", "empty gRPC server, requests with a body", "floor", body),
    Variant("floor-batch", "empty gRPC server, SCHED_BATCH", "floor-batch", hot),
    Variant("hot", "one token, header gate", "srp", hot),
    Variant("callers", "10,000 callers", "srp", many),
    Variant("body", "one token, body gate", "srp", body, baseline="floor-body"),
    Variant("denied", "denied: tier too low", "srp", lambda: [callers.request("D")], refused=True),
    Variant("downgraded", "downgraded", "srp", lambda: [callers.request("C")]),
    Variant("rs256", "new RS256 token each time", "forgetful", new("RS256")),
    Variant("es256", "new ES256 token each time", "forgetful", new("ES256")),
    Variant("eddsa", "new EdDSA token each time", "forgetful", new("EdDSA")),
    Variant("shadow", "one token, shadow policy", "shadow", hot),
    Variant("log", "one token, decision log", "log", hot),
)

Sample = dict[str, float]  # by name; `_ms` and `_us` are units, `_us` of CPU time per request


class Bench:
    """All running processes. They stop when `stack` closes.

    `apart`: the servers get their own core. Otherwise their CPU time would include what Envoy and the load generator
    cost them by sharing the processor's caches.
    """

    def __init__(self, variants: Sequence[Variant], directory: Path, stack: ExitStack, apart: bool = True) -> None:
        self.directory = directory
        self._cores: frozenset[int] = frozenset()  # any
        if apart:
            self._cores, others = parts.part_cores()
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, others)
        (self.admin,) = parts.free_ports(1)
        self.starts: dict[str, int] = {}
        self.distinct: dict[str, int] = {}
        self.servers: dict[str, parts.Process] = {}
        self.envoys: dict[str, parts.Process] = {}
        upstream, *ports = parts.free_ports(1 + len(variants))
        self.ports = dict(zip((v.name for v in variants), ports, strict=True))
        self._write_policy(upstream)
        self._targets = callers.targets(f"{parts.HOST}:{upstream}")
        self._stack = stack
        self._own(parts.upstream(directory, upstream))
        for server in ("srp", *sorted({v.server for v in variants if v.server} - {"srp"})):
            self.servers[server] = self._own(self._server(server))
        for v in variants:
            self._start_envoy(v)

    def run(self, variant: Variant, connections: int) -> Sample:
        """The measurements of one second."""
        server = self.servers.get(variant.server or "")
        envoy = self.envoys[variant.name]
        before = envoy.cpu(), server.cpu() if server else 0.0
        leased = self._leased(variant)
        start = self.starts.get(variant.name, 0)
        requests = self.directory / f"{variant.name}.requests"
        found: Sample = parts.load(self.ports[variant.name], requests, start, connections, 1)
        after = envoy.cpu(), server.cpu() if server else 0.0
        hits, misses = (now - then for now, then in zip(self._leased(variant), leased, strict=True))
        n = found["requests"]
        self.starts[variant.name] = start + int(n)
        unexpected = n - found["refused"] if variant.refused else found["refused"]
        if unexpected + found["broken"] > n / 2 or not n:
            raise RuntimeError(
                f"{variant.name}: {unexpected:.0f} wrong answers and {found['broken']:.0f} none, of {n:.0f}"
            )
        return {
            **found,
            "failed": unexpected + found["broken"],
            "hits": hits,
            "misses": misses,
            "cpu": after[1] - before[1],
            "envoy": after[0] - before[0],
        }

    def _leased(self, variant: Variant) -> tuple[int, int]:
        """Lease hits and misses so far."""
        if variant.server != "leased":
            return 0, 0
        counts = parts.lease_counts(self.admin)
        return counts.hits, counts.misses

    def warm(self, variant: Variant) -> None:
        """Send every request twice, which fills the caches."""
        while self.starts.get(variant.name, 0) < 2 * self.distinct[variant.name]:
            self.run(variant, 32)

    def _own(self, process: parts.Process) -> parts.Process:
        self._stack.callback(process.stop)
        return process

    def _write_policy(self, upstream: int) -> None:
        (self.directory / "jwks.json").write_text(json.dumps(callers.jwks()))
        (self.directory / "policy.yaml").write_text(callers.policy(f"{parts.HOST}:{upstream}"))
        (self.directory / "leased.yaml").write_text(callers.policy(f"{parts.HOST}:{upstream}", lease="30s"))

    def _server(self, name: str) -> parts.Process:
        options: dict[str, tuple[str | Path, ...]] = {
            "floor-batch": ("--batch",),
            "forgetful": ("--cached-tokens", str(SMALL_CACHE), "--cached-decisions", str(SMALL_CACHE)),
            "shadow": ("--shadow-policy", self.directory / "policy.yaml"),
            "log": ("--decision-log", self.directory / "decisions.log"),
        }
        flags = options.get(name, ())
        if name.startswith("floor"):
            return parts.floor(self.directory, name, self._answer(), *flags, cores=self._cores)
        policy = "leased.yaml" if name == "leased" else "policy.yaml"
        return parts.serve(self.directory, name, *flags, policy=policy, cores=self._cores)

    def _answer(self) -> bytes:
        """The CheckResponse of SRP to a `hot` request."""
        path = self.directory / "policy.yaml"
        policy = parse_policy(path.read_bytes(), str(path), self.directory)
        caller = Identity(1, "caller", callers.ISSUER)
        return wire.Writer(policy).write(decide(policy, caller, ("A", "B"), Request("GET", "/", {})))

    def _start_envoy(self, v: Variant) -> None:
        requests = v.requests()
        self.distinct[v.name] = len(requests)
        (self.directory / f"{v.name}.requests").write_bytes(b"".join(r + b"\0" for r in requests))
        filters = None if v.server else parts.native() if v.name == "native" else []
        control, admin = ("leased", self.admin) if v.server == "leased" else ("srp", None)
        self.envoys[v.name] = self._own(
            parts.envoy(
                self.directory, v.name, self.ports[v.name], v.server or "srp", filters, self._targets, control, admin
            )
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=3, help="seconds per variant in a round (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--quick", action="store_true", help="two rounds of one second: not a measurement")
    parser.add_argument("--only", metavar="NAMES", help=f"only these variants, of {','.join(v.name for v in VARIANTS)}")
    parser.add_argument(
        "--connections", metavar="N,N", default=",".join(map(str, CONNECTIONS)), help="default: 1,32,256"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write FILE.json and FILE.png")
    args = parser.parse_args()
    rounds, seconds = (2, 1) if args.quick else (args.rounds, args.seconds)
    connections = [int(n) for n in args.connections.split(",")]
    names = args.only.split(",") if args.only else [v.name for v in VARIANTS]
    if unknown := set(names) - {v.name for v in VARIANTS}:
        parser.error(f"no such variant: {', '.join(sorted(unknown))}")
    variants = [v for v in VARIANTS if v.name in names]
    samples: dict[str, dict[int, list[Sample]]] = {v.name: {c: [] for c in connections} for v in variants}
    for i in range(rounds):
        with tempfile.TemporaryDirectory(prefix="srp-bench-") as directory, ExitStack() as stack:
            print(f"round {i + 1} of {rounds}: starting servers ...", file=sys.stderr)
            bench = Bench(variants, Path(directory), stack)
            for v in variants:
                bench.warm(v)
            for c in connections:
                turns = [v for second in range(seconds) for v in variants[:: 1 - second % 2 * 2]]
                runs = [(v.name, bench.run(v, c)) for v in turns]
                for v in variants:
                    samples[v.name][c].append(joined([sample for name, sample in runs if name == v.name]))
    for c in connections:
        print(table(variants, {name: by[c] for name, by in samples.items()}, c))
    if args.out:
        args.out.with_suffix(".json").write_text(json.dumps(samples, indent=1) + "\n")
        plot(variants, samples, args.out.with_suffix(".png"))
    return 0


def joined(samples: Sequence[Sample]) -> Sample:
    """The seconds of one variant as one measurement. Each percentile is the median over the seconds."""
    total = {key: sum(s[key] for s in samples) for key in samples[0]}
    n = total["requests"]
    return {
        "requests": n,
        "failed": total["failed"],
        "hits": total["hits"] / max(total["hits"] + total["misses"], 1),
        "rps": n / total["seconds"],
        "p50_ms": statistics.median(s["p50_ms"] for s in samples),
        "p99_ms": statistics.median(s["p99_ms"] for s in samples),
        "cpu_us": total["cpu"] / n * 1e6,
        "envoy_us": total["envoy"] / n * 1e6,
    }


def table(variants: Sequence[Variant], samples: dict[str, list[Sample]], connections: int) -> str:
    """One table: medians, and the ratio of CPU time to the baseline, with its lowest and highest round."""
    lines = [
        "",
        f"{connections} connection{'s' if connections > 1 else ''}",
        "| variant | requests/s | failed | p50 ms | p99 ms | Envoy CPU µs | server CPU µs | × floor | lowest to highest |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for v in variants:
        mine = samples[v.name]
        rps, p50, p99, envoy, cpu = (
            statistics.median(s[key] for s in mine) for key in ("rps", "p50_ms", "p99_ms", "envoy_us", "cpu_us")
        )
        ratios = [s["cpu_us"] / f["cpu_us"] for s, f in zip(mine, samples.get(v.baseline, []), strict=False)]
        end = "| | | |"
        if v.server:
            end = f"| {cpu:.0f} "
            end += (
                f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |" if ratios else "| | |"
            )
        failed = sum(s["failed"] for s in mine) / sum(s["requests"] for s in mine)
        hits = statistics.median(s["hits"] for s in mine)
        what = f"{v.what} ({hits:.2%} of the requests)" if v.server == "leased" else v.what
        lines.append(f"| {what} | {rps:,.0f} | {failed:.1%} | {p50:.2f} | {p99:.2f} | {envoy:.0f} {end}")
    return "\n".join(lines)


def plot(variants: Sequence[Variant], samples: dict[str, dict[int, list[Sample]]], file: Path) -> None:
    """The server's CPU time per Check, one bar per variant."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'secure-routing-proxy[bench]')", file=sys.stderr)
        return
    served = [v for v in variants if v.server]
    connections = list(next(iter(samples.values())))
    figure = Figure(figsize=(9, 0.4 * len(served) * len(connections) ** 0.5 + 1.5), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(connections)
    for i, c in enumerate(connections):
        values = [statistics.median(s["cpu_us"] for s in samples[v.name][c]) for v in served]
        axes.barh([n + i * height for n in range(len(served))], values, height, label=f"{c} connections")
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(served))], [v.what for v in served])
    axes.invert_yaxis()
    axes.set_xlabel("server CPU time per Check, µs")
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
