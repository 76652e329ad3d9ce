"""The gRPC server: one socket, its handlers, and the health service."""

from __future__ import annotations

import asyncio
import os
import socket as sockets
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ext_authz.serve.authorization import SERVICE
from ext_authz.settings import DRAIN, MAX_CONCURRENT, MAX_PATH

MAX_MESSAGE = 1 << 20  # bytes; Envoy sends at most 64 KiB of body and 60 KiB of headers


class Server:
    """A grpc.aio server on `listen`: `unix:PATH` (mode 0660) or HOST:PORT (with port 0, `address` has the real one)."""

    def __init__(self, listen: str, *handlers: grpc.GenericRpcHandler, max_concurrent: int = MAX_CONCURRENT) -> None:
        self._listen = listen
        self._grpc = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.so_reuseport", 0),
                ("grpc.max_concurrent_streams", max_concurrent + 16),
            ],
            maximum_concurrent_rpcs=max_concurrent,
        )
        self._grpc.add_generic_rpc_handlers(handlers)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        self.address = listen

    async def start(self) -> None:
        """Listen and report SERVING. OSError if it cannot listen on the address."""
        path = unix_path(self._listen)
        if path is not None:
            await asyncio.to_thread(_clear_stale, path)
            # The umask sets the mode at creation, so only the owner and the group can ever connect.
            mask = os.umask(0o117)
        try:
            port = self._grpc.add_insecure_port(self._listen)
            await self._grpc.start()
        except RuntimeError as e:
            raise OSError(f"cannot listen on {self._listen}: {e}") from None
        finally:
            if path is not None:
                os.umask(mask)
        if path is None:
            self.address = f"{self._listen.rpartition(':')[0]}:{port}"
        await self._report(health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace: float = DRAIN) -> None:
        """Report NOT_SERVING, let running calls finish for up to `grace` seconds, then close.

        gRPC removes its socket at the start.
        """
        await self._report(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._grpc.stop(grace)

    async def _report(self, status: Any) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)


def unix_path(listen: str) -> Path | None:
    """The path of a `unix:` address; None for any other."""
    return Path(listen.removeprefix("unix:")) if listen.startswith("unix:") else None


def _clear_stale(path: Path) -> None:
    """Remove a socket that no process listens on. OSError if one does, or if the path is not a socket."""
    if not path.parent.is_dir():
        raise OSError(f"cannot listen on {path}: its folder does not exist")
    if len(os.fsencode(path)) > MAX_PATH:
        raise OSError(f"cannot listen on {path}: a socket's path is at most {MAX_PATH} bytes")
    if not path.exists():
        return
    if not path.is_socket():
        raise OSError(f"cannot listen on {path}: it exists and is not a socket")
    with sockets.socket(sockets.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
    raise OSError(f"cannot listen on {path}: another server is using it")
