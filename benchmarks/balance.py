"""How well the idlest permitted expert does: SRP beside other ways to balance, and beside what is possible at all.

    .venv/bin/python benchmarks/balance.py [--seconds 25] [--rounds 3] [--stretch 2]

Three unequal experts (8, 8 and 16 requests at a time; exponential service times) get Poisson arrivals at 70 % and 90 %
of what they can serve together, open-loop: nobody waits for an answer before sending the next request. Every policy gets
the same arrivals and the same work in each request, one policy after the other, round after round, through one Envoy
with two worker threads:

    srp          the whole proxy: ext_authz and the route script; weights 8, 8, 16
    round robin, random, two choices    Envoy's own, on one cluster of three endpoints; no ext_authz
    ideal        not run but reckoned: SRP's rule with perfect knowledge, no network and no proxy

A latency is from when a request was due to the end of its answer; the first fifth of each round is left out. Prints the
medians over the rounds, writes benchmarks/results/balance.json and, with matplotlib (extra `bench`), docs/balance.png.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import queues  # noqa: E402
from queues import Kind, Trace  # noqa: E402

from system import HOST, System, free_ports, system, wait_for  # noqa: E402

RESULTS = ROOT / "benchmarks/results/balance.json"
PLOT = ROOT / "docs/balance.png"
LOADS = (0.7, 0.9)
WARM_UP = 0.2  # of a round
IDEAL_SEEDS = 5  # ties are broken at random: the ideal is a mean over so many runs
UNLIMITED = 1_000_000

Served = list[tuple[float, str]]  # seconds and expert


@dataclass(frozen=True)
class Case:
    """Experts, and what their service times were multiplied by."""

    name: str
    title: str
    factor: float
    experts: tuple[Kind, ...]

    @property
    def rate(self) -> float:
        return sum(e.rate for e in self.experts)


@dataclass(frozen=True)
class Way:
    """A policy: how it is simulated, and its `lb_policy` in Envoy (None: SRP; no `path`: only simulated)."""

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
    Way("ideal, speeds known", lambda: queues.soonest),
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


def beside(text: str, port: int, endpoints: Sequence[int]) -> str:
    """Envoy's configuration with a second listener, whose routes balance in Envoy's own ways."""
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
        "stat_prefix": "beside",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": router}}],
    }
    chain = {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
    config["static_resources"]["listeners"].append(
        {"name": "beside", "address": _address(port), "filter_chains": [chain]}
    )
    return yaml.safe_dump(config, sort_keys=False)


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": HOST, "port_value": port}}


@contextlib.contextmanager
def running(case: Case) -> Iterator[tuple[System, int]]:
    """The system, and the port of the listener beside it."""
    (port,) = free_ports(1)
    ports: dict[str, list[int]] = {}

    def policy(found: Mapping[str, list[int]]) -> str:
        ports.update(found)
        return policy_text(found, case)

    with system(
        policy,
        {e.name: 1 for e in case.experts},
        expert_command=(sys.executable, str(ROOT / "benchmarks/expert.py")),
        expert_flags={e.name: ("--slots", str(e.slots), "--mean", str(e.mean)) for e in case.experts},
        envoy_config=lambda text: beside(text, port, [ports[e.name][0] for e in case.experts]),
    ) as it:
        for e in case.experts:  # all three, not only one
            wait_for(lambda e=e: it.send(experts=[e.name], headers=[("x-work", "0")]).status == 200, e.name, it)
        yield it, port


# ---- the load ----


async def play(url: str, names: Sequence[str], trace: Trace) -> Served:
    """Send every request of the trace when it is due."""
    served: Served = []
    body = json.dumps({"token_id": 101, "expert_names": names}).encode()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        clock = asyncio.get_running_loop().time
        began = clock() + 0.2

        async def one(due: float, work: float) -> None:
            async with session.post(url, data=body, headers={"x-work": f"{work:.9f}"}) as response:
                await response.read()
                if response.status != 200:
                    raise RuntimeError(f"{url} answered {response.status}")
                served.append((clock() - began - due, response.headers["x-expert"]))

        async with asyncio.TaskGroup() as group:
            for due, work in zip(trace.arrivals, trace.work, strict=True):
                if (early := began + due - clock()) > 0:
                    await asyncio.sleep(early)
                group.create_task(_after(one(due, work), served, len(served)))
    return served


async def _after(sent: Any, served: Served, _: int) -> None:
    await sent


def busy_share(before: Sequence[int]) -> float:
    """The part of the machine's processors' time since `before` (of `cpu_times`) that was not idle."""
    spent = [b - a for a, b in zip(before, cpu_times(), strict=True)]
    return 1 - (spent[3] + spent[4]) / sum(spent)


def cpu_times() -> list[int]:
    return [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
