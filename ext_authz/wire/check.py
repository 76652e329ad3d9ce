"""From the bytes of a CheckRequest to a Request, and from a Decision to the bytes of a CheckResponse.

Source: envoy.service.auth.v3 (`CheckRequest`, `CheckResponse`) and the header table in README.md.
"""

from __future__ import annotations

import json
import re
import secrets
from functools import lru_cache
from hashlib import blake2b
from itertools import count, islice
from typing import Any
from urllib.parse import quote

from envoy_data_plane.envoy.config.core.v3 import HeaderMap, HeaderValueOptionHeaderAppendAction
from envoy_data_plane.envoy.service.auth.v3 import AttributeContextHttpRequest, CheckRequest, CheckResponse
from google.protobuf.message import DecodeError

from ext_authz.core import headers
from ext_authz.core.gate import MAX_NAMES
from ext_authz.core.headers import Answer
from ext_authz.core.model import Decision, Reason, Request, Verdict
from ext_authz.core.policy import Expert, Policy
from ext_authz.core.snapshot import Fingerprint
from ext_authz.wire.twin import twins

# The headers stay bytes until they are needed.
_OPAQUE = frozenset({(AttributeContextHttpRequest, "header_map")})
_TWINS = twins(CheckRequest, CheckResponse, HeaderMap, opaque=_OPAQUE)
_CheckRequest: Any = _TWINS[CheckRequest]
_CheckResponse: Any = _TWINS[CheckResponse]
_HeaderMap: Any = _TWINS[HeaderMap]
_parse = _CheckRequest.FromString

_UNAUTHENTICATED, _PERMISSION_DENIED, _UNAVAILABLE = 16, 7, 14  # google.rpc.Code
_OVERWRITE = HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
_IF_ABSENT = HeaderValueOptionHeaderAppendAction.ADD_IF_ABSENT
_VISIBLE = "!\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"  # visible ASCII that quote() leaves alone; `%` itself is encoded
_UNPRINTABLE = re.compile(r"[^ -~]")
_PREPARED = 1024  # decisions whose answers are cached
_CACHED_CALLERS = 16_384
_SHORT = 128  # characters; longer subjects are not cached
MAX_RETRIES = 10
_NONE: frozenset[str] = frozenset()
_RETRY_SAFE = "connect-failure,refused-stream,reset-before-request"


class Raw:
    """An HTTP request with its headers as Envoy sent them. `fingerprint` identifies the path and the headers."""

    __slots__ = ("_http", "fingerprint")

    def __init__(self, http: Any, fingerprint: Fingerprint) -> None:
        self._http = http
        self.fingerprint = fingerprint

    @property
    def body(self) -> bytes:
        sent: bytes = self._http.raw_body or self._http.body.encode()
        return sent

    def request(self, wanted: frozenset[str] | None = None) -> Request:
        """The request with its `wanted` headers (None: all). ValueError if they cannot be read."""
        try:
            sent = _HeaderMap.FromString(self._http.header_map).headers
        except DecodeError:
            raise ValueError("not a CheckRequest") from None
        found: dict[str, str] = {}
        repeated: list[str] = []
        for header in sent:
            name = header.key
            if wanted is None or name in wanted:
                if name in found:
                    repeated.append(name)
                else:
                    found[name] = header.raw_value.decode("latin-1")
        if wanted is None and self._http.host:
            if headers.HOST in found:  # beside `:authority`, which is the host: there are two
                repeated.append(headers.HOST)
            found[headers.HOST] = self._http.host.lower()
        return Request(
            self._http.method, self.fingerprint[0], found, self.body, frozenset(repeated) if repeated else _NONE,
            len(sent), len(self._http.header_map),
        )  # fmt: skip


def parse(data: bytes) -> Raw:
    """The HTTP request inside a serialised CheckRequest. ValueError if it is not one.

    Envoy sends `header_map` (`encode_raw_headers`): every header as received, repeated ones separately.
    """
    try:
        http = _parse(data).attributes.request.http
    except DecodeError:
        raise ValueError("not a CheckRequest") from None
    head = http.header_map
    if not head and http.headers:
        raise ValueError("the request has no raw headers: set `encode_raw_headers: true` on the ext_authz filter")
    return Raw(http, (http.path.partition("?")[0], blake2b(head, digest_size=32).digest()))


