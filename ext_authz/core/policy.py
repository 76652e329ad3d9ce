"""The compiled policy and the decision. Pure: a decision is a function of policy, caller, experts asked and request.

Every expert in `Decision.serve` and `standby` is permitted to the caller; nothing outside this file can put one there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import cel

from ext_authz.core.cache import Recent
from ext_authz.core.condition import Condition, Truth, context
from ext_authz.core.model import Claims, Decision, Identity, Reason, Request, Struck, Verdict

_EARNED = 1024  # sets of claims whose tier is remembered
_EARNED_BY = 512  # characters of such a set


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
    retry_on: str = "safe"
    health: Health | None = Health()
    outlier: Outlier | None = Outlier()
    slow_start: float = 0.0


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert. `tier` indexes `Policy.tiers`; `line` is where the policy defines it; `lease` as in `Policy`.

    `unavailable` is `downgrade` if those it is downgraded to may also serve when it is down or full, else `refuse`.
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
class GateRule:
    """Where requests to a path name their experts: a JSON pointer in the body, a header, or only the default.

    `default` None means that a request must name its experts.
    """

    match: str
    exact: bool
    pointer: tuple[str, ...] | None = None
    header: str | None = None
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
    """Tokens that are refused though they verify. `issued_before` is in seconds since the epoch."""

    jti: frozenset[str] = frozenset()
    sub: frozenset[str] = frozenset()
    issued_before: float | None = None

    def covers(self, claims: Claims) -> bool:
        """Whether a token with these claims is revoked. One that does not tell when it was issued came too early."""
        jti, sub, iat = claims.get("jti"), claims.get("sub"), claims.get("iat")
        if (isinstance(jti, str) and jti in self.jti) or (isinstance(sub, str) and sub in self.sub):
            return True
        return self.issued_before is not None and not (isinstance(iat, int | float) and iat >= self.issued_before)


@dataclass(frozen=True, slots=True)
class Policy:
    """The whole policy, compiled and immutable. `digest` names its text; `anonymous` None: a token is required.

    `leeway` is in seconds. `forward_token` lets the caller's token pass on to the experts. `lease` is for how many
    seconds Envoy may repeat a decision, 0: not at all; an expert's own goes before it.
    `claims_read` are the claims that some condition may read; None: any. `earned` remembers the tier by those.
    """

    tiers: tuple[str, ...]
    experts: Mapping[str, Expert]
    issuers: Mapping[str, Issuer] = field(default_factory=dict)
    anonymous: int | None = None
    clearance: tuple[ClearanceRule, ...] = ()
    gate: tuple[GateRule, ...] = ()
    revoked: Revoked = Revoked()
    leeway: float = 30.0
    forward_token: bool = False
    log_claims: tuple[str, ...] = ()
    digest: str = ""
    clusters: Mapping[str, str] = field(default_factory=dict)
    reads_request: bool = False
    claims_read: frozenset[str] | None = None
    lease: float = 30.0
    earned: Recent[str, tuple[int, tuple[str, ...]]] = field(
        default_factory=lambda: Recent(_EARNED), compare=False, repr=False
    )


def clearance(policy: Policy, claims: Claims) -> tuple[int, tuple[str, ...]]:
    """The tier that verified claims earn (first rule that holds, else the lowest), and the rules that failed."""
    if not policy.clearance:
        return 0, ()
    if policy.claims_read is None:
        return _clearance(policy, claims)
    read = claims_read(policy, claims)
    key = repr(read)  # tells all JSON values apart: 1, 1.0, True and "1" differ
    if len(key) > _EARNED_BY:
        return _clearance(policy, read)
    known = policy.earned.get(key)
    if known is None:
        known = policy.earned[key] = _clearance(policy, read)
    return known


def _clearance(policy: Policy, claims: Claims) -> tuple[int, tuple[str, ...]]:
    variables = context(claims)
    errors: list[str] = []
    for rule in policy.clearance:
        truth = rule.when.holds(variables)
        if truth is Truth.YES:
            return rule.tier, tuple(errors)
        if truth is Truth.ERROR:
            errors.append(rule.when.where)
    return 0, tuple(errors)


def claims_read(policy: Policy, claims: Claims) -> Claims:
    """Those of the claims that a condition may read: to make CEL's values of the others would be dear and in vain."""
    if policy.claims_read is None:
        return claims
    return {name: claims[name] for name in policy.claims_read if name in claims}


