"""How well it works to pick the idlest permitted expert: SRP against other load balancing policies and the ideal.

    .venv/bin/python -m benchmarks.balance [--seconds 20] [--rounds 3] [--stretch 3]

Three unequal experts (8, 8 and 16 concurrent requests; exponential service times) get Poisson arrivals at 70 % and 90 %
of their total capacity. The load is open-loop: no client waits for a response before sending the next request. Every
policy gets the same arrivals and the same work per request, one policy after the other, round after round, through one
Envoy with two worker threads:

    srp          the whole proxy: ext_authz and the route script; weights 8, 8, 16
    round robin, random, two choices    Envoy's own policies, on one cluster of three endpoints; no ext_authz
    ideal        only simulated: SRP's rule with perfect knowledge, no network and no proxy

A latency is the time from when a request is due to the end of its response. The first fifth of each round is left out.
`choices` is the mean latency that the same choices of expert would give if the network, the proxy and a busy machine
took no time; `simulated` is the mean latency of the simulated policy. Prints the medians over the rounds, writes
benchmarks/results/balance.json and, with matplotlib (extra `bench`), docs/balance.png. Finally, it simulates other
weights.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from benchmarks import queues
from benchmarks.queues import Kind, Trace
from tests.harness import ROOT
from tests.harness.system import HOST, System, free_ports, system, wait_for

RESULTS = ROOT / "benchmarks/results/balance.json"
PLOT = ROOT / "docs/balance.png"
LOADS = (0.7, 0.9)
WARM_UP = 0.2  # of a round
IDEAL_SEEDS = 5  # simulations to average over, as ties are broken at random
WEIGHT_SEEDS = 20
UNLIMITED = 1_000_000

FAILED = ""  # instead of an expert's name
Served = list[tuple[float, str]]  # latency in seconds, and expert


@dataclass(frozen=True)
class Case:
    """Experts, and the factor by which their service times are multiplied."""

    name: str
    title: str
    factor: float
    experts: tuple[Kind, ...]

    @property
    def rate(self) -> float:
        return sum(e.rate for e in self.experts)


@dataclass(frozen=True)
class Way:
    """A policy: the rule to simulate, and its `lb_policy` in Envoy (None: SRP). Without a `path` it is only simulated."""

    name: str
    rule: Callable[[], queues.Policy]
    path: str = ""
    lb: Mapping[str, Any] | None = None


WAYS = (
    Way("srp", lambda: queues.idlest, "/route"),
    Way("two choices", lambda: queues.two_choices, "/two", {
        "lb_policy": "LEAST_REQUEST", "least_request_lb_config": {"choice_count": 2}
    }),
    Way("random", lambda: queues.any_one, "/random", {"lb_policy": "RANDOM"}),
    Way("round robin", queues.in_turn, "/turn", {"lb_policy": "ROUND_ROBIN"}),
    Way("ideal", lambda: queues.idlest),
    Way("ideal, no weights", lambda: queues.shortest),
)  # fmt: skip


def cases(stretch: float) -> tuple[Case, ...]:
    def three(*means: float) -> tuple[Kind, ...]:
        return tuple(Kind(n, s, m) for n, s, m in zip("ABC", (8, 8, 16), means, strict=True))

    return (
        Case("short", "20, 40, 100 ms", stretch, three(0.02 * stretch, 0.04 * stretch, 0.1 * stretch)),
        Case("long", "1, 2, 4 s", 0.1, three(0.1, 0.2, 0.4)),
    )


# ---- the system ----


def policy_text(ports: Mapping[str, Sequence[int]], case: Case) -> str:
    experts = {
        e.name: {
            "tier": "low", "cluster": f"expert-{e.name.lower()}", "endpoints": [f"{HOST}:{ports[e.name][0]}"],
            "weight": e.slots, "max_requests": UNLIMITED, "max_pending": UNLIMITED, "timeout": 0,
        }
        for e in case.experts
    }  # fmt: skip
    gate = [{"path": "/route", "json": "/expert_names"}]
    return json.dumps({"version": 1, "tiers": ["low"], "anonymous": "low", "experts": experts, "gate": gate})


def with_native(text: str, port: int, endpoints: Sequence[int]) -> str:
    """Envoy's configuration with a second listener, whose routes use Envoy's own load balancing policies."""
    config = yaml.safe_load(text)
    routes = []
    for way in WAYS:
        if way.lb is None:
            continue
        name = way.path.strip("/")
        hosts = [{"endpoint": {"address": _address(p)}} for p in endpoints]
        limits = {f"max_{what}": UNLIMITED for what in ("connections", "requests", "pending_requests")}
        config["static_resources"]["clusters"].append({
            "name": name, "type": "STATIC", "connect_timeout": "1s", **way.lb,
            "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": hosts}]},
            "circuit_breakers": {"thresholds": [limits]},
        })  # fmt: skip
        route = {"cluster": name, "prefix_rewrite": "/process", "timeout": "0s"}
        routes.append({"match": {"path": way.path}, "route": route})
    router = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "native",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": router}}],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    config["static_resources"]["listeners"].append(
        {"name": "native", "address": _address(port), "filter_chains": [chain]}
    )
    return yaml.safe_dump(config, sort_keys=False)


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": HOST, "port_value": port}}


@contextlib.contextmanager
def running(case: Case) -> Iterator[tuple[System, int]]:
    """The system, and the port of its second listener."""
    (port,) = free_ports(1)
    ports: dict[str, list[int]] = {}

    def policy(found: Mapping[str, list[int]]) -> str:
        ports.update(found)
        return policy_text(found, case)

    with system(
        policy,
        {e.name: 1 for e in case.experts},
        expert_command=(sys.executable, "-m", "benchmarks.expert"),
        expert_flags={e.name: ("--slots", str(e.slots), "--mean", str(e.mean)) for e in case.experts},
        envoy_config=lambda text: with_native(text, port, [ports[e.name][0] for e in case.experts]),
    ) as it:
        for e in case.experts:  # all three, not only one
            wait_for(lambda e=e: it.send(experts=[e.name], headers=[("x-work", "0")]).status == 200, e.name, it)
        yield it, port


# ---- the load ----


async def play(url: str, names: Sequence[str], trace: Trace) -> Served:
    """Send every request of the trace when it is due. The result is in the trace's order."""
    body = json.dumps({"token_id": 101, "expert_names": names}).encode()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        clock = asyncio.get_running_loop().time
        began = clock() + 0.2

        async def one(due: float, work: float) -> tuple[float, str]:
            async with session.post(url, data=body, headers={"x-work": f"{work:.9f}"}) as response:
                answer = await response.read()
                if response.status != 200:
                    print(f"{url} answered {response.status} {answer[:200]!r}", file=sys.stderr)
                    return clock() - began - due, FAILED
                return clock() - began - due, response.headers["x-expert"].removeprefix("Expert_")

        async with asyncio.TaskGroup() as group:
            tasks = []
            for due, work in zip(trace.arrivals, trace.work, strict=True):
                if (early := began + due - clock()) > 0:
                    await asyncio.sleep(early)
                tasks.append(group.create_task(one(due, work)))
    return [task.result() for task in tasks]