def read(data: bytes) -> Request:
    """The whole request inside a serialised CheckRequest. ValueError if it is not one."""
    return parse(data).request()


class Writer:
    """Turns the decisions of one policy into response bytes. The bytes of recent decisions are cached without ids and
    subjects: the rest depends only on policy and decision."""

    __slots__ = ("_ids", "_lease_epoch", "_policy", "_prepared", "_ready", "_sentinel")

    def __init__(self, policy: Policy, lease_epoch: str = "") -> None:
        """`lease_epoch` is the epoch that leases are granted in."""
        self._policy = policy
        self._lease_epoch = lease_epoch
        # A placeholder for the id in prepared responses. It is never sent, so no caller can smuggle it into a name.
        self._sentinel = secrets.token_hex(8)
        self._ids = count(secrets.randbits(64))
        self._ready: list[str] = []
        self._prepared: dict[Decision, list[bytes]] = {}

    def new_id(self) -> str:
        """An id for one decision."""
        if not self._ready:
            # A random start and an odd multiplier: 64-bit numbers that do not repeat and do not look sequential.
            numbers = (n * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF for n in islice(self._ids, 256))
            self._ready = [f"{n:016x}" for n in numbers]
        return self._ready.pop()

    def write(self, decision: Decision, decision_id: str | None = None, subject: str = "", issuer: str = "") -> bytes:
        """A serialised CheckResponse with `decision_id`, or a new id, for the caller that is `subject` to `issuer`."""
        parts = self._prepared.get(decision) or self._prepare(decision)
        answer = (decision_id or self.new_id()).encode().join(parts)
        if not decision.serve:
            return answer
        part = _caller_part if len(subject) <= _SHORT else _caller_part.__wrapped__
        return answer + part(subject, issuer)

    def grant(self, decision: Decision, decision_id: str, until: float, subject: str = "", issuer: str = "") -> bytes:
        """As `write`, with a lease: Envoy may repeat the decision until `until` (seconds since the epoch)."""
        response = _CheckResponse.FromString(self.write(decision, decision_id, subject, issuer))
        lease = response.dynamic_metadata.fields["lease"].struct_value.fields
        lease["epoch"].string_value = self._lease_epoch
        lease["expires"].string_value = str(int(until * 1000))
        granted = lease["headers"].struct_value.fields
        for option in response.ok_response.headers:
            granted[option.header.key].string_value = option.header.value
        return bytes(response.SerializeToString())

    def _prepare(self, decision: Decision) -> list[bytes]:
        """The serialised answer, split where the id belongs."""
        build = _ok if decision.serve else _denied
        response = build(self._policy, decision, self._sentinel)
        parts: list[bytes] = response.SerializeToString().split(self._sentinel.encode())
        if len(self._prepared) >= _PREPARED:
            self._prepared.clear()  # most requests share a few decisions, which are soon cached again
        self._prepared[decision] = parts
        return parts


@lru_cache(_CACHED_CALLERS)
def _caller_part(subject: str, issuer: str) -> bytes:
    """The part of an answer that depends on the caller, to append to a serialised answer: protobuf merges concatenated
    messages (its page "Encoding").

    What it does not set it removes from the client's headers. Envoy has already done so; this is a second safeguard.
    """
    response = _CheckResponse()
    own = {headers.SUBJECT: subject, headers.ISSUER: issuer}
    _set(response.ok_response.headers, {name: quote(text, safe=_VISIBLE) for name, text in own.items() if text})
    response.ok_response.headers_to_remove.extend(name for name, text in own.items() if not text)
    return bytes(response.SerializeToString())


