"""The oracle: what a request must get, by the documents alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import yaml

from tests.oracle import caller, keys, names, verdict
from tests.oracle.caller import Caller, Headers, RefusedError

STATUS = {
    "tier_too_low": 403, "not_allowed": 403, "downgrade_forbidden": 403, "unknown_expert": 404,
    "no_experts_requested": 400, "bad_gate": 400, "token_required": 401, "invalid_token": 401, "keys_unavailable": 503,
    "headers_too_large": 431,
}  # fmt: skip
MAX_CLUSTERS = 64
MAX_LINES, MAX_HEADERS = 80, 48 * 1024  # headers, bytes of them
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_VISIBLE = "!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"
_SAFE = "connect-failure,refused-stream,reset-before-request"


@dataclass(frozen=True)
class Request:
    """An HTTP request as Envoy passes it on: the client's `x-target-cluster` has become `x-requested-cluster`."""

    method: str
    path: str
    headers: Headers
    body: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What a caller must get. Ids, free texts and the suffixes of clusters are not part of it.

    `targets` are the clusters that may serve, `standby` those that may if the others cannot; `client` and `expert` the
    headers that either gets, `removed` those that the expert does not get; `error` the body of a denial.
    `fresh` is the issuer whose newer keys are looked for.
    """

    status: int
    client: Mapping[str, str]
    targets: Sequence[str] = ()
    standby: Sequence[str] = ()
    expert: Mapping[str, str] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    error: Mapping[str, Any] | None = None
    fresh: str | None = None


class Oracle:
    """A policy and its issuers' keys. `keys` has the JWK Set, or the secret, of each issuer whose keys were loaded."""

    def __init__(self, policy: str, keys: Mapping[str, bytes]) -> None:
        self._policy: dict[str, Any] = yaml.load(policy, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self._digest = hashlib.sha256(policy.encode()).hexdigest()[:12]
        self.leeway = _seconds(self._policy.get("leeway", "30s"))
        self._keys = {i["issuer"]: _keys(i, keys.get(i["issuer"])) for i in self._policy.get("issuers", [])}
        experts = self._policy["experts"]
        self._clusters = {name: e.get("cluster", name.lower().replace("_", "-")) for name, e in experts.items()}
        self._owners = {cluster: name for name, cluster in self._clusters.items()}

    def load(self, issuer: str, data: bytes) -> None:
        """Newer keys of an issuer. If they are rejected, the previous ones stay."""
        [entry] = [i for i in self._policy["issuers"] if i["issuer"] == issuer]
        newer = _keys(entry, data)
        self._keys[issuer] = self._keys[issuer] if newer is None else newer

    def answer(self, request: Request, now: float) -> Answer:
        """What the request must get at `now`, in seconds since the epoch."""
        policy = self._policy
        path = request.path.partition("?")[0]
        if len(request.headers) > MAX_LINES or sum(len(n) + len(v) for n, v in request.headers) > MAX_HEADERS:
            return self._denied("headers_too_large")
        try:
            who = caller.caller(policy, self._keys, request.headers, self.leeway, now)
        except RefusedError as refused:
            return self._denied(refused.reason, fresh=refused.fresh)
        variables = verdict.variables_of(policy, who.claims, _readable(request, path))
        tier = verdict.tier_of(policy, variables, who.anonymous)
        try:
            named = names.names(policy, self._owners, path, request.headers, request.body)
        except RefusedError as refused:
            return self._denied(refused.reason, tier)
        requested = [name for name in named if name in policy["experts"]]
        unknown = [name for name in named if name not in policy["experts"]]
        if not requested:
            return self._denied("unknown_expert", tier, unknown=unknown)
        decided = verdict.decide(policy, tier, variables, requested, _may_downgrade(request.headers))
        told = self._told(decided.verdict, decided.reason, requested, unknown)
        if not decided.serve:
            return self._denied(decided.reason, tier, requested, unknown, decided.struck)
        return self._served(decided, who, tier, told)

    def _served(self, decided: verdict.Verdict, who: Caller, tier: str, told: Mapping[str, str]) -> Answer:
        serve = list(decided.serve)[:MAX_CLUSTERS]
        standby = list(decided.standby)[: MAX_CLUSTERS - len(serve)]
        removed = {"x-requested-cluster", "x-srp-downgrade"}
        if not self._policy.get("forward_token", False):
            removed |= {"authorization", "x-expert-access-token"}
        identity = {"x-srp-subject": who.claims.get("sub", ""), "x-srp-issuer": who.claims.get("iss", "")}
        expert = {"x-srp-tier": tier, **_limits([self._policy["experts"][name] for name in (*serve, *standby)])}
        expert |= {name: quote(text, safe=_VISIBLE) for name, text in identity.items() if text}
        removed |= {name for name, text in identity.items() if not text}
        targets = [self._target(name) for name in serve]
        return Answer(200, told, targets, [self._target(name) for name in standby], expert, frozenset(removed))

    def _denied(
        self,
        reason: str,
        tier: str | None = None,
        requested: Sequence[str] = (),
        unknown: Sequence[str] = (),
        struck: Mapping[str, str] | None = None,
        fresh: str | None = None,
    ) -> Answer:
        needed = [
            self._policy["experts"][name]["tier"] for name, why in (struck or {}).items() if why == "tier_too_low"
        ]
        error = {
            "code": reason,
            "requested": [*requested, *unknown],
            "required_tier": min(needed, key=self._policy["tiers"].index, default=None),
            "caller_tier": tier,
        }
        told = self._told("deny", reason, requested, unknown)
        if reason == "token_required":
            told["www-authenticate"] = "Bearer"
        elif reason == "invalid_token":
            told["www-authenticate"] = 'Bearer error="invalid_token", error_description="..."'
        elif STATUS[reason] == 503:
            told["retry-after"] = "1"
        return Answer(STATUS[reason], told, error=error, fresh=fresh)

    def _told(self, said: str, reason: str, requested: Sequence[str], unknown: Sequence[str]) -> dict[str, str]:
        told = {"x-srp-decision": said, "x-srp-reason": reason, "x-srp-policy": self._digest}
        told |= {"x-srp-requested": ",".join(requested)} if requested else {}
        return told | ({"x-srp-unknown": ",".join(unknown)} if unknown else {})

    def _target(self, name: str) -> str:
        expert = self._policy["experts"][name]
        return f"{self._clusters[name]};w={expert.get('weight', 1)};m={expert.get('max_requests', 1024)}"


def _keys(issuer: Mapping[str, Any], data: bytes | None) -> list[keys.Key] | None:
    """An issuer's keys; None if none were loaded, or a set that is rejected."""
    if data is None:
        return None
    try:
        return keys.secret(data) if "secret_file" in issuer else keys.jwk_set(data)
    except ValueError:
        return None


def _seconds(duration: str | int) -> float:
    text = str(duration)
    unit = text.lstrip("0123456789")
    return int(text.removesuffix(unit)) * _UNITS[unit or "s"]


def _may_downgrade(headers: Headers) -> bool:
    """Whether the client accepts a lesser expert: unless it says anything but one plain `allow`."""
    return [value for name, value in headers if name == "x-srp-downgrade"] in ([], [b"allow"])


def _readable(request: Request, path: str) -> dict[str, Any]:
    """What a condition may read of a request."""
    sent = [name for name, _ in request.headers]
    hidden = {"authorization", "x-expert-access-token"}
    headers = {n: v.decode("latin-1") for n, v in request.headers if n not in hidden and sent.count(n) == 1}
    return {"method": request.method, "path": path, "headers": headers}


def _limits(experts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Envoy's limits for these candidates: the longest timeout and the most retries."""
    timeouts = [_seconds(e.get("timeout", "1m")) for e in experts]
    retries = max(e.get("retries", 3) for e in experts)
    repeat = all(e.get("retry_on", "safe") == "5xx" for e in experts)
    if len(experts) > 1 and not repeat and retries:
        retries = min(10, retries + 2 * len(experts))
    limits = {
        "x-envoy-upstream-rq-timeout-ms": str(round(1000 * (0 if 0 in timeouts else max(timeouts)))),
        "x-envoy-max-retries": str(retries),
    }
    return limits | ({"x-envoy-retry-on": f"{_SAFE},5xx"} if repeat else {})
