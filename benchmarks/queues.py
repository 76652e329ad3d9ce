"""A model of the benchmark without a network: arrivals, experts as queues, and simulated policies. Pure.

An expert has `slots` that each serve one request at a time in order of arrival, and an unbounded queue. Request i
arrives at `arrivals[i]` seconds and takes `work[i]` times the mean of the expert that serves it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace
from random import Random


@dataclass(frozen=True)
class Kind:
    """One expert: `slots` requests at a time, `mean` seconds each. `slots` is also its weight in SRP."""

    name: str
    slots: int
    mean: float

    @property
    def rate(self) -> float:
        """Requests per second that it can serve."""
        return self.slots / self.mean


@dataclass(frozen=True)
class Trace:
    """The input that all policies share."""

    arrivals: Sequence[float]
    work: Sequence[float]

    @classmethod
    def poisson(cls, rate: float, seconds: float, seed: int) -> Trace:
        """Poisson arrivals and exponential work. The same seed gives the same trace."""
        random = Random(seed)
        arrivals: list[float] = []
        now = random.expovariate(rate)
        while now < seconds:
            arrivals.append(now)
            now += random.expovariate(rate)
        return cls(arrivals, [random.expovariate(1) for _ in arrivals])


class Slots:
    """First come, first served on `slots` slots. Only computes times: `now` is an argument, and nothing waits."""

    def __init__(self, slots: int) -> None:
        self._free = [0.0] * slots
        heapify(self._free)

    def finish(self, now: float, seconds: float) -> float:
        """The time at which a request that arrives `now` and takes `seconds` is done."""
        end = max(now, self._free[0]) + seconds
        heapreplace(self._free, end)
        return end


# A policy gets the number of requests in flight at each expert and picks one. It may keep state between calls.
Policy = Callable[[Sequence[Kind], Sequence[int], Random], int]


def idlest(experts: Sequence[Kind], busy: Sequence[int], random: Random) -> int:
    """SRP's rule: the smallest (in flight + 1) / weight."""
    return _least([(n + 1) / e.slots for e, n in zip(experts, busy, strict=True)], random)


def weighted(weight: Callable[[Kind], float]) -> Policy:
    """SRP's rule with weights other than the slots."""

    def policy(experts: Sequence[Kind], busy: Sequence[int], random: Random) -> int:
        return _least([(n + 1) / weight(e) for e, n in zip(experts, busy, strict=True)], random)

    return policy


def shortest(experts: Sequence[Kind], busy: Sequence[int], random: Random) -> int:
    """Join the shortest queue, without weights."""
    return _least(list(busy), random)


def two_choices(experts: Sequence[Kind], busy: Sequence[int], random: Random) -> int:
    """The less busy of two random experts."""
    a, b = random.randrange(len(busy)), random.randrange(len(busy))
    return a if busy[a] <= busy[b] else b


def any_one(experts: Sequence[Kind], busy: Sequence[int], random: Random) -> int:
    return random.randrange(len(busy))


def in_turn() -> Policy:
    turn = -1

    def policy(experts: Sequence[Kind], busy: Sequence[int], random: Random) -> int:
        nonlocal turn
        turn = (turn + 1) % len(busy)
        return turn

    return policy


def simulate(experts: Sequence[Kind], trace: Trace, policy: Policy, seed: int = 0) -> list[tuple[float, str]]:
    """Latency in seconds and expert of each request. The policy knows the exact number of requests in flight."""
    random = Random(seed)
    slots = [Slots(e.slots) for e in experts]
    ends: list[list[float]] = [[] for _ in experts]
    served = []
    for now, work in zip(trace.arrivals, trace.work, strict=True):
        for at in ends:
            while at and at[0] <= now:
                heappop(at)
        i = policy(experts, [len(at) for at in ends], random)
        end = slots[i].finish(now, work * experts[i].mean)
        heappush(ends[i], end)
        served.append((end - now, experts[i].name))
    return served


def replay(experts: Sequence[Kind], trace: Trace, chosen: Sequence[str]) -> list[float | None]:
    """Latency in seconds of each request if it reaches its `chosen` expert without delay; None if it reached none."""
    kinds = {e.name: e for e in experts}
    slots = {e.name: Slots(e.slots) for e in experts}
    requests = zip(trace.arrivals, trace.work, chosen, strict=True)
    return [
        slots[name].finish(now, work * kinds[name].mean) - now if name in kinds else None
        for now, work, name in requests
    ]


def _least(loads: Sequence[float], random: Random) -> int:
    least = min(loads)
    return random.choice([i for i, load in enumerate(loads) if load == least])
