"""`srp serve`: the parts put together, started in order, stopped in reverse."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import uvloop
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from ext_authz import __version__
from ext_authz.core.check import Memory
from ext_authz.observe import log_lines
from ext_authz.observe.counts import Counts, add_up, counted
from ext_authz.observe.lease_counts import LeaseCounter
from ext_authz.observe.metrics import Tally, gauge, registry
from ext_authz.observe.status import StatusListener
from ext_authz.serve.control import Control, Leasing
from ext_authz.serve.server import NOBODY, Authorization, Epoch, Server, take_turns
from ext_authz.serve.witness import Witness
from ext_authz.serve.workers import Workers, sockets
from ext_authz.settings import Settings
from ext_authz.sources.keys import KeyStore
from ext_authz.wire import lease_filter as leases
from ext_authz.wire.ads import Ads
from ext_authz.wire.bootstrap import envoy_file
from ext_authz.wire.worker_endpoints import worker_endpoints

log = logging.getLogger("srp")


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. PolicyError or OSError if it cannot start."""
    log_lines.start(settings.log_level)
    take_turns()
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    began = time.time()
    tally, ads = Tally(), Ads(fixed=worker_endpoints(sockets(settings)))
    async with AsyncExitStack() as stack:
        keys = KeyStore()
        stack.push_async_callback(keys.close)
        authorization = Authorization(NOBODY, keys, tally)
        witness = authorization.witness = Witness.of(settings)
        if witness is not None:
            stack.push_async_callback(witness.close)
            witness.start()
        workers = Workers(settings, keys.refresh)

        def install(epoch: Epoch) -> None:
            authorization.epoch = epoch
            workers.install(epoch)
            if witness is not None:
                witness.beside(epoch.snapshot)

        memory = Memory(settings.cached_tokens, settings.cached_decisions)
        control = Control(settings.policy, keys, ads, install, leasing(settings, witness), memory, workers)
        stack.push_async_callback(control.close)
        stack.push_async_callback(workers.stop, 0.0)
        workers.start()
        await control.start()
        gc.collect()
        gc.freeze()  # what is here now stays: no later collection needs to walk through it

        counter = LeaseCounter(settings.envoy_admin)

        def own() -> Counts:
            return counted(tally, memory, authorization.epoch.snapshot)

        def report() -> dict[str, Any]:
            counts = own()
            told = _report(began, control, keys, ads, add_up([counts, workers.counts()]))
            told["workers"] = [_owner(began, authorization.epoch, counts), *workers.report()]
            told["leases"] |= counter.report()
            return told | (witness.report() if witness else {})

        async def fresh() -> None:
            await asyncio.gather(workers.fresh(), counter.refresh())

        def families() -> Iterator[Metric]:
            total = add_up([own(), workers.counts()])
            yield from total.tally().families()
            yield from _families(control, keys, ads)
            yield from _cache_families(total)
            yield gauge("srp_workers", "Processes that take checks.", 1 + workers.serving)
            yield CounterMetricFamily("srp_worker_restarts", "Workers that were replaced.", value=workers.restarts)

        if settings.status is not None:
            sources = (families, counter.families, *((witness.families,) if witness else ()))
            status = StatusListener(*settings.status, registry(*sources), report, fresh)
            await status.start()
            stack.push_async_callback(status.stop)
            log.info("status on http://%s:%d", settings.status[0], status.port)
        handlers: tuple[grpc.GenericRpcHandler, ...] = (authorization.handlers(), ads.handlers())
        server = Server(settings.listen, *handlers, max_concurrent=settings.max_concurrent)
        await server.start()

        async def stop() -> None:
            await asyncio.gather(server.stop(settings.drain), workers.stop(settings.drain))

        stack.push_async_callback(stop)
        stack.push_async_callback(ads.close)
        log.info("srp %s listens on %s", __version__, server.address)
        stopped = asyncio.create_task(stopping.wait())
        # Neither ends by itself: without the one no policy would be replaced, without the other no worker.
        tasks = {stopped, *map(asyncio.create_task, (control.watch(), workers.ended()))}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {stopped}:
                task.result()
                raise RuntimeError("the policy or the workers are not looked after any more")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        log.info("draining for up to %g s", settings.drain)


def leasing(settings: Settings, witness: Witness | None) -> Leasing | None:
    """How leases are held, None if they are not: a witness is to see every decision."""
    if witness is not None or not settings.lease_entries:
        return None
    return Leasing(envoy_file(leases.SCRIPT).read_text(), settings.lease_entries)


def _report(began: float, control: Control, keys: KeyStore, ads: Ads, total: Counts) -> dict[str, Any]:
    now = time.time()
    policy = dataclasses.asdict(control.status)
    policy["age_seconds"] = round(now - policy.pop("since"), 3)
    return {
        "version": __version__,
        "uptime_seconds": round(now - began, 3),
        "policy": policy,
        "envoy": {"connected": ads.connected, "acknowledged": ads.acknowledged, "last_error": ads.last_error},
        "keys": [dataclasses.asdict(k) for k in keys.status()],
        "decisions": {f"{verdict}/{reason}": n for verdict, reason, n in total.decisions},
        "rpc_errors": total.rpc_errors,
        "leases": {"on": control.lease is not None, "epoch": control.lease, "granted": total.leases},
    }


def _owner(began: float, epoch: Epoch, counts: Counts) -> dict[str, Any]:
    """This process as the first of the workers."""
    return {
        "worker": 0, "pid": os.getpid(), "age_seconds": round(time.time() - began, 3), "serving": True,
        "epoch": epoch.snapshot.epoch, "checks": counts.checks, "restarts": 0,
    }  # fmt: skip


def _families(control: Control, keys: KeyStore, ads: Ads) -> Iterator[Metric]:
    status = control.status
    yield InfoMetricFamily("srp_policy", "The policy in force.", value={"digest": status.digest})
    yield gauge("srp_policy_since_seconds", "When the policy came into force, in epoch seconds.", status.since)
    yield gauge("srp_policy_error", "1 while the newest policy file is refused.", float(status.error is not None))
    yield CounterMetricFamily("srp_policy_reloads", "Policies put in force after the first.", value=status.reloads)
    yield CounterMetricFamily("srp_policy_failures", "Policy files refused.", value=status.failures)
    yield gauge("srp_envoy_connected", "Envoys connected to ADS.", ads.connected)
    fetches = CounterMetricFamily("srp_key_fetches", "Fetches of an issuer's keys.", labels=["issuer"])
    failures = CounterMetricFamily("srp_key_failures", "Failed fetches of an issuer's keys.", labels=["issuer"])
    for key in keys.status():
        fetches.add_metric([key.issuer], key.fetches)
        failures.add_metric([key.issuer], key.failures)
    yield fetches
    yield failures


def _cache_families(total: Counts) -> Iterator[Metric]:
    entries = GaugeMetricFamily("srp_cache_entries", "What the epoch in force remembers.", labels=["cache"])
    hits = CounterMetricFamily("srp_cache_hits", "Found in the cache.", labels=["cache"])
    misses = CounterMetricFamily("srp_cache_misses", "Not found in the cache.", labels=["cache"])
    evictions = CounterMetricFamily("srp_cache_evictions", "Forgotten because the cache was full.", labels=["cache"])
    for name, use in total.caches.items():
        entries.add_metric([name], use.entries)
        hits.add_metric([name], use.hits)
        misses.add_metric([name], use.misses)
        evictions.add_metric([name], use.evictions)
    yield from (entries, hits, misses, evictions)
