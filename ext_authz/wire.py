"""Bytes to Request, Decision to bytes: the only room that knows Envoy's messages.

Source: envoy.service.auth.v3 (`CheckRequest`, `CheckResponse`) and the header table in README.md.
"""

from __future__ import annotations

import json
import re
import secrets
from itertools import count, islice
from typing import Any
from urllib.parse import quote
from weakref import WeakKeyDictionary

from envoy_data_plane.envoy.config.core.v3 import HeaderValueOptionHeaderAppendAction
from envoy_data_plane.envoy.service.auth.v3 import CheckRequest, CheckResponse
from google.protobuf.message import DecodeError

from ext_authz.gate import MAX_NAMES, REQUESTED_CLUSTER
from ext_authz.model import Decision, Reason, Request, Verdict
from ext_authz.policy import TOKEN_HEADERS, Expert, Policy
from ext_authz.recent import Recent
from ext_authz.twin import twins

_TWINS = twins(CheckRequest, CheckResponse)
_CheckRequest: Any = _TWINS[CheckRequest]
_CheckResponse: Any = _TWINS[CheckResponse]
_parse = _CheckRequest.FromString

_UNAUTHENTICATED, _PERMISSION_DENIED, _UNAVAILABLE = 16, 7, 14  # google.rpc.Code
_OVERWRITE = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
_IF_ABSENT = HeaderValueOptionHeaderAppendAction.ADD_IF_ABSENT
_VISIBLE = "!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"  # visible ASCII that quote() leaves alone; `%` itself is encoded
_UNPRINTABLE = re.compile(r"[^ -~]")
_MILLISECONDS = 13  # digits of a time in milliseconds, until the year 2286
MAX_RETRIES = 10
_SHAPES = 1024  # answers to remember that differ in more than the subject
_SHAPE = 2048  # bytes of an ordinary one
_NONE: frozenset[str] = frozenset()
_RETRY_SAFE = "connect-failure,refused-stream,reset-before-request"


def read(data: bytes, wanted: frozenset[str] | None = None) -> Request:
    """The HTTP request inside a serialised CheckRequest, with its `wanted` headers or all. ValueError if it is none.

    Envoy sends `header_map` (`encode_raw_headers`): every header as it came, repeated ones one by one.
    """
    try:
        http = _parse(data).attributes.request.http
    except DecodeError:
        raise ValueError("not a CheckRequest") from None
    raw = http.header_map.headers
    if not raw and http.headers:
        raise ValueError("the request came without raw headers: set `encode_raw_headers: true` on the ext_authz filter")
    headers: dict[str, str] = {}
    repeated: list[str] = []
    for header in raw:
        name = header.key
        if wanted is None or name in wanted:
            if name in headers:
                repeated.append(name)
            else:
                headers[name] = header.raw_value.decode("latin-1")
    path = http.path.partition("?")[0]
    body = http.raw_body or http.body.encode()
    return Request(http.method, path, headers, body, frozenset(repeated) if repeated else _NONE)


