"""The HTTP side door, on loopback by default: /healthz, /metrics, /status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

Report = Callable[[], dict[str, Any]]
Fresh = Callable[[], Awaitable[None]]


class StatusListener:
    """Serves `report()` as JSON and `registry` as Prometheus text on `host:port` (port 0 picks one, see `port`).

    Before each it waits for `fresh`.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, report: Report, fresh: Fresh) -> None:
        self._host, self.port = host, port
        self._registry, self._report, self._fresh = registry, report, fresh
        app = web.Application(client_max_size=1024)
        app.add_routes(
            [
                web.get("/healthz", self._healthz),
                web.get("/metrics", self._metrics),
                web.get("/status", self._status),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self) -> None:
        """Listen; OSError if the address cannot be had."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        await self._fresh()
        return web.Response(body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _status(self, _: web.Request) -> web.Response:
        await self._fresh()
        return web.json_response(self._report())
