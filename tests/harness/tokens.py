"""Real keys and really signed tokens, including hostile ones. Keys are generated once per process."""

from __future__ import annotations

import json
import time
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import get_default_algorithms

ISSUER = "https://idp.example.com/"
AUDIENCE = "moe-gateway"
ALGORITHMS = ("RS256", "PS256", "ES256", "ES384", "ES512", "EdDSA")

_CURVES: Mapping[str, ec.EllipticCurve] = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
_ALGORITHMS = get_default_algorithms()


@cache
def private_key(alg: str, name: str = "") -> Any:
    """The key that signs with `alg`, one for each `name`. HS256's is a secret of 64 bytes."""
    if alg.startswith("HS"):
        return f"a secret of sixty-four bytes for the tests only {name}".ljust(64, ".").encode()
    if alg.startswith(("RS", "PS")):
        return rsa.generate_private_key(65537, 2048)
    if alg == "EdDSA":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(_CURVES[alg])


def jwk(alg: str, name: str = "", /, **members: Any) -> dict[str, Any]:
    """The public key of `private_key(alg, name)` as its issuer publishes it; `members` are added, None removes one."""
    public = _ALGORITHMS[alg].to_jwk(private_key(alg, name).public_key(), as_dict=True)
    plain = {k: v for k, v in public.items() if k != "key_ops"}
    full = {**plain, "use": "sig", "alg": alg, "kid": kid_of(alg, name), **members}
    return {k: v for k, v in full.items() if v is not None}


def jwks(*algs: str, name: str = "") -> bytes:
    """The JWK Set with a key for each of `algs` (default: all of `ALGORITHMS`)."""
    return json.dumps({"keys": [jwk(a, name) for a in algs or ALGORITHMS]}).encode()


def kid_of(alg: str, name: str = "") -> str:
    return f"{alg}-{name}" if name else alg


def claims(**over: Any) -> dict[str, Any]:
    """The claims of a valid token; `over` replaces some, None removes one."""
    now = int(time.time())
    full = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "iat": now, "exp": now + 300, **over}
    return {k: v for k, v in full.items() if v is not None}


def sign(
    payload: Mapping[str, Any],
    alg: str = "ES256",
    kid: str | None = "",
    header: Mapping[str, Any] | None = None,
    name: str = "",
) -> str:
    """A token. `kid` defaults to the key's own, None removes it; `header` adds or replaces header members."""
    named = {} if kid is None else {"kid": kid or kid_of(alg, name)}
    full = {"alg": alg, "typ": "JWT", **named, **(header or {})}
    return raw_token(json.dumps(full).encode(), json.dumps(payload).encode(), alg, name)


def raw_token(header: bytes, payload: bytes, alg: str = "ES256", name: str = "") -> str:
    """A token over arbitrary bytes, properly encoded and signed with `alg`, whatever the header says."""
    return raw_parts(b64(header), b64(payload), alg, name)


def raw_parts(header: str, payload: str, alg: str = "ES256", name: str = "") -> str:
    """A token over two parts that are already encoded, perhaps badly: padded, with unused bits set, empty."""
    signed = f"{header}.{payload}"
    return f"{signed}.{b64(_ALGORITHMS[alg].sign(signed.encode(), private_key(alg, name)))}"


def b64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def with_unused_bit(part: str) -> str:
    """Another text that a lenient decoder decodes to the same bytes. The part's length must leave bits unused."""
    if len(part) % 4 not in (2, 3):
        raise ValueError("every bit of this part is used")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return part[:-1] + alphabet[alphabet.index(part[-1]) ^ 1]