def _ok(policy: Policy, decision: Decision, decision_id: str) -> Any:
    """Everything except the part that depends on the subject."""
    response = _CheckResponse()
    ok = response.ok_response
    experts = [policy.experts[n] for n in (*decision.serve, *decision.standby)[:MAX_NAMES]]
    targets = [f"{policy.envoy_clusters[e.name]};w={e.weight};m={e.traffic.max_requests}" for e in experts]
    for i in range(len(decision.serve), len(targets)):
        targets[i] += ";s"  # standby
    upstream = {
        headers.TARGET_CLUSTER: ",".join(targets),
        headers.TIER: decision.caller_tier or "",
        headers.DECISION_ID: decision_id,
        **_traffic(experts),
    }
    answer = Answer(decision, decision_id, policy.digest)
    _set(ok.headers, {name: value for name, value in upstream.items() if value})
    ok.headers_to_remove.extend(headers.removed(policy.forward_token))
    _set(ok.response_headers_to_add, headers.client_headers(answer))
    if decision.standby:
        for option in ok.response_headers_to_add:
            if option.header.key in headers.DEPENDS_ON_WHO_ANSWERS:
                option.append_action = _IF_ABSENT  # the route script has set them if a standby expert answered
    _add_metadata(response, answer)
    return response


def _denied(policy: Policy, decision: Decision, decision_id: str) -> Any:
    response = _CheckResponse()
    denied = response.denied_response
    answer = Answer(decision, decision_id, policy.digest)
    status = decision.status
    response.status.code = {401: _UNAUTHENTICATED, 503: _UNAVAILABLE}.get(status, _PERMISSION_DENIED)
    denied.status.code = status
    own = {"content-type": "application/json", "cache-control": "no-store", **headers.client_headers(answer)}
    if decision.reason is Reason.TOKEN_REQUIRED:
        own["www-authenticate"] = "Bearer"
    elif status == 401:
        described = decision.detail.translate({ord('"'): "'", ord("\\"): "/"})
        own["www-authenticate"] = f'Bearer error="invalid_token", error_description="{described}"'
    elif status == 503:
        own["retry-after"] = "1"
    _set(denied.headers, own)
    error = {
        "code": decision.reason.value,
        "message": decision.detail,
        "requested": [*decision.requested, *decision.unknown],
        "required_tier": decision.required_tier,
        "caller_tier": decision.caller_tier,
        "decision_id": decision_id,
    }
    denied.body = json.dumps({"error": error}) + "\n"
    _add_metadata(response, answer)
    return response


def _traffic(experts: list[Expert]) -> dict[str, str]:
    """Envoy's per-request limits for this set of candidates: the longest of their timeouts applies.

    A retry that repeats nothing (the connection failed) may go down the whole ladder; each rung can fail twice.
    """
    timeouts = [e.traffic.timeout for e in experts]
    timeout = 0.0 if 0 in timeouts else max(timeouts)
    retry_5xx = all(e.traffic.retry_on == "5xx" for e in experts)
    retries = max(e.traffic.retries for e in experts)
    if retries and len(experts) > 1 and not retry_5xx:
        retries = min(retries + 2 * len(experts), MAX_RETRIES)
    return {
        headers.TIMEOUT: str(round(timeout * 1000)),
        headers.MAX_RETRIES: str(retries),
        headers.RETRY_ON: f"{_RETRY_SAFE},5xx" if retry_5xx else "",
    }


def _add_metadata(response: Any, answer: Answer) -> None:
    """Dynamic metadata: facts for Envoy's access log, and for the route script the experts on standby."""
    fields = response.dynamic_metadata.fields
    for name, text in headers.metadata(answer).items():
        fields[name].string_value = text
    if answer.decision.standby:
        fields["standby"].string_value = ",".join(answer.decision.standby)


def _set(options: Any, values: dict[str, str]) -> None:
    """Add headers that overwrite any of the same name. Envoy reads `value`, not `raw_value`, and appends by default."""
    for name, value in values.items():
        option = options.add(append_action=_OVERWRITE)
        option.header.key = name
        option.header.value = _UNPRINTABLE.sub("?", value)


INTERNAL = Decision(Verdict.DENY, Reason.INTERNAL, detail="the request could not be decided")
