"""The counts of a process as a value, which can be sent to another process and added up."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ext_authz.core.snapshot import CACHES, CacheSizes, Snapshot
from ext_authz.observe.metrics import BUCKETS, Tally

_NO_LATENCY = (0,) * (len(BUCKETS) + 1)


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """One cache: its current entries, and its use across all epochs."""

    entries: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of one process, or of several."""

    decisions: tuple[tuple[str, str, int], ...] = ()
    experts: Mapping[str, int] = field(default_factory=dict)
    condition_errors: Mapping[str, int] = field(default_factory=dict)
    rpc_errors: int = 0
    leases: int = 0
    latency: tuple[int, ...] = _NO_LATENCY
    latency_sum: float = 0.0
    caches: Mapping[str, CacheUsage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.latency) != len(_NO_LATENCY):
            raise ValueError("the latency buckets differ")

    @property
    def checks(self) -> int:
        """Decisions, including errors."""
        return sum(self.latency)

    def tally(self) -> Tally:
        """The counts as a Tally."""
        tally = Tally(self.latency, self.latency_sum)
        tally.decisions.update({(verdict, reason): n for verdict, reason, n in self.decisions})
        tally.experts.update(self.experts)
        tally.condition_errors.update(self.condition_errors)
        tally.rpc_errors, tally.leases = self.rpc_errors, self.leases
        return tally


def counted(tally: Tally, sizes: CacheSizes, snapshot: Snapshot) -> Counts:
    """The counts of this process."""
    caches = {}
    for name in CACHES:
        counts = sizes.counts[name]
        caches[name] = CacheUsage(len(getattr(snapshot, name)), counts.hits, counts.misses, counts.evictions)
    return Counts(
        tuple((str(verdict), str(reason), n) for (verdict, reason), n in sorted(tally.decisions.items())),
        dict(tally.experts),
        dict(tally.condition_errors),
        tally.rpc_errors,
        tally.leases,
        tuple(tally.latency),
        tally.latency_sum,
        caches,
    )


def add_up(counts: Iterable[Counts]) -> Counts:
    """The sum of all `counts`."""
    decisions: Counter[tuple[str, str]] = Counter()
    experts: Counter[str] = Counter()
    condition_errors: Counter[str] = Counter()
    rpc_errors = leases = 0
    latency, latency_sum = list(_NO_LATENCY), 0.0
    caches = dict.fromkeys(CACHES, CacheUsage())
    for one in counts:
        decisions.update({(verdict, reason): n for verdict, reason, n in one.decisions})
        experts.update(one.experts)
        condition_errors.update(one.condition_errors)
        rpc_errors += one.rpc_errors
        leases += one.leases
        latency = [a + b for a, b in zip(latency, one.latency, strict=True)]
        latency_sum += one.latency_sum
        for name, use in one.caches.items():
            caches[name] = _sum(caches[name], use)
    return Counts(
        tuple((verdict, reason, n) for (verdict, reason), n in sorted(decisions.items())),
        experts, condition_errors, rpc_errors, leases, tuple(latency), latency_sum, caches,
    )  # fmt: skip


def ended(counts: Counts) -> Counts:
    """The counts of a process that has ended: its caches have no entries any more."""
    caches = {name: CacheUsage(0, use.hits, use.misses, use.evictions) for name, use in counts.caches.items()}
    return dataclasses.replace(counts, caches=caches)


def _sum(a: CacheUsage, b: CacheUsage) -> CacheUsage:
    return CacheUsage(a.entries + b.entries, a.hits + b.hits, a.misses + b.misses, a.evictions + b.evictions)