class Writer:
    """Decisions of one policy to response bytes. What it makes of a decision lives as long as the decision does."""

    __slots__ = ("_common", "_granted", "_ids", "_lease", "_policy", "_prepared", "_ready", "_sentinel", "_until")

    def __init__(self, policy: Policy, lease: str = "") -> None:
        """`lease` is the epoch that leases are granted in."""
        self._policy = policy
        self._lease = lease
        # Stands for the id while a response is prepared; never sent, so nobody can smuggle it into a name.
        self._sentinel = secrets.token_hex(8)
        self._until = secrets.token_hex(7)[:_MILLISECONDS]  # likewise for a lease's end
        self._common: Recent[tuple[object, ...], bytes] = Recent(_SHAPES)
        self._ids = count(secrets.randbits(64))
        self._ready: list[str] = []
        self._prepared: WeakKeyDictionary[Decision, list[bytes]] = WeakKeyDictionary()
        self._granted: WeakKeyDictionary[Decision, bytes] = WeakKeyDictionary()

    def new_id(self) -> str:
        """An id for one decision."""
        if not self._ready:
            # A random start and an odd multiplier: 64-bit numbers that do not repeat and do not look like a count.
            numbers = (n * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF for n in islice(self._ids, 256))
            self._ready = [f"{n:016x}" for n in numbers]
        return self._ready.pop()

    def write(self, decision: Decision, decision_id: str | None = None) -> bytes:
        """A serialised CheckResponse with `decision_id`, or an id of its own."""
        parts = self._prepared.get(decision)
        if parts is None:
            response = self._ok(decision) if decision.serve else _denied(self._policy, decision, self._sentinel)
            parts = self._prepared[decision] = response.SerializeToString().split(self._sentinel.encode())
        return (decision_id or self.new_id()).encode().join(parts)

    def grant(self, decision: Decision, decision_id: str, until: float) -> bytes:
        """As `write`, with leave for Envoy to repeat the decision until then (seconds since the epoch)."""
        response = self._granted.get(decision)
        if response is None:
            made = self._ok(decision)
            lease = made.dynamic_metadata.fields["lease"].struct_value.fields
            lease["epoch"].string_value = self._lease
            lease["expires"].string_value = self._until
            for option in made.ok_response.headers:
                lease["headers"].struct_value.fields[option.header.key].string_value = option.header.value
            response = self._granted[decision] = made.SerializeToString()
        expires = f"{int(until * 1000):0{_MILLISECONDS}d}"  # as text: its length is the sentinel's
        return response.replace(self._sentinel.encode(), decision_id.encode()).replace(
            self._until.encode(), expires.encode()
        )

    def _ok(self, decision: Decision) -> Any:
        """Leave to pass. Callers of a tier differ in their subject only: the rest is made once for all of them."""
        d = decision
        shape = (d.verdict, d.reason, d.requested, d.serve, d.standby, d.unknown, d.caller_tier, bool(d.subject))
        common = self._common.get(shape)
        if common is None:
            common = _ok(self._policy, d, self._sentinel).SerializeToString()
            if not d.unknown:  # names that anybody can invent would fill the memory
                self._common.keep(shape, common, 1 + len(common) // _SHAPE)
        response = _CheckResponse.FromString(common)
        if d.subject:
            _set(response.ok_response.headers, {"x-srp-subject": quote(d.subject, safe=_VISIBLE)})
        return response


def _ok(policy: Policy, decision: Decision, decision_id: str) -> Any:
    """All but the subject."""
    response = _CheckResponse()
    ok = response.ok_response
    experts = [policy.experts[n] for n in (*decision.serve, *decision.standby)[:MAX_NAMES]]
    targets = [f"{e.cluster};w={e.weight};m={e.traffic.max_requests}" for e in experts]
    for i in range(len(decision.serve), len(targets)):
        targets[i] += ";s"  # standby
    upstream = {
        "x-target-cluster": ",".join(targets),
        "x-srp-tier": decision.caller_tier or "",
        "x-srp-decision-id": decision_id,
        **_traffic(experts),
    }
    _set(ok.headers, {name: value for name, value in upstream.items() if value})
    removed = [REQUESTED_CLUSTER, "x-srp-downgrade", *(() if policy.forward_token else TOKEN_HEADERS)]
    if not decision.subject:
        removed.append("x-srp-subject")  # Envoy has stripped the client's already; this is the second lock
    ok.headers_to_remove.extend(removed)
    _set(ok.response_headers_to_add, _told(policy, decision, decision_id))
    if decision.standby:
        for option in ok.response_headers_to_add:
            if option.header.key in ("x-srp-decision", "x-srp-reason"):
                option.append_action = _IF_ABSENT  # the route script has set them if a standby answered
    _metadata(response, policy, decision, decision_id)
    return response


def _denied(policy: Policy, decision: Decision, decision_id: str) -> Any:
    response = _CheckResponse()
    denied = response.denied_response
    status = decision.status
    response.status.code = {401: _UNAUTHENTICATED, 503: _UNAVAILABLE}.get(status, _PERMISSION_DENIED)
    denied.status.code = status
    headers = {"content-type": "application/json", "cache-control": "no-store", **_told(policy, decision, decision_id)}
    if decision.reason is Reason.TOKEN_REQUIRED:
        headers["www-authenticate"] = "Bearer"
    elif status == 401:
        described = decision.detail.translate({ord('"'): "'", ord("\\"): "/"})
        headers["www-authenticate"] = f'Bearer error="invalid_token", error_description="{described}"'
    elif status == 503:
        headers["retry-after"] = "1"
    _set(denied.headers, headers)
    error = {
        "code": decision.reason.value,
        "message": decision.detail,
        "requested": [*decision.requested, *decision.unknown],
        "required_tier": decision.required_tier,
        "caller_tier": decision.caller_tier,
        "decision_id": decision_id,
    }
    denied.body = json.dumps({"error": error}) + "\n"
    _metadata(response, policy, decision, decision_id)
    return response


def _told(policy: Policy, decision: Decision, decision_id: str) -> dict[str, str]:
    """What the client is told, allowed or not (empty values are left out)."""
    told = {
        "x-srp-decision": decision.verdict.value,
        "x-srp-reason": decision.reason.value,
        "x-srp-requested": ",".join(decision.requested),
        "x-srp-unknown": ",".join(decision.unknown),
        "x-srp-decision-id": decision_id,
        "x-srp-policy": policy.digest,
    }
    return {name: value for name, value in told.items() if value}


def _traffic(experts: list[Expert]) -> dict[str, str]:
    """Envoy's per-request limits for this set of candidates: the most patient of them sets the timeout.

    A retry that repeats nothing (the connection failed) may go down the whole ladder; each rung can fail twice.
    """
    timeouts = [e.traffic.timeout for e in experts]
    timeout = 0.0 if 0 in timeouts else max(timeouts)
    retry_5xx = all(e.traffic.retry_on == "5xx" for e in experts)
    retries = max(e.traffic.retries for e in experts)
    if retries and len(experts) > 1 and not retry_5xx:
        retries = min(retries + 2 * len(experts), MAX_RETRIES)
    return {
        "x-envoy-upstream-rq-timeout-ms": str(round(timeout * 1000)),
        "x-envoy-max-retries": str(retries),
        "x-envoy-retry-on": f"{_RETRY_SAFE},5xx" if retry_5xx else "",
    }


def _metadata(response: Any, policy: Policy, decision: Decision, decision_id: str) -> None:
    """Dynamic metadata for Envoy's access log: no subject, no claim, no token."""
    fields = response.dynamic_metadata.fields
    texts = {
        "decision_id": decision_id,
        "decision": decision.verdict.value,
        "reason": decision.reason.value,
        "requested": ",".join(decision.requested),
        "unknown": ",".join(decision.unknown),
        "candidates": ",".join(decision.serve),
        "caller_tier": decision.caller_tier or "",
        "policy": policy.digest,
    }
    for name, text in texts.items():
        fields[name].string_value = text
    if decision.standby:
        fields["standby"].string_value = ",".join(decision.standby)


def _set(options: Any, headers: dict[str, str]) -> None:
    """Each header once, in place of any of its name. Envoy reads `value`, not `raw_value`, and appends by default."""
    for name, value in headers.items():
        option = options.add(append_action=_OVERWRITE)
        option.header.key = name
        option.header.value = _UNPRINTABLE.sub("?", value)


INTERNAL = Decision(Verdict.DENY, Reason.INTERNAL, detail="the request could not be decided")
