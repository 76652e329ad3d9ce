"""What a running server reports of itself: `/status` as JSON, `/metrics` as metric families."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from ext_authz import __version__
from ext_authz.core.snapshot import CacheSizes
from ext_authz.observe.counts import Counts, add_up, counted
from ext_authz.observe.lease_counts import LeaseCounter
from ext_authz.observe.metrics import Tally, gauge
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.control import Control, PolicyStatus
from ext_authz.serve.witness import Witness
from ext_authz.serve.workers import Workers
from ext_authz.sources.keys import KeyStatus, KeyStore
from ext_authz.wire.ads import Ads


@dataclass(frozen=True, slots=True)
class Report:
    """Collects the report from the parts of the server on each call. `began` is in seconds since the epoch."""

    began: float
    tally: Tally
    caches: CacheSizes
    authorization: Authorization
    control: Control
    keys: KeyStore
    ads: Ads
    workers: Workers
    lease_counter: LeaseCounter
    witness: Witness | None

    async def refresh(self) -> None:
        """Get the newest counts from the workers and Envoy. The wait is bounded."""
        await asyncio.gather(self.workers.refresh(), self.lease_counter.refresh())

    def status(self) -> dict[str, Any]:
        """The report for `/status`."""
        now, own = time.time(), self._own()
        total = add_up([own, self.workers.counts()])
        policy = dataclasses.asdict(self.control.status)
        policy["age_seconds"] = round(now - policy.pop("since"), 3)
        lease_epoch = self.control.lease_epoch
        leases = {"on": lease_epoch is not None, "epoch": lease_epoch, "granted": total.leases}
        ads = self.ads
        return {
            "version": __version__,
            "uptime_seconds": round(now - self.began, 3),
            "policy": policy,
            "envoy": {"connected": ads.connected, "acknowledged": ads.acknowledged, "last_error": ads.last_error},
            "keys": [dataclasses.asdict(k) for k in self.keys.status()],
            "decisions": {f"{verdict}/{reason}": n for verdict, reason, n in total.decisions},
            "rpc_errors": total.rpc_errors,
            "leases": leases | self.lease_counter.report(),
            "workers": [self._first_worker(own), *self.workers.report()],
            **(self.witness.report() if self.witness else {}),
        }

    def families(self) -> Iterator[Metric]:
        """The report for `/metrics`."""
        total = add_up([self._own(), self.workers.counts()])
        yield from total.tally().families()
        yield from _policy(self.control.status)
        yield gauge("srp_envoy_connected", "Envoys connected to ADS.", self.ads.connected)
        refused = float(self.ads.last_error is not None)
        yield gauge("srp_envoy_refused", "1 while Envoy's last answer to new clusters is a refusal.", refused)
        yield from _keys(self.keys.status())
        yield from _caches(total)
        yield gauge("srp_workers", "Processes that accept checks.", 1 + self.workers.serving)
        yield CounterMetricFamily("srp_worker_restarts", "Workers that were replaced.", value=self.workers.restarts)
        yield from self.lease_counter.families()
        if self.witness is not None:
            yield from self.witness.families()

    def _own(self) -> Counts:
        return counted(self.tally, self.caches, self.authorization.epoch.snapshot)

    def _first_worker(self, own: Counts) -> dict[str, Any]:
        """This process, which is the first worker."""
        return {
            "worker": 0, "pid": os.getpid(), "age_seconds": round(time.time() - self.began, 3), "serving": True,
            "epoch": self.authorization.epoch.snapshot.epoch, "checks": own.checks, "restarts": 0,
        }  # fmt: skip


def _policy(status: PolicyStatus) -> Iterator[Metric]:
    yield InfoMetricFamily("srp_policy", "The policy in force.", value={"digest": status.digest})
    yield gauge("srp_policy_since_seconds", "When the policy came into force, in epoch seconds.", status.since)
    yield gauge("srp_policy_error", "1 while the newest policy file is rejected.", float(status.error is not None))
    yield CounterMetricFamily("srp_policy_reloads", "Policies put into force after the first.", value=status.reloads)
    yield CounterMetricFamily("srp_policy_failures", "Policy files rejected.", value=status.failures)


def _keys(keys: tuple[KeyStatus, ...]) -> Iterator[Metric]:
    fetches = CounterMetricFamily("srp_key_fetches", "Fetches of an issuer's keys.", labels=["issuer"])
    failures = CounterMetricFamily("srp_key_failures", "Failed fetches of an issuer's keys.", labels=["issuer"])
    for key in keys:
        fetches.add_metric([key.issuer], key.fetches)
        failures.add_metric([key.issuer], key.failures)
    usable = GaugeMetricFamily("srp_keys", "Keys that verify an issuer's tokens; 0: all fail.", labels=["issuer"])
    skipped = GaugeMetricFamily("srp_keys_skipped", "Keys of an issuer that cannot be used.", labels=["issuer"])
    for key in keys:
        usable.add_metric([key.issuer], key.keys)
        skipped.add_metric([key.issuer], len(key.skipped))
    yield from (fetches, failures, usable, skipped)


def _caches(total: Counts) -> Iterator[Metric]:
    entries = GaugeMetricFamily("srp_cache_entries", "Entries in the caches of the epoch in force.", labels=["cache"])
    hits = CounterMetricFamily("srp_cache_hits", "Lookups found in the cache.", labels=["cache"])
    misses = CounterMetricFamily("srp_cache_misses", "Lookups not found in the cache.", labels=["cache"])
    evictions = CounterMetricFamily(
        "srp_cache_evictions", "Entries evicted because the cache was full.", labels=["cache"]
    )
    for name, use in total.caches.items():
        entries.add_metric([name], use.entries)
        hits.add_metric([name], use.hits)
        misses.add_metric([name], use.misses)
        evictions.add_metric([name], use.evictions)
    yield from (entries, hits, misses, evictions)
