"""`srp serve`: builds the parts of the server, starts them in order and stops them in reverse."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

import uvloop

from ext_authz import __version__
from ext_authz.core.snapshot import CacheSizes
from ext_authz.observe import log_lines
from ext_authz.observe.lease_counts import LeaseCounter
from ext_authz.observe.metrics import Tally, registry
from ext_authz.observe.status import StatusListener
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.control import Control, Leasing
from ext_authz.serve.epoch import NO_POLICY, Epoch
from ext_authz.serve.report import Report
from ext_authz.serve.scheduling import set_scheduling
from ext_authz.serve.server import Server
from ext_authz.serve.witness import Witness
from ext_authz.serve.workers import Workers, sockets
from ext_authz.settings import Settings
from ext_authz.sources.keys import KeyStore
from ext_authz.wire import lease_filter
from ext_authz.wire.ads import Ads
from ext_authz.wire.bootstrap import envoy_file
from ext_authz.wire.worker_endpoints import worker_endpoints

log = logging.getLogger("srp")


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. PolicyError or OSError if the server cannot start."""
    log_lines.start(settings.log_level)
    set_scheduling()
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    async with AsyncExitStack() as stack:
        app = _App(settings, time.time())
        await app.decide(stack)
        await app.report(stack)
        await app.listen(stack)
        # Neither returns on its own: the first reloads the policy, the second replaces workers.
        await _run_until(stopping, app.control.watch(), app.workers.ended())
        log.info("draining for up to %g s", settings.drain)


class _App:
    """The parts of one server. Each method starts some of them and pushes their cleanup onto the stack."""

    def __init__(self, settings: Settings, began: float) -> None:
        self._settings, self._began = settings, began
        self._tally, self._caches = Tally(), CacheSizes(settings.cached_tokens, settings.cached_decisions)
        self._keys = KeyStore()
        self._ads = Ads(fixed=worker_endpoints(sockets(settings)))
        self._authorization = Authorization(NO_POLICY, self._keys, self._tally)
        self._witness = self._authorization.witness = Witness.of(settings)
        self.workers = Workers(settings, self._keys.refresh)
        self.control = Control(
            settings.policy, self._keys, self._ads, self._install, leasing(settings, self._witness), self._caches,
            self.workers,
        )  # fmt: skip

    def _install(self, epoch: Epoch) -> None:
        self._authorization.epoch = epoch
        self.workers.install(epoch)
        if self._witness is not None:
            self._witness.set_active(epoch.snapshot)

    async def decide(self, stack: AsyncExitStack) -> None:
        """Put the policy into force, here and in the workers."""
        stack.push_async_callback(self._keys.close)
        if self._witness is not None:
            stack.push_async_callback(self._witness.close)
            self._witness.start()
        stack.push_async_callback(self.control.close)
        stack.push_async_callback(self.workers.stop, 0.0)
        self.workers.start()
        await self.control.start()
        gc.collect()
        gc.freeze()  # what exists now is long-lived: later collections need not traverse it

    async def report(self, stack: AsyncExitStack) -> None:
        """Start the HTTP status listener, if it is enabled."""
        if self._settings.status is None:
            return
        counter = LeaseCounter(self._settings.envoy_admin)
        report = Report(
            self._began, self._tally, self._caches, self._authorization, self.control, self._keys, self._ads,
            self.workers, counter, self._witness,
        )  # fmt: skip
        status = StatusListener(*self._settings.status, registry(report.families), report.status, report.refresh)
        await status.start()
        stack.push_async_callback(status.stop)
        log.info("status on http://%s:%d", self._settings.status[0], status.port)

    async def listen(self, stack: AsyncExitStack) -> None:
        """Accept checks, and ADS streams from Envoys."""
        settings = self._settings
        handlers = self._authorization.handlers(), self._ads.handlers()
        server = Server(settings.listen, *handlers, max_concurrent=settings.max_concurrent)
        await server.start()

        async def stop() -> None:
            await asyncio.gather(server.stop(settings.drain), self.workers.stop(settings.drain))

        stack.push_async_callback(stop)
        stack.push_async_callback(self._ads.close)
        log.info("srp %s listens on %s", __version__, server.address)


async def _run_until(stopping: asyncio.Event, *forever: Coroutine[Any, Any, None]) -> None:
    """Run the `forever` coroutines until `stopping` is set. If one ends first: what it raised, or RuntimeError."""
    stopped: asyncio.Task[Any] = asyncio.create_task(stopping.wait())
    tasks: list[asyncio.Task[Any]] = [asyncio.create_task(work) for work in forever]
    try:
        done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task in done:
                task.result()
                raise RuntimeError("the policy file or the workers are no longer supervised")
    finally:
        for task in (stopped, *tasks):
            task.cancel()
        await asyncio.gather(stopped, *tasks, return_exceptions=True)


def leasing(settings: Settings, witness: Witness | None) -> Leasing | None:
    """The lease configuration, None if leases are off. They are off with a witness, which must see every decision."""
    if witness is not None or not settings.lease_entries:
        return None
    return Leasing(envoy_file(lease_filter.SCRIPT).read_text(), settings.lease_entries)