def decide(
    policy: Policy, caller: Identity, named: Iterable[str], request: Request, downgrade: bool = True
) -> Decision:
    """Decide which of the `named` experts may serve `caller`; `downgrade` False forbids a lesser set.

    Total: never raises for any caller or names. Source: the decision table in docs/policy.md.
    """
    tier = policy.tiers[caller.tier]
    asked = tuple(dict.fromkeys(named))
    requested = tuple(n for n in asked if n in policy.experts)
    unknown = tuple(n for n in asked if n not in policy.experts)
    if not requested:
        reason = Reason.UNKNOWN_EXPERT if unknown else Reason.NO_EXPERTS_REQUESTED
        detail = f"no such expert: {', '.join(unknown)}" if unknown else "the request names no expert"
        return Decision(Verdict.DENY, reason, unknown=unknown, detail=detail, caller_tier=tier, errors=caller.errors)

    bench = _Bench(policy, caller, request)
    serve = bench.permitted(requested)
    if not serve:
        serve = bench.permitted(dict.fromkeys(d for n in requested for d in policy.experts[n].downgrade_to))
    standby: tuple[str, ...] = ()
    if downgrade and len(requested) == 1 and serve == requested:
        (only,) = (policy.experts[n] for n in requested)
        standby = bench.permitted(only.downgrade_to) if only.unavailable == "downgrade" else ()
    struck = tuple(s for n in requested if (s := bench.strike(n)))
    needed = [policy.experts[s.expert].tier for s in struck if s.reason is Reason.TIER_TOO_LOW]
    common: dict[str, Any] = {
        "requested": requested, "struck": struck, "unknown": unknown, "caller_tier": tier,
        "required_tier": policy.tiers[min(needed)] if needed else None, "errors": (*caller.errors, *bench.errors),
    }  # fmt: skip
    if serve == requested:
        return Decision(Verdict.ALLOW, Reason.PERMITTED, serve=serve, standby=standby, **common)
    if serve and downgrade:
        return Decision(Verdict.DOWNGRADE, struck[0].reason, serve=serve, **common)
    if serve:
        detail = f"only {', '.join(serve)} may serve this caller, and the request forbids a downgrade"
        return Decision(Verdict.DENY, Reason.DOWNGRADE_FORBIDDEN, detail=detail, **common)
    return Decision(Verdict.DENY, struck[0].reason, detail=_explain(policy, struck[0], tier), **common)


class _Bench:
    """The experts as one caller sees them, each judged at most once."""

    __slots__ = ("_caller", "_policy", "_request", "_variables", "_verdicts", "errors")

    def __init__(self, policy: Policy, caller: Identity, request: Request) -> None:
        self._policy, self._caller, self._request = policy, caller, request
        self._variables: cel.Context | None = None
        self._verdicts: dict[str, Struck | None] = {}
        self.errors: list[str] = []

    def permitted(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(n for n in names if self.strike(n) is None)

    def strike(self, name: str) -> Struck | None:
        """Why the caller may not reach `name`, or None if it may."""
        if name not in self._verdicts:
            self._verdicts[name] = self._judge(self._policy.experts[name])
        return self._verdicts[name]

    def _judge(self, expert: Expert) -> Struck | None:
        if expert.tier > self._caller.tier:
            return Struck(expert.name, Reason.TIER_TOO_LOW, f"experts.{expert.name}.tier")
        if expert.allow is None:
            return None
        if self._variables is None:
            request = readable(self._request) if self._policy.reads_request else None
            self._variables = context(claims_read(self._policy, self._caller.claims), request)
        truth = expert.allow.holds(self._variables)
        if truth is Truth.ERROR:
            self.errors.append(expert.allow.where)
        return None if truth is Truth.YES else Struck(expert.name, Reason.NOT_ALLOWED, expert.allow.where)


TOKEN_HEADERS = ("authorization", "x-expert-access-token")


def readable(request: Request) -> dict[str, Any]:
    """What a condition may read of a request: method, path without query, headers but no token and no repeated one."""
    hidden = request.repeated.union(TOKEN_HEADERS)
    headers = {k: v for k, v in request.headers.items() if k not in hidden and not k.startswith(":")}
    return {"method": request.method, "path": request.path, "headers": headers}


def _explain(policy: Policy, struck: Struck, tier: str) -> str:
    if struck.reason is Reason.TIER_TOO_LOW:
        needed = policy.tiers[policy.experts[struck.expert].tier]
        return f"expert {struck.expert} needs tier {needed}, the caller has {tier}"
    return f"expert {struck.expert} does not accept this caller"
