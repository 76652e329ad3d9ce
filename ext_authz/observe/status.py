"""The HTTP status listener, on loopback by default: /healthz, /metrics, /status."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

Report = Callable[[], dict[str, Any]]
Refresh = Callable[[], Awaitable[None]]


class StatusListener:
    """Serves `report()` as JSON and `registry` as Prometheus text on `host:port`. Awaits `refresh()` before either.

    With port 0, `port` has the real one after `start`.
    """

    def __init__(self, host: str, port: int, registry: CollectorRegistry, report: Report, refresh: Refresh) -> None:
        self._host, self.port = host, port
        self._registry, self._report, self._refresh = registry, report, refresh
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
        """Listen. OSError if it cannot listen on the address."""
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        await self._refresh()
        return web.Response(body=generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def _status(self, _: web.Request) -> web.Response:
        await self._refresh()
        return web.json_response(self._report())
