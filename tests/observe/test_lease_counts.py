"""The lease counters that are fetched from Envoy, and what is shown when they cannot be."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from ext_authz.demo.ports import HOST, free_ports
from ext_authz.observe import lease_counts
from ext_authz.observe.lease_counts import CountsError, LeaseCounter, LeaseCounts, parse
from tests.harness.upstream import close


def page(**counts: Any) -> bytes:
    return json.dumps({"stats": [{"name": f"http.http.{k}", "value": v} for k, v in counts.items()]}).encode()


def test_a_missing_counter_is_0() -> None:
    """Envoy creates a counter with its first count. Histograms are ignored."""
    assert parse(b'{"stats": []}') == LeaseCounts()
    assert parse(page(**{"lua.lease.hits": 3, "ext_authz.disabled": 5})) == LeaseCounts(hits=3, repeated=5)
    assert parse(b'{"stats": [{"histograms": {}}]}') == LeaseCounts()


NO_PAGE = [
    b"",
    b"not found",
    b"\xff",
    b"[]",
    b"{}",
    b'{"stats": {}x',
    b'{"stats": [1]}',
    b'{"stats": 1}',
    b'{"stats": [{"name": 1, "value": 1}]}',
    b'{"stats": [{"name": "http.http.lua.lease.hits"}]}',
    page(**{"lua.lease.hits": "3"}),
    page(**{"lua.lease.hits": -1}),
    page(**{"lua.lease.hits": True}),
    b"[" * 60_000,
]


@pytest.mark.parametrize("body", NO_PAGE, ids=lambda b: repr(b[:40]))
def test_any_other_page_is_a_counts_error(body: bytes) -> None:
    """Whatever listens on that port."""
    with pytest.raises(CountsError):
        parse(body)


Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


async def refreshed(handler: Handler | None) -> LeaseCounter:
    """A counter that has just asked an Envoy with this handler; None: nothing listens there."""
    (port,) = free_ports(1)
    counter = LeaseCounter((HOST, port))
    server = web.Server(handler) if handler else None  # type: ignore[arg-type]
    if server is not None:
        listener = await asyncio.get_running_loop().create_server(server, HOST, port)
    await counter.refresh()
    if server is not None:
        await close(listener)
        await server.shutdown(0.1)
    return counter


async def good(request: web.BaseRequest) -> web.Response:
    assert (request.method, request.path) == ("GET", "/stats")
    return web.Response(body=page(**{"lua.lease.hits": 7}))


async def bad(_: web.BaseRequest) -> web.Response:
    return web.Response(status=503)


async def elsewhere(_: web.BaseRequest) -> web.Response:
    return web.Response(status=302, headers={"location": "/quitquitquit"})


async def long(_: web.BaseRequest) -> web.Response:
    return web.Response(body=b" " * (lease_counts.MAX_BYTES + 1))


async def silent(_: web.BaseRequest) -> web.Response:
    await asyncio.sleep(5)
    return web.Response()


async def broken(request: web.BaseRequest) -> web.Response:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


FAILURES: list[tuple[Handler | None, str]] = [
    (None, "cannot connect: "),
    (bad, "expected status 200, found 503"),
    (elsewhere, "expected status 200, found 302"),
    (long, "the response is over 65536 bytes"),
    (silent, "no response within 0.2 s"),
    (broken, "the request failed: ServerDisconnectedError"),
]


@pytest.mark.parametrize(("handler", "error"), FAILURES, ids=[e for _, e in FAILURES])
def test_a_failure_is_reported_without_counts(
    handler: Handler | None, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In time, and without counts that may be out of date."""
    monkeypatch.setattr(lease_counts, "TIMEOUT", 0.2)
    counter = asyncio.run(refreshed(handler))
    found = counter.report()
    assert found["envoy"] is None
    assert error in found["error"]
    assert [(f.name, f.samples[0].value) for f in counter.families()] == [("srp_lease_counts_error", 1)]


def test_counts_are_reported_as_envoy_has_them() -> None:
    """With one GET of one page."""
    counter = asyncio.run(refreshed(good))
    assert counter.report() == {
        "envoy": {"hits": 7, "misses": 0, "stores": 0, "evictions": 0, "errors": 0, "repeated": 0},
        "error": None,
    }
    assert {f.name: f.samples[0].value for f in counter.families()}["srp_lease_hits"] == 7


def test_without_an_address_no_request_is_made() -> None:
    """`--envoy-admin off`: the counts are unknown, without an error."""
    counter = LeaseCounter(None)
    asyncio.run(counter.refresh())
    assert counter.report() == {"envoy": None, "error": None}
    assert list(counter.families()) == []
