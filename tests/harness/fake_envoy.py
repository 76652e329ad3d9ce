"""The Envoy side of an ADS stream, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest, DiscoveryResponse
from envoy_data_plane.google.rpc import Status

from ext_authz.wire.ads import SERVICE


class FakeEnvoy:
    """One ADS stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = channel.stream_stream(f"/{SERVICE}/StreamAggregatedResources")()

    async def ask(self, url: str, *, version: str = "", nonce: str = "", names: Sequence[str] = ()) -> None:
        request = DiscoveryRequest(type_url=url, version_info=version, response_nonce=nonce, resource_names=[*names])
        await self._call.write(bytes(request))

    async def read(self, seconds: float = 2) -> DiscoveryResponse:
        data = await asyncio.wait_for(self._call.read(), seconds)
        assert data is not grpc.aio.EOF
        return DiscoveryResponse.parse(data)

    async def ack(self, response: DiscoveryResponse, names: Sequence[str] = ()) -> None:
        await self.ask(response.type_url, version=response.version_info, nonce=response.nonce, names=names)

    async def nack(self, response: DiscoveryResponse, why: str, version: str = "") -> None:
        request = DiscoveryRequest(type_url=response.type_url, version_info=version, response_nonce=response.nonce)
        request.error_detail = Status(code=13, message=why)
        await self._call.write(bytes(request))

    async def silent(self) -> bool:
        """Whether nothing arrives. This ends the stream, so it must be a test's last step."""
        task = asyncio.ensure_future(self._call.read())
        done, _ = await asyncio.wait({task}, timeout=0.1)
        if done:
            return False
        task.cancel()
        return True

    def leave(self) -> None:
        self._call.cancel()
