"""An expert's endpoint in this process, which records every request it gets."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from aiohttp import web

from ext_authz.demo.ports import HOST


async def close(server: asyncio.Server) -> None:
    """Close a server, once every connection it has accepted is set up.

    asyncio never closes a connection that is still being accepted when its server closes: `Server._attach` fails.
    """
    for listener in server.sockets:
        asyncio.get_running_loop().remove_reader(listener.fileno())
    for _ in ("the transport is created", "the protocol is connected"):
        await asyncio.sleep(0)
    server.close()


@dataclass(eq=False)
class Upstream:
    """It answers with `status`, `headers` and its name. A request with `x-hold` waits for `release`."""

    name: str
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    seen: list[web.BaseRequest] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    held: int = 0
    health_delay: float = 0.0
    port: int = 0
    release: asyncio.Event = field(default_factory=asyncio.Event)
    _server: asyncio.Server | None = None

    async def start(self) -> Upstream:
        """Listen, on the same port as before if there was one."""
        self._web = web.Server(self._handle, access_log=None)
        self._server = await asyncio.get_running_loop().create_server(self._web, HOST, self.port, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Refuse new connections and cut the open ones."""
        if self._server is not None:
            await close(self._server)
            self._server = None
            await self._web.shutdown(timeout=0.01)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/healthz":
            await asyncio.sleep(self.health_delay)
            return web.Response(status=200)
        self.seen.append(request)
        self.bodies.append(await request.read())
        if "x-hold" in request.headers:
            self.held += 1
            try:
                await self.release.wait()
            finally:
                self.held -= 1
        return web.Response(status=self.status, headers=self.headers, text=self.name)
