"""Envoy's configuration over ADS, state of the world (Envoy's page "xDS REST and gRPC protocol").

Every Envoy that connects gets the resources in force, type by type in their order: the next type only when Envoy has
acknowledged the previous one. If one Envoy rejects an update, all Envoys get the previous resources back at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

import grpc
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest, DiscoveryResponse
from google.protobuf.message import DecodeError

from ext_authz.wire.twin import twins

SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"
MAX_TYPES = 16  # that one stream may ask for; Envoy asks for three
SETTLE_TIME = 0.1  # seconds that a new cluster gets for its first health check

_TWINS = twins(DiscoveryRequest, DiscoveryResponse)
_Request: Any = _TWINS[DiscoveryRequest]
_Response: Any = _TWINS[DiscoveryResponse]

log = logging.getLogger("srp.xds")


@dataclass(frozen=True, slots=True)
class Resources:
    """Everything that Envoy should have: serialised messages by type URL, in the order in which the types are sent.

    The same content has the same version.
    """

    types: Mapping[str, tuple[bytes, ...]]
    versions: Mapping[str, str]
    version: str

    @staticmethod
    def of(types: Mapping[str, tuple[bytes, ...]]) -> Resources:
        versions = {url: _digest(*messages) for url, messages in types.items()}
        return Resources(types, versions, _digest(*(text.encode() for pair in versions.items() for text in pair)))


class PublishResult(StrEnum):
    """How a publication ended."""

    ACKED = "acked"
    NACKED = "nacked"
    NO_ENVOY = "no_envoy"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class Publication:
    """`message` is for the log; for NACKED it is Envoy's own."""

    result: PublishResult
    message: str = ""


class Ads:
    """The ADS server's side of every stream.

    `acknowledged` is the last version that all connected Envoys had. `last_error` is why an Envoy rejected its
    resources, None again once newer ones are accepted. `on_change` is called when an Envoy answers, connects or
    disconnects. `fixed` are types that never change, and that every Envoy gets before the published ones.
    """

    def __init__(
        self, settle: float = SETTLE_TIME, fixed: Mapping[str, tuple[bytes, ...]] = MappingProxyType({})
    ) -> None:
        self._settle = settle
        self._fixed = fixed
        self._current: Resources | None = None
        self._restored: str | None = None  # the version restored after a NACK; its ACK does not clear the error
        self._streams: set[_Stream] = set()
        self._publishing = asyncio.Lock()
        self._progress = asyncio.Event()
        self._closed = False
        self.on_change: Callable[[], None] = lambda: None
        self.acknowledged: str | None = None
        self.last_error: str | None = None

    @property
    def connected(self) -> int:
        """Envoys with an open stream."""
        return len(self._streams)

    @property
    def refused(self) -> str | None:
        """Why an Envoy has refused the resources in force; None if none has."""
        if self._current is None:
            return None
        return next((error for s in self._streams if (error := s.refused(self._current))), None)

    @property
    def settled(self) -> bool:
        """Whether an Envoy is connected, and every one that is has acknowledged the resources in force."""
        return self._current is not None and bool(self._streams) and all(s.has(self._current) for s in self._streams)

    def agreed(self, url: str) -> str | None:
        """The version of this type that all Envoys asking for it have acknowledged; None if there is no single one.

        An Envoy that has left a push unanswered for its whole timeout does not count until it answers again.
        """
        versions = {s.acked(url) for s in self._streams if s.asks_for(url) and not s.late}
        return versions.pop() if len(versions) == 1 else None

    async def publish(
        self,
        resources: Resources,
        timeout: float = 2.0,  # noqa: ASYNC109 - not raised
        restoring: bool = False,
    ) -> Publication:
        """Send `resources` to the connected Envoys and wait, at most `timeout` seconds, until all of them have it.

        They are in force from now on, also for Envoys that connect later. NACKED puts the previous ones back in force.
        `restoring`: they were in force before those that Envoy has rejected, so their ACK does not clear the error.
        """
        if self._fixed:
            resources = Resources.of({**self._fixed, **resources.types})
        async with self._publishing:
            before, self._current = self._current, resources
            if restoring:
                self._restored = resources.version
            self._wake()
            try:
                published = await asyncio.wait_for(self._verdict(resources), timeout)
            except TimeoutError:
                for stream in self._streams:
                    stream.late = not stream.has(resources)
                self.on_change()
                return Publication(PublishResult.TIMEOUT, f"envoy has not answered for {timeout:g} s")
            if published.result is PublishResult.NACKED:
                self._current = before
                self._restored = before.version if before else None
                self._wake()
            elif (
                published.result is PublishResult.ACKED
                and before
                and self._clusters(before) != self._clusters(resources)
            ):
                # An ACK says that the main thread has accepted. A new cluster takes requests after its first health
                # check, and no message reports that; a healthy expert answers it within milliseconds.
                await asyncio.sleep(self._settle)
            return published

    def handlers(self) -> grpc.GenericRpcHandler:
        """StreamAggregatedResources as a handler on bytes."""
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        return grpc.method_handlers_generic_handler(SERVICE, {"StreamAggregatedResources": method})

    async def close(self) -> None:
        """End the streams, so that a server that stops does not wait for them."""
        self._closed = True
        self._wake()

    async def _verdict(self, resources: Resources) -> Publication:
        while self._streams:
            if error := next((e for s in self._streams if (e := s.refused(resources))), None):
                return Publication(PublishResult.NACKED, error)
            waiting = [s for s in self._streams if not s.late]
            if not waiting:
                return Publication(PublishResult.TIMEOUT, "no connected envoy answers")
            if all(s.has(resources) for s in waiting):
                return Publication(PublishResult.ACKED)
            self._progress.clear()
            await self._progress.wait()
        return Publication(PublishResult.NO_ENVOY, "no envoy is connected")

    async def _serve(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        stream = _Stream()
        self._streams.add(stream)
        log.info("an envoy connected, %d in all", len(self._streams))
        reader = asyncio.create_task(self._read(stream, requests))
        try:
            while not (self._closed or reader.done()):
                # Looked up for each response, so that a slow Envoy does not get outdated resources.
                response = stream.due(self._current) if self._current else None
                if response is not None:
                    await context.write(response)
                else:
                    stream.wake.clear()
                    await stream.wake.wait()
        finally:
            self._streams.discard(stream)
            self._progress.set()
            self.on_change()
            log.info("an envoy disconnected, %d left", len(self._streams))
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, stream: _Stream, requests: AsyncIterator[bytes]) -> None:
        try:
            async for data in requests:
                error = stream.receive(_Request.FromString(data))
                stream.late = stream.late and not (self._current and stream.has(self._current))
                self._received(error)
                stream.wake.set()
        except (DecodeError, ValueError) as e:
            log.warning("ending a stream: %s", e)
        finally:
            stream.wake.set()

    def _received(self, error: str | None) -> None:
        self._progress.set()
        if error is not None:
            self.last_error = error
            log.error("envoy refused its configuration: %s", error)
        elif self._current and all(s.has(self._current) for s in self._streams):
            self.acknowledged = self._current.version
            if self.acknowledged != self._restored:
                self.last_error = self._restored = None
        self.on_change()

    def _clusters(self, resources: Resources) -> str | None:
        """The version of the first published type, clusters: only they take time to become usable after their ACK."""
        return next((v for url, v in resources.versions.items() if url not in self._fixed), None)

    def _wake(self) -> None:
        for stream in self._streams:
            stream.wake.set()


