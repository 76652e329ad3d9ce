"""`srp serve`: the parts put together, started in order, stopped in reverse."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import uvloop
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from ext_authz import __version__, leases
from ext_authz.bootstrap import envoy_file
from ext_authz.check import MEMORIES, Memory, Snapshot
from ext_authz.keys import KeyStore
from ext_authz.lease_counts import LeaseCounter
from ext_authz.metrics import Tally, gauge, registry
from ext_authz.policy import Policy
from ext_authz.reload import Control, Leasing
from ext_authz.server import Authorization, Epoch, Server
from ext_authz.settings import Settings
from ext_authz.status import StatusListener
from ext_authz.witness import Witness
from ext_authz.xds import Ads

SWITCH = 0.0002  # seconds that a thread keeps the interpreter while another waits for it

log = logging.getLogger("srp")

_NOBODY = Epoch.of(Snapshot(Policy(tiers=("none",), experts={})))  # until the first policy: refuses everyone


class JsonLines(logging.Formatter):
    """One JSON object a record, on one line whatever the record holds."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{stamp}.{record.msecs:03.0f}Z", "level": record.levelname.lower(),
            "logger": record.name, "message": record.getMessage(),
        }  # fmt: skip
        if record.exc_info and record.exc_info[0]:
            entry["error"] = record.exc_info[0].__name__
        return json.dumps(entry)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. PolicyError or OSError if it cannot start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it tells of every change in the folder
    # At the default of 5 ms a thread that compiles a policy holds up checks, and a busy loop, which lets go of the
    # interpreter for a moment each round, never lets the log's writer have it.
    sys.setswitchinterval(SWITCH)
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    began = time.time()
    tally, ads = Tally(), Ads()
    async with AsyncExitStack() as stack:
        keys = KeyStore()
        stack.push_async_callback(keys.close)
        authorization = Authorization(_NOBODY, keys, tally)
        witness = authorization.witness = Witness.of(settings)
        if witness is not None:
            stack.push_async_callback(witness.close)
            witness.start()

        def install(epoch: Epoch) -> None:
            authorization.epoch = epoch
            if witness is not None:
                witness.beside(epoch.snapshot)

        memory = Memory(settings.cached_tokens, settings.cached_decisions)
        control = Control(settings.policy, keys, ads, install, leasing(settings, witness), memory)
        stack.push_async_callback(control.close)
        await control.start()

        counter = LeaseCounter(settings.envoy_admin)

        def report() -> dict[str, Any]:
            found = _report(began, control, keys, ads, tally) | (witness.report() if witness else {})
            found["leases"] |= counter.report()
            return found

        def families() -> Iterator[Metric]:
            yield from _families(control, keys, ads)
            yield from _memory_families(memory, authorization.epoch.snapshot)

        if settings.status is not None:
            sources = (tally.families, families, counter.families, *((witness.families,) if witness else ()))
            status = StatusListener(*settings.status, registry(*sources), report, counter.refresh)
            await status.start()
            stack.push_async_callback(status.stop)
            log.info("status on http://%s:%d", settings.status[0], status.port)
        handlers: tuple[grpc.GenericRpcHandler, ...] = (authorization.handlers(), ads.handlers())
        server = Server(settings.listen, *handlers, max_concurrent=settings.max_concurrent)
        await server.start()
        stack.push_async_callback(server.stop, settings.drain)
        stack.push_async_callback(ads.close)
        log.info("srp %s listens on %s", __version__, server.address)
        watching = asyncio.create_task(control.watch())
        try:
            stopped = asyncio.create_task(stopping.wait())
            await asyncio.wait({watching, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if watching.done():
                watching.result()
                raise RuntimeError("the policy is not watched any more")
        finally:
            for task in (watching, stopped):
                task.cancel()
            await asyncio.gather(watching, stopped, return_exceptions=True)
        log.info("draining for up to %g s", settings.drain)


def leasing(settings: Settings, witness: Witness | None) -> Leasing | None:
    """How leases are held, None if they are not: a witness is to see every decision."""
    if witness is not None or not settings.lease_entries:
        return None
    return Leasing(envoy_file(leases.SCRIPT).read_text(), settings.lease_entries)


def _report(began: float, control: Control, keys: KeyStore, ads: Ads, tally: Tally) -> dict[str, Any]:
    now = time.time()
    policy = dataclasses.asdict(control.status)
    policy["age_seconds"] = round(now - policy.pop("since"), 3)
    return {
        "version": __version__,
        "uptime_seconds": round(now - began, 3),
        "policy": policy,
        "envoy": {"connected": ads.connected, "acknowledged": ads.acknowledged, "last_error": ads.last_error},
        "keys": [dataclasses.asdict(k) for k in keys.status()],
        "decisions": {f"{verdict}/{reason}": n for (verdict, reason), n in sorted(tally.decisions.items())},
        "rpc_errors": tally.rpc_errors,
        "leases": {"on": control.lease is not None, "epoch": control.lease, "granted": tally.leases},
    }


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


def _memory_families(memory: Memory, snapshot: Snapshot) -> Iterator[Metric]:
    entries = GaugeMetricFamily("srp_cache_entries", "What the epoch in force remembers.", labels=["cache"])
    hits = CounterMetricFamily("srp_cache_hits", "Found in the cache.", labels=["cache"])
    misses = CounterMetricFamily("srp_cache_misses", "Not found in the cache.", labels=["cache"])
    evictions = CounterMetricFamily("srp_cache_evictions", "Forgotten because the cache was full.", labels=["cache"])
    for name in MEMORIES:
        uses = memory.uses[name]
        entries.add_metric([name], len(getattr(snapshot, name)))
        hits.add_metric([name], uses.hits)
        misses.add_metric([name], uses.misses)
        evictions.add_metric([name], uses.evictions)
    yield from (entries, hits, misses, evictions)
