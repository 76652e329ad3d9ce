"""Envoy's counts of leases, read from its admin interface on demand only.

The filter's counters restart with each epoch, as its tables do. Only Envoy's own count of the requests for which
ext_authz was disabled lasts from Envoy's start.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from prometheus_client.core import CounterMetricFamily, Metric
from yarl import URL

from ext_authz.observe.metrics import gauge
from ext_authz.sources.http import body_of, session_for

TIMEOUT = 1.0  # seconds
MAX_BYTES = 64 * 1024
PREFIX = "http.http."  # the connection manager's `stat_prefix` in envoy.yaml
FILTER = f"^{PREFIX}(lua.lease.(hits|misses|stores|evictions|errors)|ext_authz.disabled)$".replace(".", "[.]")


class CountsError(Exception):
    """Envoy's counters could not be read; the text is for people."""


@dataclass(frozen=True, slots=True)
class LeaseCounts:
    """Script `errors` and `repeated` requests since Envoy's start; the others since the epoch began."""

    hits: int = 0
    misses: int = 0
    stores: int = 0
    evictions: int = 0
    errors: int = 0
    repeated: int = 0


async def fetch(admin: tuple[str, int]) -> LeaseCounts:
    """The counts of the Envoy with its admin interface at `admin`. CountsError if it does not answer in TIMEOUT s."""
    try:
        url = URL.build(scheme="http", host=admin[0], port=admin[1], path="/stats")
    except ValueError:
        raise CountsError("not an address") from None
    url = url.with_query(format="json", filter=FILTER)
    try:
        async with (
            session_for(TIMEOUT) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise CountsError(f"expected status 200, found {response.status}")
            body = await body_of(response, MAX_BYTES)
            if body is None:
                raise CountsError(f"the response is over {MAX_BYTES} bytes")
    except TimeoutError:
        raise CountsError(f"no response within {TIMEOUT:g} s") from None
    except aiohttp.ClientConnectorError as e:
        raise CountsError(f"cannot connect: {e.os_error.strerror or e.os_error}") from None
    except aiohttp.ClientError as e:
        raise CountsError(f"the request failed: {type(e).__name__}") from None
    return parse(body)


def parse(body: bytes) -> LeaseCounts:
    """Counts from the page `/stats?format=json`; 0 for counters that do not exist yet. CountsError for other pages."""
    try:
        stats = json.loads(body)["stats"]
        found: dict[str, Any] = {s["name"].removeprefix(PREFIX): s["value"] for s in stats if "name" in s}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CountsError("the response is not a statistics page") from None
    if not all(type(n) is int and n >= 0 for n in found.values()):
        raise CountsError("the response has a value that is not a count")
    names = ("hits", "misses", "stores", "evictions", "errors")
    own = {name: found.get(f"lua.lease.{name}", 0) for name in names}
    return LeaseCounts(**own, repeated=found.get("ext_authz.disabled", 0))


class LeaseCounter:
    """The newest counts, for `/status` and `/metrics`. If `admin` is None, they are always unknown."""

    def __init__(self, admin: tuple[str, int] | None) -> None:
        self._admin = admin
        self._counts: LeaseCounts | None = None
        self._error: str | None = None

    async def refresh(self) -> None:
        """Read them again. Never raises: `report` and `families` show a failure."""
        if self._admin is None:
            return
        try:
            self._counts, self._error = await fetch(self._admin), None
        except CountsError as e:
            self._counts, self._error = None, f"envoy's counters on {self._admin[0]}:{self._admin[1]}: {e}"

    def report(self) -> dict[str, Any]:
        """Envoy's part of `leases` in `/status`. `envoy` is None while the counts are unknown; `error` says why."""
        return {"envoy": dataclasses.asdict(self._counts) if self._counts else None, "error": self._error}

    def families(self) -> Iterator[Metric]:
        """The counts as Prometheus metric families, without the counts while they are unknown."""
        if self._admin is None:
            return
        yield gauge("srp_lease_counts_error", "1 while Envoy's counts cannot be read.", float(self._counts is None))
        if self._counts is not None:
            for name, text in _TEXTS.items():
                yield CounterMetricFamily(f"srp_lease_{name}", text, value=getattr(self._counts, name))


_TEXTS = {
    "hits": "Requests answered by a lease, since the epoch began.",
    "misses": "Requests that could have used a lease but had none, since the epoch began.",
    "stores": "Leases stored by Envoy, since the epoch began.",
    "evictions": "Leases evicted by Envoy because its table was full, since the epoch began.",
    "errors": "Errors of the lease filter's script, since Envoy's start.",
    "repeated": "Requests answered by a lease, since Envoy's start.",
}
