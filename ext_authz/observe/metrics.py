"""Metrics: plain integers on the request path, turned into Prometheus text on demand."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from ext_authz.core.model import Decision

BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25)  # seconds
_NONE = (0,) * (len(BUCKETS) + 1)
_BATCH = 256  # decisions counted at a time, which costs a third of counting them one by one


class Tally:
    """The counts of one server. Label sets are bounded: verdicts and reasons are enums, experts are in the policy."""

    __slots__ = (
        "_decisions",
        "_experts",
        "_latency",
        "_latency_sum",
        "_new",
        "condition_errors",
        "leases",
        "rpc_errors",
    )

    def __init__(self, latency: Iterable[int] = _NONE, latency_sum: float = 0.0) -> None:
        self._new: list[tuple[Decision, float]] = []
        self._decisions: Counter[tuple[str, str]] = Counter()
        self._experts: Counter[str] = Counter()
        self._latency = list(latency)
        self._latency_sum = latency_sum
        self.condition_errors: Counter[str] = Counter()
        self.rpc_errors = 0
        self.leases = 0

    def decided(self, decision: Decision, seconds: float) -> None:
        """Count one decision that took `seconds`."""
        self._new.append((decision, seconds))
        if len(self._new) >= _BATCH:
            self._count()

    @property
    def decisions(self) -> Counter[tuple[str, str]]:
        """Decisions by verdict and reason."""
        self._count()
        return self._decisions

    @property
    def experts(self) -> Counter[str]:
        """Decisions by each expert that they offered."""
        self._count()
        return self._experts

    @property
    def latency(self) -> list[int]:
        """Decisions by bucket of `BUCKETS`, plus one bucket for slower ones."""
        self._count()
        return self._latency

    @property
    def latency_sum(self) -> float:
        """Total seconds of all decisions."""
        self._count()
        return self._latency_sum

    def _count(self) -> None:
        new, self._new = self._new, []
        for decision, seconds in new:
            self._decisions[decision.verdict, decision.reason] += 1
            for expert in decision.serve:
                self._experts[expert] += 1
            self._latency[bisect_left(BUCKETS, seconds)] += 1
            self._latency_sum += seconds

    def families(self) -> Iterator[Metric]:
        """The counts as Prometheus metric families."""
        decisions = CounterMetricFamily(
            "srp_decisions", "Decisions by verdict and reason.", labels=["verdict", "reason"]
        )
        for (verdict, reason), n in sorted(self.decisions.items()):
            decisions.add_metric([verdict, reason], n)
        yield decisions
        experts = CounterMetricFamily("srp_candidates", "Decisions that offered the expert.", labels=["expert"])
        for expert, n in sorted(self.experts.items()):
            experts.add_metric([expert], n)
        yield experts
        errors = CounterMetricFamily(
            "srp_condition_errors",
            "Decisions for which a condition could not be evaluated and counted as a non-match.",
            labels=["condition"],
        )
        for condition, n in sorted(self.condition_errors.items()):
            errors.add_metric([condition], n)
        yield errors
        yield CounterMetricFamily("srp_leases", "Decisions granted to Envoy as leases.", value=self.leases)
        yield CounterMetricFamily("srp_rpc_errors", "Checks denied by an unexpected error.", value=self.rpc_errors)
        total, buckets = 0, []
        for bound, n in zip((*map(str, BUCKETS), "+Inf"), self.latency, strict=True):
            total += n
            buckets.append((bound, total))
        yield HistogramMetricFamily(
            "srp_check_seconds", "Time per check, in seconds.", buckets=buckets, sum_value=self.latency_sum
        )


def gauge(name: str, text: str, value: float) -> Metric:
    """A gauge with one value."""
    return GaugeMetricFamily(name, text, value=value)


class Families(Collector):
    """A Prometheus collector of the metric families that `sources` yield on each scrape."""

    def __init__(self, *sources: Iterable[Metric] | object) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        for source in self._sources:
            yield from source()  # type: ignore[operator]


def registry(*sources: object) -> CollectorRegistry:
    """A separate registry, not the global one, for callables that yield metric families."""
    collectors = CollectorRegistry(auto_describe=False)
    collectors.register(Families(*sources))
    return collectors