def busy_share(before: Sequence[int]) -> float:
    """The fraction of the machine's CPU time since `before` (from `cpu_times`) that was not idle."""
    spent = [b - a for a, b in zip(before, cpu_times(), strict=True)]
    return 1 - (spent[3] + spent[4]) / sum(spent)


def cpu_times() -> list[int]:
    return [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


# ---- the results ----


@dataclass(frozen=True)
class Sample:
    """One policy in one round, without the warm-up. Times are in seconds; `cpu` is the busy fraction of the machine.

    Failed requests are counted in `failed` and left out of everything else. `choices` is the mean latency if every
    request had reached its expert the moment it was due: the quality of the policy's choices, without the delays of the
    network, the proxy and a busy machine.
    """

    latencies: Sequence[float]
    shares: Mapping[str, float]
    choices: float
    cpu: float = 0.0
    failed: int = 0

    @classmethod
    def of(cls, served: Served, case: Case, trace: Trace, cpu: float = 0.0) -> Sample:
        warm = int(len(served) * WARM_UP)
        exact = [s for s in queues.replay(case.experts, trace, [name for _, name in served])[warm:] if s is not None]
        counted = [(seconds, name) for seconds, name in served[warm:] if name != FAILED]
        experts = Counter(name for _, name in counted)
        shares = {name: experts[name] / len(counted) for name in sorted(experts)}
        return cls(
            sorted(s for s, _ in counted), shares, statistics.fmean(exact), cpu, len(served) - warm - len(counted)
        )

    @property
    def mean(self) -> float:
        return statistics.fmean(self.latencies)

    def quantile(self, q: float) -> float:
        return self.latencies[min(int(q * len(self.latencies)), len(self.latencies) - 1)]


def simulated(case: Case, trace: Trace, way: Way) -> Sample:
    runs = [queues.simulate(case.experts, trace, way.rule(), seed) for seed in range(IDEAL_SEEDS)]
    samples = [Sample.of(served, case, trace) for served in runs]
    shares = {e.name: statistics.fmean(s.shares.get(e.name, 0) for s in samples) for e in case.experts}
    together = sorted(s for sample in samples for s in sample.latencies)
    return Sample(together, shares, statistics.fmean(together))


def measure(case: Case, seconds: float, rounds: int) -> Iterator[dict[str, Any]]:
    """For each load and policy: the medians over the rounds, and the ratios to the ideal of the same round."""
    names = [e.name for e in case.experts]
    with running(case) as (it, native_port):
        for load in LOADS:
            measured: dict[str, list[Sample]] = {w.name: [] for w in WAYS}
            modelled: dict[str, list[Sample]] = {w.name: [] for w in WAYS}
            for number in range(rounds):
                trace = Trace.poisson(case.rate * load, seconds, seed=number)
                for way in WAYS:
                    modelled[way.name].append(simulated(case, trace, way))
                    if not way.path:
                        continue
                    url = f"http://{HOST}:{it.port if way.lb is None else native_port}{way.path}"
                    before = cpu_times()
                    served = asyncio.run(play(url, names, trace))
                    measured[way.name].append(Sample.of(served, case, trace, busy_share(before)))
                    print(f"  {case.name} {load:.0%} round {number + 1}: {way.name}", file=sys.stderr)
                    time.sleep(1)
            ideal = modelled["ideal"]
            for way in WAYS:
                yield summary(case, load, way, measured[way.name] or modelled[way.name], modelled[way.name], ideal)


def summary(
    case: Case, load: float, way: Way, samples: Sequence[Sample], modelled: Sequence[Sample], ideal: Sequence[Sample]
) -> dict[str, Any]:
    def median(values: Iterable[float]) -> float:
        return round(statistics.median(values), 4)

    percents = [n / 50 for n in range(50)] + [0.985, 0.99, 0.995, 0.997, 0.998, 0.999]
    return {
        "case": case.name,
        "load": load,
        "policy": way.name,
        "measured": bool(way.path),
        "mean_ms": median(s.mean * 1e3 for s in samples),
        "p50_ms": median(s.quantile(0.5) * 1e3 for s in samples),
        "p99_ms": median(s.quantile(0.99) * 1e3 for s in samples),
        "shares": {e.name: median(s.shares.get(e.name, 0.0) for s in samples) for e in case.experts},
        "of_ideal": median(s.mean / i.mean for s, i in zip(samples, ideal, strict=True)),
        "choices_mean_ms": median(s.choices * 1e3 for s in samples),
        "choices_of_ideal": median(s.choices / i.mean for s, i in zip(samples, ideal, strict=True)),
        "simulated_mean_ms": median(s.mean * 1e3 for s in modelled),
        "cpu": median(s.cpu for s in samples),
        "failed": sum(s.failed for s in samples),
        "quantiles_ms": [[q, round(median(s.quantile(q) * 1e3 for s in samples), 1)] for q in percents],
    }


def table(rows: Sequence[Mapping[str, Any]], all_cases: Sequence[Case]) -> str:
    lines = []
    for case in all_cases:
        for load in LOADS:
            lines.append(
                f"\n{case.title} times {case.factor:g}, at {load:.0%} of {case.rate:.0f} requests per second\n"
                f"{'policy':20} {'mean ms':>9} {'p50 ms':>9} {'p99 ms':>9} {'of ideal':>9}   {'A / B / C':15}"
                f" {'choices':>9} {'simulated':>9} {'CPU':>5} {'failed':>6}"
            )
            for row in (r for r in rows if (r["case"], r["load"]) == (case.name, load)):
                shares = " / ".join(f"{share:.0%}" for share in row["shares"].values())
                cpu = f"{row['cpu']:.0%}" if row["measured"] else ""
                lines.append(
                    f"{row['policy']:20} {row['mean_ms']:9.1f} {row['p50_ms']:9.1f} {row['p99_ms']:9.1f}"
                    f" {row['of_ideal']:9.2f}   {shares:15} {row['choices_mean_ms']:9.1f} {row['simulated_mean_ms']:9.1f} {cpu:>5} {row['failed'] or '':>6}"
                )
    return "\n".join(lines)


def weights_table(all_cases: Sequence[Case], seconds: float) -> str:
    """The simulated mean latency under SRP's rule for different weights, each with the same arrivals."""
    kinds: dict[str, Callable[[Kind], float]] = {
        "slots": lambda e: e.slots,
        "rate": lambda e: e.rate,
        "sqrt(slots x rate)": lambda e: (e.slots * e.rate) ** 0.5,
        "all equal": lambda _: 1,
    }
    lines = ["\nsimulated mean ms by weights", f"{'weights':20}"]
    lines[1] += "".join(f"{f'{case.name} {load:.0%}':>12}" for case in all_cases for load in LOADS)
    for name, weight in kinds.items():
        line = f"{name:20}"
        for case in all_cases:
            for load in LOADS:
                means = []
                for seed in range(WEIGHT_SEEDS):
                    trace = Trace.poisson(case.rate * load, seconds, seed)
                    served = queues.simulate(case.experts, trace, queues.weighted(weight), seed)
                    means.append(statistics.fmean(s for s, _ in served[int(len(served) * WARM_UP) :]))
                line += f"{statistics.fmean(means) * 1e3:12.1f}"
        lines.append(line)
    return "\n".join(lines)


def plot(rows: Sequence[Mapping[str, Any]], all_cases: Sequence[Case], path: Path) -> None:
    """One panel per case, at the highest load: the fraction of requests that took longer than x."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(all_cases), figsize=(10, 4), sharey=True, layout="constrained")
    styles = {
        "ideal": {"color": "0.6", "linewidth": 4},
        "srp": {"color": "tab:blue", "linewidth": 1.8},
        "two choices": {"color": "tab:green"},
        "random": {"color": "tab:orange"},
        "round robin": {"color": "tab:red"},
    }
    for panel, case in zip(panels, all_cases, strict=True):
        for name, style in styles.items():
            (row,) = (r for r in rows if (r["case"], r["load"], r["policy"]) == (case.name, LOADS[-1], name))
            label = "SRP" if name == "srp" else "ideal (simulated)" if name == "ideal" else name
            label += f", mean {row['mean_ms']:.0f} ms"
            panel.plot(
                [ms for _, ms in row["quantiles_ms"]], [1 - q for q, _ in row["quantiles_ms"]], label=label, **style
            )
        panel.set(xscale="log", yscale="log", ylim=(1e-3, 1), xlabel="latency, ms")
        panel.set_title(f"service {case.title}, times {case.factor:g}; load {LOADS[-1]:.0%}", fontsize=10)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower left")
    panels[0].set_ylabel("fraction of requests that took longer")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="length of a round's arrivals (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument(
        "--stretch",
        type=float,
        default=3,
        help="multiply the short service times, for less CPU load (default: 3)",
    )
    parser.add_argument("--plot-only", action="store_true", help="redraw the plot from the last results")
    args = parser.parse_args()
    if args.plot_only:
        found = json.loads(RESULTS.read_text())
        rows, all_cases = found["rows"], cases(found["stretch"])
    else:
        all_cases = cases(args.stretch)
        rows = [row for case in all_cases for row in measure(case, args.seconds, args.rounds)]
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({**vars(args), "rows": rows}) + "\n")
    print(table(rows, all_cases))
    print(weights_table(all_cases, args.seconds))
    try:
        plot(rows, all_cases, PLOT)
    except ModuleNotFoundError:
        sys.exit("no plot without matplotlib: pip install 'secure-routing-proxy[bench]', then --plot-only")


if __name__ == "__main__":
    main()