@dataclass(slots=True)
class _Subscription:
    """One type on one stream: what Envoy asks for, what it was sent last, and how it answered."""

    names: tuple[str, ...]
    nonce: str = ""
    sent: str | None = None
    acked: str | None = None
    error: str | None = None


@dataclass(slots=True, eq=False)
class _Stream:
    """One Envoy's stream: requests in, the next response out. `wake` is set when there may be one.

    `late`: it has left a push unanswered for its whole timeout, so the next one does not wait for it.
    """

    wake: asyncio.Event = field(default_factory=asyncio.Event)
    late: bool = False
    _types: dict[str, _Subscription] = field(default_factory=dict)
    _nonce: int = 0

    def receive(self, request: Any) -> str | None:
        """Process a request; Envoy's reason if it is a NACK."""
        names = tuple(request.resource_names)
        subscription = self._types.get(request.type_url)
        if subscription is None:
            # The first request for its type. A version in it comes from another stream. Everything is sent again, which
            # costs nothing: Envoy compares by content.
            if len(self._types) == MAX_TYPES:
                raise ValueError("it asks for too many types")
            self._types[request.type_url] = _Subscription(names)
        elif request.response_nonce != subscription.nonce:
            pass  # about a response that has been superseded
        elif request.HasField("error_detail"):
            subscription.error = request.error_detail.message or "no reason given"
            return subscription.error
        else:
            subscription.acked = subscription.sent
            if names != subscription.names:
                subscription.names, subscription.sent = names, None
        return None

    def asks_for(self, url: str) -> bool:
        return url in self._types

    def acked(self, url: str) -> str | None:
        """The version of this type that Envoy has acknowledged; None if a newer one has been sent since."""
        subscription = self._types[url]
        return subscription.acked if subscription.acked == subscription.sent else None

    def due(self, resources: Resources) -> bytes | None:
        """The next response to send, serialised; None if there is nothing to send or an answer is pending."""
        for url, subscription in self._subscribed(resources):
            version = resources.versions[url]
            if subscription.sent != version:
                self._nonce += 1
                nonce = str(self._nonce)
                subscription.nonce, subscription.sent = nonce, version
                subscription.acked = subscription.error = None  # also if Envoy has had this version before
                messages = [{"type_url": url, "value": m} for m in resources.types[url]]
                response = _Response(version_info=version, type_url=url, nonce=nonce, resources=messages)
                return bytes(response.SerializeToString())
            if subscription.acked != version:
                return None
        return None

    def has(self, resources: Resources) -> bool:
        """Whether Envoy has acknowledged everything that it asked for."""
        subscribed = self._subscribed(resources)
        return bool(subscribed) and all(s.sent == s.acked == resources.versions[url] for url, s in subscribed)

    def refused(self, resources: Resources) -> str | None:
        """Why Envoy rejected one of `resources`, if it did."""
        for url, subscription in self._subscribed(resources):
            if subscription.error is not None and subscription.sent == resources.versions[url]:
                return subscription.error
        return None

    def _subscribed(self, resources: Resources) -> list[tuple[str, _Subscription]]:
        return [(url, self._types[url]) for url in resources.types if url in self._types]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
