"""The real cases that fuzzing begins with: keys, policies, tokens, requests and records.

They are the same in every process, so that a case that was kept can be tried again: keys and time are fixed. Only the
RSA key is made anew, and nothing is signed with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519
from envoy_data_plane.envoy.service.auth.v3 import CheckRequest
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest
from jwt.algorithms import get_default_algorithms
from jwt.utils import base64url_encode, der_to_raw_signature

from benchmarks import callers
from ext_authz.core.check import check
from ext_authz.core.jwk import parse_jwks, secret_key
from ext_authz.core.model import Outcome, Refusal, Request
from ext_authz.core.snapshot import Snapshot
from ext_authz.demo.files import policy_text
from ext_authz.observe.decision_record import RecordWriter
from ext_authz.policyfile.parse import parse_policy
from ext_authz.wire.check import read
from ext_authz.wire.clusters import TYPE_CLUSTER
from ext_authz.wire.lease_filter import TYPE_EXTENSION
from ext_authz.wire.twin import twins

ROOT = Path(__file__).resolve().parents[1]
NOW = 1_800_000_000  # the time of every case, in seconds since the epoch
END = b"\x1e"  # between the parts of a case that has several

SHARED = "https://shared.example.com/"
SECRET = b"a secret of sixty-four bytes, known to all who read this benchmark"
ALGORITHMS = get_default_algorithms()
KEYS: Mapping[str, Any] = {
    "ES256": ec.derive_private_key(2**255 + 19, ec.SECP256R1()),
    "ES384": ec.derive_private_key(2**255 + 21, ec.SECP384R1()),
    "ES512": ec.derive_private_key(2**255 + 23, ec.SECP521R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32))),
    "HS256": SECRET,
}

_HASHES = {"ES256": hashes.SHA256(), "ES384": hashes.SHA384(), "ES512": hashes.SHA512()}
_Request: Any = twins(CheckRequest)[CheckRequest]
_Discovery: Any = twins(DiscoveryRequest)[DiscoveryRequest]

_HEAD = f"""\
version: 1
tiers: [low, mid, high]
issuers:
  - issuer: {callers.ISSUER}
    audiences: [{callers.AUDIENCE}]
    algorithms: [ES256, ES384, ES512, EdDSA, RS256]
    jwks: {{file: jwks.json}}
  - {{issuer: "{SHARED}", audiences: [{callers.AUDIENCE}], algorithms: [HS256], secret_file: secret}}
anonymous: low
log_claims: [plan, org]
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
  - {{when: 'has(claims.org) && claims.org in ["acme", "umbrella"]', tier: mid}}
revoked: {{jti: [gone], sub: [mallory], issued_before: 2020-01-01T00:00:00Z}}
gate:
  - {{path: /route, json: /expert_names, default: [A, B]}}
  - {{prefix: /v1/, json: /model}}
  - {{prefix: /deep/, json: /a/b/0/c~1d, default: [A]}}
  - {{prefix: /asked/, header: x-target-cluster, default: [A, B]}}
  - {{path: /always, default: [A]}}
  - {{prefix: /, header: x-expert-names}}
"""

# Decisions that are cached and leased.
CACHED = f"""{_HEAD}\
experts:
  A: {{tier: low, cluster: expert-a, endpoints: ["127.0.0.1:1"]}}
  B: {{tier: low, cluster: expert-b, endpoints: ["127.0.0.1:2"], unavailable: downgrade, downgrade_to: [A]}}
  C: {{tier: mid, cluster: expert-c, endpoints: ["127.0.0.1:3"], downgrade_to: [B, A]}}
  D: {{tier: high, cluster: expert-d, endpoints: ["127.0.0.1:4"]}}
