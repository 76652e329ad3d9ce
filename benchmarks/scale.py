"""What many experts cost: start time, memory, clusters, and the time to choose one.

    .venv/bin/python -m benchmarks.scale [--experts 64] [--replicas 8] [--rounds 7] [--requests 400]

Runs two whole proxies side by side, one with three experts and one with many. Each round sends requests to both in turn
that ask for 1, 3 or all of the experts. The replicas are loopback addresses served by one process; each is
health-checked every 5 seconds. Prints medians. Linux only: other systems do not answer on 127.0.0.2.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from urllib.request import urlopen

from ext_authz.wire.clusters import MAX_PAIRED
from tests.harness.system import HOST, System, rss, system, wait_for


def names(experts: int) -> list[str]:
    return [f"E{n}" for n in range(experts)]


def policy(experts: int, replicas: int) -> Callable[[Mapping[str, Sequence[int]]], str]:
    def text(ports: Mapping[str, Sequence[int]]) -> str:
        (port,) = ports["E0"]
        found = {
            name: {"tier": "low", "endpoints": [f"127.0.{n}.{r + 1}:{port}" for r in range(replicas)]}
            for n, name in enumerate(names(experts))
        }
        gate = [{"path": "/route", "json": "/expert_names"}]
        return json.dumps({"version": 1, "tiers": ["low"], "anonymous": "low", "experts": found, "gate": gate})

    return text


def start(stack: ExitStack, experts: int, replicas: int) -> tuple[System, float]:
    """A running proxy, and the seconds from the start of its processes to the first response from the last expert."""
    began = time.perf_counter()
    flags = {"E0": ("--host", "0.0.0.0", "--delay", "0", "--concurrency", "1000", "--queue", "1000")}
    it = stack.enter_context(system(policy(experts, replicas), {"E0": 1}, expert_flags=flags, workers=1))
    last = names(experts)[-1]
    wait_for(lambda: it.send(experts=[last]).status == 200, last, it)
    return it, time.perf_counter() - began


def stat(it: System, name: str) -> int:
    with urlopen(f"http://{HOST}:{it.admin}/stats?format=json&filter=^{name}$") as response:
        return int(json.load(response)["stats"][0]["value"])


def ask(it: System, asked: Sequence[str], requests: int) -> float:
    """The median latency in milliseconds of this many requests on one connection."""
    body = json.dumps({"token_id": 101, "expert_names": asked})
    connection = http.client.HTTPConnection(HOST, it.port, timeout=10)
    took = []
    for _ in range(requests):
        began = time.perf_counter()
        connection.request("POST", "/route", body)
        response = connection.getresponse()
        response.read()
        took.append(time.perf_counter() - began)
        if response.status != 200:
            raise RuntimeError(f"answered {response.status}")
    connection.close()
    return statistics.median(took) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=64, help="3 to 64, so that one request can name them all")
    parser.add_argument("--replicas", type=int, default=8, help="replicas of each expert (default: 8)")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--requests", type=int, default=400, help="requests of each kind in a round (default: 400)")
    args = parser.parse_args()
    if not 3 <= args.experts <= 64:
        parser.error("--experts must be 3 to 64")
    with ExitStack() as stack:
        few, few_ready = start(stack, 3, 1)
        many, many_ready = start(stack, args.experts, args.replicas)
        time.sleep(6)  # until every endpoint has been health-checked
        kinds = {
            "3 experts, asked for 1": (few, names(1)),
            "3 experts, asked for 3": (few, names(3)),
            f"{args.experts} experts, asked for 1": (many, names(1)),
            f"{args.experts} experts, asked for 3": (many, names(3)),
            f"{args.experts} experts, asked for all": (many, names(args.experts)),
        }
        took: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(args.rounds):
            for kind, (it, asked) in kinds.items():
                took[kind].append(ask(it, asked, args.requests))
        scheme = "one ladder per pair" if args.experts <= MAX_PAIRED else "one ladder per expert"
        print(f"{'':32} {'3 x 1':>9} {f'{args.experts} x {args.replicas}':>9}   ({scheme}; pairs up to {MAX_PAIRED})")
        print(f"{'start to ready, s':32} {few_ready:9.1f} {many_ready:9.1f}")
        memory = [rss(it.envoy.process.pid) / 2**20 for it in (few, many) if it.envoy.process]
        print(f"{'memory of Envoy, MiB':32} {memory[0]:9.0f} {memory[1]:9.0f}")
        memory = [rss(it.authz.process.pid) / 2**20 for it in (few, many) if it.authz.process]
        print(f"{'memory of ext_authz, MiB':32} {memory[0]:9.0f} {memory[1]:9.0f}")
        clusters = [stat(it, "cluster_manager.active_clusters") for it in (few, many)]
        print(f"{'clusters in Envoy':32} {clusters[0]:9} {clusters[1]:9}")
    print(f"\n{'whole request, ms':32} {'p50':>9} {'above 3 of 3':>17}")
    base = took["3 experts, asked for 3"]
    for kind, samples in took.items():
        more = statistics.median(a - b for a, b in zip(samples, base, strict=True))
        print(f"{kind:32} {statistics.median(samples):9.2f} {more:+17.2f}")


if __name__ == "__main__":
    main()
