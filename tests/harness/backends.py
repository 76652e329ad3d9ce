"""Endpoints of experts on this event loop, which take any request, and two that no connection reaches."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence

from ext_authz.demo.ports import HOST

REFUSING = "refusing"  # connections are refused
HANGING = "hanging"  # connections are never accepted: the listener's backlog is full

Arrived = Callable[[str, str], Awaitable[int]]


class Backends:
    """`arrived` gets a backend's name and a request's `baggage`, a header that no decision reads.

    It returns the status to answer with; 0: the connection is closed instead.
    """

    def __init__(self, names: Sequence[str], arrived: Arrived) -> None:
        self._names = names
        self._arrived = arrived
        self._ports: dict[str, int] = {}
        self._servers: list[asyncio.Server] = []
        self._sockets: list[socket.socket] = []
        self._connections: set[asyncio.StreamWriter] = set()

    def address(self, name: str) -> str:
        return f"{HOST}:{self._ports[name]}"

    async def start(self) -> None:
        for name in self._names:
            self._ports[name] = self._reserve(name) if name in (REFUSING, HANGING) else await self._listen(name)

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for writer in self._connections:
            writer.transport.abort()
        for held in self._sockets:
            held.close()
        while self._connections:
            await asyncio.sleep(0.01)

    async def _listen(self, name: str) -> int:
        server = await asyncio.start_server(lambda reader, writer: self._serve(name, reader, writer), HOST, 0)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    def _reserve(self, name: str) -> int:
        bound = socket.socket()
        bound.bind((HOST, 0))
        self._sockets.append(bound)
        if name == HANGING:
            bound.listen(0)
            for _ in range(4):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(bound.getsockname())
                self._sockets.append(filler)
        return int(bound.getsockname()[1])

    async def _serve(self, name: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                await reader.readexactly(int(_header(head, "content-length") or 0))
                status = await self._arrived(name, _header(head, "baggage"))
                if not status:
                    return
                writer.write(f"HTTP/1.1 {status} -\r\ncontent-length: 0\r\n\r\n".encode())
        except (OSError, asyncio.IncompleteReadError):
            pass  # the other side has closed the connection
        finally:
            self._connections.discard(writer)
            writer.close()


def _header(head: str, name: str) -> str:
    found = re.search(rf"^{name}: (.*)\r$", head, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else ""