"""

# Decisions that read the whole of a request and a token.
READING = f"""{_HEAD}\
forward_token: true
experts:
  A: {{tier: low, cluster: expert-a, endpoints: ["a:1"], allow: '!request.headers["x-team"].matches("^bad.*$")'}}
  B: {{tier: low, cluster: expert-b, endpoints: ["a:2"], allow: 'request.path != "/" && size(request.headers) < 50'}}
  C:
    tier: mid
    cluster: expert-c
    endpoints: ["a:3"]
    allow: 'claims.roles.exists(r, r == "c") || size(claims) > 7'
    downgrade_to: [B]
  D: {{tier: high, cluster: expert-d, endpoints: ["a:4"], allow: 'int(claims.level) + 1 > 2 && request.method != ""'}}
"""

# Every key of a policy, each with a value that is not its default.
FULL = """\
version: 1
tiers: [bronze, silver, 'no']
issuers:
  - issuer: https://idp.example.com/
    audiences: [one, "two"]
    algorithms: [ES256, RS256]
    jwks: {url: https://idp.example.com/jwks.json, refresh: 10m, ca_file: ca.pem, bearer_token_file: token}
  - {issuer: local, audiences: [one], algorithms: [HS512, HS256], secret_file: secret}
  - {issuer: file, audiences: [one], algorithms: [EdDSA], jwks: {file: jwks.json}}
anonymous: bronze
leeway: 1m
lease: 500ms
forward_token: true
log_claims: [plan, "org unit"]
clearance:
  - {when: 'claims.plan == "premium" && size(claims.roles) > 0', tier: 'no'}
  - {when: "claims.roles.exists(r, r.startsWith('x'))", tier: silver}
revoked:
  jti: [a, b]
  sub: [mallory]
  issued_before: 2026-01-31T12:00:00Z
experts:
  meta-llama/Llama-3.1-8B:
    tier: bronze
    cluster: llama
    endpoints: ["[::1]:8001", 10.0.0.1:8001, llama.example.com:8001]
    weight: 3
    max_requests: 64
    max_pending: 8
    timeout: 0
    connect_timeout: 250ms
    retries: 2
    retry_on: 5xx
    health: {path: /ready, interval: 500ms}
    outlier: {consecutive_5xx: 7, base_ejection: 30s}
    slow_start: 30s
    lease: 0
  B_2: {tier: silver, endpoints: [b:1], health: false, outlier: false, downgrade_to: [meta-llama/Llama-3.1-8B]}
  C: {tier: 'no', endpoints: [c:1], allow: 'request.path == "/x"', downgrade_to: [B_2], unavailable: downgrade}
gate:
  - {path: /route, json: /a/0/b~1c, default: [C]}
  - {prefix: /v1/, json: /model}
  - {prefix: /asked, header: x-target-cluster}
  - {prefix: /, default: [B_2, C]}
"""


def policies() -> list[bytes]:
    """The policies of the demo, of Kubernetes, of this benchmark, and every broken one of the tests."""
    demo = policy_text({"a1": 1, "a2": 2, "b1": 3, "b2": 4, "c1": 5})
    many = {
        f"expert-{n}": {"tier": "low", "endpoints": [f"h{n}:1"], "downgrade_to": ["expert-0"][:n]} for n in range(60)
    }
    wide = json.dumps({"version": 1, "tiers": ["low"], "anonymous": "low", "experts": many}, separators=(",", ": "))
    # Most broken policies are short and alike, so the long ones count for more.
    texts = [demo, CACHED, READING, *[FULL] * 40, (ROOT / "k8s/base/policy.yaml").read_text(), wide, wide]
    broken = sorted((ROOT / "tests/policyfile/broken").glob("*.yaml"))
    return [*(text.encode() for text in texts), *(path.read_bytes() for path in broken)]


def key_set(*more: Mapping[str, Any]) -> bytes:
    """The issuer's keys as it publishes them."""
    keys = [key for key in callers.jwks()["keys"] if key["kid"] == "RS256"]
    for alg, key in KEYS.items():
        if alg != "HS256":
            keys.append({**_public(alg, key), "kid": alg, "use": "sig", "alg": alg, "key_ops": ["verify"]})
    return json.dumps({"keys": [*keys, *more]}).encode()


def key_sets() -> list[bytes]:
    """Key sets as they are published, with keys of every type, for other uses, and some that must be refused."""
    private = {**_public("ES256", KEYS["ES256"]), "d": "AAAA", "kid": "private"}
    wide = {**_public("EdDSA", ed448.Ed448PrivateKey.generate()), "kid": "448"}
    plain = _public("ES256", KEYS["ES256"])
    others = [
        {"kty": "oct", "k": "c2VjcmV0"}, {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"}, {**plain, "use": "enc"},
        {**plain, "key_ops": ["encrypt"]}, {**plain, "alg": "ES512"}, {"kty": "AKP", "alg": "ML-DSA-44", "pub": "AA"},
    ]  # fmt: skip
    small = [json.dumps({"keys": [key]}).encode() for key in (plain, wide, _public("EdDSA", KEYS["EdDSA"]))]
    return [key_set(), key_set(wide), key_set(*others), key_set(private), *small]


def _public(alg: str, key: Any) -> dict[str, Any]:
    public: dict[str, Any] = ALGORITHMS[alg].to_jwk(key.public_key(), as_dict=True)
    return public


def snapshot(text: str) -> Snapshot:
    """A policy of this file with its keys, and empty caches."""
    keys = {callers.ISSUER: parse_jwks(key_set()), SHARED: (secret_key(SECRET),)}
    return Snapshot(parse_policy(text, key_files=False), MappingProxyType(keys))


def claims(**more: Any) -> dict[str, Any]:
    """The claims of a caller in good standing."""
    times = {"iat": NOW - 10, "nbf": NOW - 10, "exp": NOW + 600}
    return {"iss": callers.ISSUER, "aud": callers.AUDIENCE, "sub": "ada", "jti": "4f1c", **times, **more}


def token_parts() -> Iterator[tuple[str, bytes, bytes]]:
    """The algorithm, header and payload of tokens of every kind."""
    payloads = [
        claims(plan="premium"),
        claims(org="acme", roles=["a", "c"], level=3),
        claims(
            aud=["x", callers.AUDIENCE], sub="Zoë \U0001f600", realm_access={"roles": ["x"] * 5, "a": {"b": [1, 2.5]}}
        ),
        {"iss": callers.ISSUER, "aud": callers.AUDIENCE, "exp": NOW + 1.5},
    ]
    for alg in KEYS:
        header = {"alg": alg, "typ": "JWT", "kid": alg} if alg != "HS256" else {"alg": alg}
        for payload in payloads:
            mine = payload if alg != "HS256" else {**payload, "iss": SHARED}
            for separators in ((",", ":"), (", ", ": ")):
                first, second = (json.dumps(part, separators=separators).encode() for part in (header, mine))
                yield alg, first, second


def signed(alg: str, header: bytes, payload: bytes) -> bytes:
    """A token over any bytes at all, signed with the key of `alg`."""
    text = base64url_encode(header) + b"." + base64url_encode(payload)
    key = KEYS[alg]
    if isinstance(key, ec.EllipticCurvePrivateKey):  # PyJWT would sign with another random number each time
        der = key.sign(text, ec.ECDSA(_HASHES[alg], deterministic_signing=True))
        return text + b"." + base64url_encode(der_to_raw_signature(der, key.curve))
    signature: bytes = ALGORITHMS[alg].sign(text, key)
    return text + b"." + base64url_encode(signature)


def tokens() -> list[bytes]:
    """Really signed tokens."""
    return [signed(*parts) for parts in token_parts()]


def check_request(
    headers: Sequence[tuple[str, bytes]], path: str = "/x", body: bytes = b"", method: str = "POST"
) -> bytes:
    """A CheckRequest as Envoy would send it, with these headers in this order."""
    request = _Request()
    http = request.attributes.request.http
    http.method, http.path, http.raw_body = method, path, body
    http.host, http.scheme, http.protocol, http.size = "x", "http", "HTTP/1.1", len(body)
    for name, value in headers:
        http.header_map.headers.add(key=name, raw_value=value)
    return bytes(request.SerializeToString())


def check_requests() -> list[bytes]:
    """Requests with and without token, for every rule of the gate."""
    bearers = [b"Bearer " + token for token in tokens()[:6]]
    usual = [("user-agent", b"curl/8"), ("accept", b"*/*"), ("x-forwarded-for", b"127.0.0.1"), ("x-team", b"red")]
    bodies = {
        "/route": {"expert_names": ["A", "C"]},
        "/v1/chat": {"model": "A"},
        "/deep/x": {"a": {"b": [{"c/d": "C"}]}},
    }
    found = []
    for path, value in bodies.items():
        sent = [*usual, ("content-type", b"application/json"), ("authorization", bearers[0])]
        found.append(check_request(sent, path, json.dumps(value).encode()))
    for n, bearer in enumerate(bearers):
        names = ("x-expert-names", b"A,B,C,D,nobody"[: 2 * n + 1])
        found.append(check_request([*usual, names, ("authorization", bearer)], "/x?query=1", b"", "GET"))
    found += [
        check_request([*usual, ("x-expert-names", b"A, B")]),
        check_request([("x-requested-cluster", b"expert-a,B"), *usual], "/asked/x", method="GET"),
        check_request([("x-expert-access-token", bearers[1][7:]), ("x-expert-names", b"D")]),
        check_request([("x-srp-downgrade", b"never"), ("x-expert-names", b"D"), ("x-expert-names", b"A")]),
        check_request([("x-srp-tier", b"high"), ("x-target-cluster", b"expert-d")], "/always"),
        check_request([("content-encoding", b"gzip"), ("x-envoy-auth-partial-body", b"true")], "/route", b"{}"),
    ]
    return found


def records() -> list[bytes]:
    """Lines of the decision log, of decisions on the requests above."""
    writer, found = RecordWriter(), []
    for text in (CACHED, READING):
        epoch = snapshot(text)
        for data in check_requests():
            request: Request = read(data)
            outcome: Outcome | Refusal = check(epoch, request, NOW)
            if isinstance(outcome, Outcome):
                found.append(writer.line(epoch, request, outcome.decision, "88453f8963ca6316", NOW))
    return found


def discoveries() -> list[bytes]:
    """Streams of DiscoveryRequests: subscriptions, then ACKs and NACKs. Each message has its length before it."""
    cluster, extension = TYPE_CLUSTER, TYPE_EXTENSION

    def stream(*requests: dict[str, Any]) -> bytes:
        return framed([_Discovery(**request).SerializeToString() for request in requests])

    first = {"type_url": cluster, "node": {"id": "srp", "cluster": "srp"}}
    filters = {"type_url": extension, "resource_names": ["srp.lease"]}
    acks = [
        {"type_url": url, "version_info": "1", "response_nonce": str(n + 1)}
        for n, url in enumerate((cluster, extension))
    ]
    nack = {**acks[0], "error_detail": {"code": 13, "message": "no such thing"}}
    return [
        stream(first, acks[0], filters, acks[1]),
        stream(first, nack, first, acks[0]),
        stream(first, filters, *acks, {**acks[1], "response_nonce": "3"}, {**filters, "response_nonce": "2"}),
        stream(*({"type_url": f"type.googleapis.com/t{n}"} for n in range(17))),
    ]


def framed(messages: Sequence[bytes]) -> bytes:
    return b"".join(len(message).to_bytes(4, "big") + message for message in messages)


def unframed(data: bytes) -> list[bytes]:
    """The messages of a stream; a length that is too great takes what there is."""
    messages = []
    while data:
        size = int.from_bytes(data[:4], "big")
        messages.append(data[4 : 4 + size])
        data = data[4 + size :]
    return messages
