"""The callers of the benchmarks and their policy. Keys are new for each run, and tokens are really signed."""

from __future__ import annotations

import json
import time
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from envoy_data_plane.envoy.service.auth.v3 import CheckRequest
from jwt.algorithms import get_default_algorithms

from ext_authz.policyfile.parse import parse_policy
from ext_authz.wire.twin import twins

ISSUER = "https://idp.example.com/"
AUDIENCE = "moe-gateway"
LIFETIME = 3600 * 6  # seconds

_KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
_PYJWT = jwt.PyJWS()
_Request: Any = twins(CheckRequest)[CheckRequest]


def jwks() -> dict[str, Any]:
    """The JWK Set of the benchmark's issuer."""
    algorithms = get_default_algorithms()
    keys = []
    for alg, key in _KEYS.items():
        public = algorithms[alg].to_jwk(key.public_key(), as_dict=True)
        keys.append({**public, "kid": alg, "use": "sig", "alg": alg, "key_ops": ["verify"]})
    return {"keys": keys}


@cache
def token(alg: str, subject: str = "caller") -> str:
    """A premium caller's token of a typical size."""
    now = int(time.time())
    claims = {
        "iss": ISSUER, "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + LIFETIME, "jti": f"{alg}-{subject}",
        "plan": "premium", "org": "acme", "scope": "experts.read experts.call",
    }  # fmt: skip
    return _PYJWT.encode(json.dumps(claims, separators=(",", ":")).encode(), _KEYS[alg], alg, headers={"kid": alg})


def policy(endpoint: str, lease: str = "0s") -> str:
    """A policy with four experts, all at `endpoint`. It needs `jwks.json` in its folder. JSON is also YAML."""
    expert = {"endpoints": [endpoint], "health": False}
    return json.dumps(
        {
            "version": 1,
            "lease": lease,
            "tiers": ["low", "high"],
            "issuers": [
                {"issuer": ISSUER, "audiences": [AUDIENCE], "algorithms": [*_KEYS], "jwks": {"file": "jwks.json"}}
            ],
            "anonymous": "low",
            "clearance": [{"when": 'claims.plan == "premium"', "tier": "high"}],
            "experts": {
                "A": {"tier": "low", "cluster": "expert-a", **expert},
                "B": {"tier": "low", "cluster": "expert-b", **expert},
                "C": {"tier": "high", "cluster": "expert-c", "downgrade_to": ["B", "A"], **expert},
                "D": {"tier": "high", "cluster": "expert-d", **expert},
            },
            "gate": [{"path": "/route", "json": "/expert_names"}, {"prefix": "/", "header": "x-expert-names"}],
        }
    )


def targets(endpoint: str) -> str:
    """What the decision on a `hot` request sets as `x-target-cluster`."""
    clusters = parse_policy(policy(endpoint), key_files=False).envoy_clusters
    return ",".join(f"{clusters[name]};w=1;m=1024" for name in "AB")


def request(names: str, bearer: str | None = None, body: bool = False) -> bytes:
    """An HTTP request that names experts in a header or, with `body`, in a JSON body."""
    content = json.dumps({"expert_names": names.split(","), "input": "two plus two"}).encode() if body else b""
    lines = [
        f"{'POST /route' if body else 'GET /'} HTTP/1.1", "host: experts.example.com", "user-agent: benchmark/1",
        "accept: application/json",
        *([] if body else [f"x-expert-names: {names}"]),
        *([f"authorization: Bearer {bearer}"] if bearer else []),
        *([f"content-type: application/json\r\ncontent-length: {len(content)}"] if body else []),
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def check_request(headers: dict[str, str], method: str = "GET", path: str = "/", body: bytes = b"") -> bytes:
    """The CheckRequest that Envoy would send for such a request."""
    request = _Request()
    http = request.attributes.request.http
    http.method, http.path, http.raw_body = method, path, body
    for name, value in headers.items():
        http.header_map.headers.add(key=name, raw_value=value.encode())
    return bytes(request.SerializeToString())
