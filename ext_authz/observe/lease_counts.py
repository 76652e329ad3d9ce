"""What Envoy counts of leases, read from its admin interface when somebody asks for it, and at no other time.

The filter's counters begin anew with each epoch, as its tables do. What lasts as long as Envoy is ext_authz's own count
of the requests for which it was switched off.
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
    """Envoy's counters could not be had; the text is for people."""


@dataclass(frozen=True, slots=True)
class LeaseCounts:
    """`errors` of the script and `repeated` requests since Envoy's start; all else since the epoch began."""

    hits: int = 0
    misses: int = 0
    stores: int = 0
    evictions: int = 0
    errors: int = 0
    repeated: int = 0


async def fetch(admin: tuple[str, int]) -> LeaseCounts:
    """The counts of the Envoy whose admin interface is at `admin`. CountsError if they cannot be had in time."""
    try:
        url = URL.build(scheme="http", host=admin[0], port=admin[1], path="/stats")
    except ValueError:
        raise CountsError("not an address") from None
    asked = url.with_query(format="json", filter=FILTER)
    try:
        async with (
            session_for(TIMEOUT) as session,
            session.get(asked, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise CountsError(f"expected status 200, found {response.status}")
            body = await body_of(response, MAX_BYTES)
            if body is None:
                raise CountsError(f"the answer holds over {MAX_BYTES} bytes")
    except TimeoutError:
        raise CountsError(f"no answer within {TIMEOUT:g} s") from None
    except aiohttp.ClientConnectorError as e:
        raise CountsError(f"cannot connect: {e.os_error.strerror or e.os_error}") from None
    except aiohttp.ClientError as e:
        raise CountsError(f"the exchange failed: {type(e).__name__}") from None
    return parse(body)


def parse(body: bytes) -> LeaseCounts:
    """Counts from the page `/stats?format=json`; 0 for what has not been counted yet. CountsError if it is another."""
    try:
        stats = json.loads(body)["stats"]
        found: dict[str, Any] = {s["name"].removeprefix(PREFIX): s["value"] for s in stats if "name" in s}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CountsError("the answer is not a page of statistics") from None
    if not all(type(n) is int and n >= 0 for n in found.values()):
        raise CountsError("the answer holds what is no count")
    names = ("hits", "misses", "stores", "evictions", "errors")
    own = {name: found.get(f"lua.lease.{name}", 0) for name in names}
    return LeaseCounts(**own, repeated=found.get("ext_authz.disabled", 0))


class LeaseCounter:
    """The newest counts, for `/status` and `/metrics`. `admin` None: there are none to be had."""

    def __init__(self, admin: tuple[str, int] | None) -> None:
        self._admin = admin
        self._counts: LeaseCounts | None = None
        self._error: str | None = None

    async def refresh(self) -> None:
        """Read them again. Never raises: why they could not be had is told by `report` and `families`."""
        if self._admin is None:
            return
        try:
            self._counts, self._error = await fetch(self._admin), None
        except CountsError as e:
            self._counts, self._error = None, f"envoy's counters on {self._admin[0]}:{self._admin[1]}: {e}"

    def report(self) -> dict[str, Any]:
        """What `/status` tells under `leases`: `envoy` None while the counts are unknown, and why if it is known."""
        return {"envoy": dataclasses.asdict(self._counts) if self._counts else None, "error": self._error}

    def families(self) -> Iterator[Metric]:
        """The same as Prometheus metric families; none of the counts while they are unknown."""
        if self._admin is None:
            return
        yield gauge("srp_lease_counts_error", "1 while Envoy's counts cannot be read.", float(self._counts is None))
        if self._counts is not None:
            for name, text in _TEXTS.items():
                yield CounterMetricFamily(f"srp_lease_{name}", text, value=getattr(self._counts, name))


_TEXTS = {
    "hits": "Requests answered by a lease, since the epoch began.",
    "misses": "Requests that could have had a lease and had none, since the epoch began.",
    "stores": "Leases kept by Envoy, since the epoch began.",
    "evictions": "Leases dropped by Envoy for want of room, since the epoch began.",
    "errors": "Failures of the lease filter's script, since Envoy's start.",
    "repeated": "Requests answered by a lease, since Envoy's start.",
}
