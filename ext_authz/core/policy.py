"""The compiled policy: plain immutable data, checked and resolved by `policyfile`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType
from typing import Literal

from ext_authz.core.cache import Cache
from ext_authz.core.condition import Condition
from ext_authz.core.model import Claims

LEEWAY = 30.0  # seconds that an issuer's clock may be off
LEASE = 30.0  # seconds for which Envoy may repeat a decision
CACHED_TIERS = 1024  # sets of claims


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One replica set's address. `host` is an IP address or a DNS name."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Health:
    """Active health check: GET `path` every `interval` seconds."""

    path: str = "/healthz"
    interval: float = 5.0


@dataclass(frozen=True, slots=True)
class Outlier:
    """Passive ejection after `consecutive_5xx` gateway failures, for `base_ejection` seconds."""

    consecutive_5xx: int = 5
    base_ejection: float = 10.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """How Envoy sends requests to one expert. Times in seconds; `timeout` 0 means none."""

    max_requests: int = 1024
    max_pending: int = 1024
    timeout: float = 60.0
    connect_timeout: float = 1.0
    retries: int = 3
    retry_on: Literal["safe", "5xx"] = "safe"
    health: Health | None = Health()
    outlier: Outlier | None = Outlier()
    slow_start: float = 0.0


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert. `tier` indexes `Policy.tiers`; `line` is where the policy defines it; `lease` as in `Policy`.

    With `unavailable` `downgrade`, the experts in `downgrade_to` may also serve when it is down or full.
    """

    name: str
    tier: int
    cluster: str
    endpoints: tuple[Endpoint, ...] = ()
    weight: int = 1
    downgrade_to: tuple[str, ...] = ()
    allow: Condition | None = None
    traffic: Traffic = Traffic()
    line: int = 0
    lease: float | None = None
    unavailable: str = "refuse"


@dataclass(frozen=True, slots=True)
class ClearanceRule:
    """Callers whose claims satisfy `when` get `tier`."""

    when: Condition
    tier: int


@dataclass(frozen=True, slots=True)
class Body:
    """A gate that reads a member of the request's JSON body. `pointer` holds its reference tokens (RFC 6901 §4)."""

    pointer: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """A gate that reads a header of the request; `name` is in lower case."""

    name: str


@dataclass(frozen=True, slots=True)
class DefaultOnly:
    """A gate that reads nothing: its requests always ask for the default."""


Source = Body | Header | DefaultOnly


@dataclass(frozen=True, slots=True)
class GateRule:
    """Where requests to a path name their experts. `default` None: a request must name them itself."""

    match: str
    exact: bool
    source: Source
    default: tuple[str, ...] | None = None
    line: int = 0

    def covers(self, path: str) -> bool:
        return path == self.match if self.exact else path.startswith(self.match)


@dataclass(frozen=True, slots=True)
class JwksSource:
    """Where an issuer's public keys come from: a file, or a URL fetched again every `refresh` seconds.

    `ca_file` and `bearer_token_file` are for a JWKS endpoint inside a cluster.
    """

    file: str | None = None
    url: str | None = None
    refresh: float = 300.0
    ca_file: str | None = None
    bearer_token_file: str | None = None


@dataclass(frozen=True, slots=True)
class Issuer:
    """An identity provider that the policy trusts, and the only algorithms its tokens may use."""

    issuer: str
    audiences: frozenset[str]
    algorithms: frozenset[str]
    jwks: JwksSource | None = None
    secret_file: str | None = None


@dataclass(frozen=True, slots=True)
class Revoked:
    """Tokens that are refused although they verify. `issued_before` is in seconds since the epoch."""

    jti: frozenset[str] = frozenset()
    sub: frozenset[str] = frozenset()
    issued_before: float | None = None

    def covers(self, claims: Claims) -> bool:
        """Whether a token with these claims is revoked. One without a time of issue counts as issued too early."""
        jti, sub, iat = claims.get("jti"), claims.get("sub"), claims.get("iat")
        if (isinstance(jti, str) and jti in self.jti) or (isinstance(sub, str) and sub in self.sub):
            return True
        return self.issued_before is not None and not (isinstance(iat, int | float) and iat >= self.issued_before)


@dataclass(frozen=True, slots=True)
class Policy:
    """The whole policy, compiled and immutable. `digest` identifies its text; `anonymous` None: a token is required.

    `leeway` is in seconds. `forward_token` passes the caller's token on to the experts. `lease` is how many seconds
    Envoy may repeat a decision, 0: not at all; an expert's own `lease` overrides it.
    `claims_read` are the claims that conditions may read, `headers_read` the request's headers; None: any.
    `max_entries` is how many elements and members those claims may have together; None: no condition has a macro.
    `tiers_cached` caches the result of `clearance` by the text of those claims. The result depends on nothing else but
    the policy, so an entry never goes stale.
    """

    tiers: tuple[str, ...]
    experts: Mapping[str, Expert]
    issuers: Mapping[str, Issuer] = field(default_factory=dict)
    anonymous: int | None = None
    clearance: tuple[ClearanceRule, ...] = ()
    gate: tuple[GateRule, ...] = ()
    revoked: Revoked = Revoked()
    leeway: float = LEEWAY
    forward_token: bool = False
    log_claims: tuple[str, ...] = ()
    digest: str = ""
    clusters: Mapping[str, str] = field(default_factory=dict)
    reads_request: bool = False
    claims_read: frozenset[str] | None = None
    headers_read: frozenset[str] | None = frozenset()
    max_entries: int | None = None
    lease: float = LEASE
    tiers_cached: Cache[str, tuple[int, tuple[str, ...]]] = field(
        default_factory=lambda: Cache(CACHED_TIERS), compare=False, repr=False
    )
    envoy_clusters: Mapping[str, str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        names = {expert.name: _envoy_cluster(self, expert) for expert in self.experts.values()}
        object.__setattr__(self, "envoy_clusters", MappingProxyType(names))


def _envoy_cluster(policy: Policy, expert: Expert) -> str:
    """The name of an expert's cluster in Envoy: `CLUSTER.DIGEST`.

    The digest is over everything that decides who may be there. A decision stays right for as long as a request is on
    its way, retries included, so what a name means must never change: a new meaning is a new cluster. And no cluster
    that Envoy has from elsewhere has a `.` in its name, so no policy can take over one of those.
    """
    endpoints = sorted((e.host, e.port) for e in expert.endpoints)
    allow = expert.allow.source if expert.allow is not None else None
    meaning = [expert.name, policy.tiers[expert.tier], policy.tiers, endpoints, allow]
    return f"{expert.cluster}.{blake2b(json.dumps(meaning).encode(), digest_size=8).hexdigest()}"
