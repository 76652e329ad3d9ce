"""An issuer's keys, from the bytes of its JWK Set or of its secret: docs/tokens.md, "Keys"."""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from tests.oracle import json_text

RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512", "Ed25519": "EdDSA", "Ed448": "EdDSA"}
PRIVATE = ("d", "p", "q", "dp", "dq", "qi", "oth", "priv")
HMAC = {"HS256": 32, "HS384": 48, "HS512": 64}


@dataclass(frozen=True)
class Key:
    """A key, and the algorithms that it verifies. `material` is what PyJWT verifies with."""

    kid: str | None
    algorithms: tuple[str, ...]
    material: Any


def secret(data: bytes) -> list[Key]:
    """The key that an issuer shares with the proxy; one line break at its end does not count."""
    data = data[:-2] if data.endswith(b"\r\n") else data[:-1] if data.endswith(b"\n") else data
    return [Key(None, tuple(alg for alg, least in HMAC.items() if len(data) >= least), data)]


def jwk_set(data: bytes) -> list[Key]:
    """The keys of a JWK Set that verify tokens; ValueError if the set is rejected."""
    document = json_text.read(data, 16)
    if not isinstance(document, dict) or not isinstance(document.get("keys"), list):
        raise ValueError("not a JWK Set")
    objects = [entry for entry in document["keys"] if isinstance(entry, dict)]
    if any(name in entry for entry in objects if entry.get("kty") != "oct" for name in PRIVATE):
        raise ValueError("a private key")
    found: dict[tuple[Any, ...], Key] = {}
    for place, entry in enumerate(objects):
        with suppress(ValueError):
            key = _key(entry)
            found.setdefault((entry["kty"], key.kid) if key.kid is not None else (place,), key)
    return list(found.values())


def _key(entry: dict[str, Any]) -> Key:
    """One key; ValueError if it cannot be used, or is for something else."""
    if not all(isinstance(entry.get(name, ""), str) for name in ("kty", "kid", "alg", "use")):
        raise ValueError("a member is not a text")
    kind, curve = entry.get("kty"), entry.get("crv")
    if kind == "RSA":
        verifies: tuple[str, ...] = RSA
    elif (kind == "EC" and curve in ("P-256", "P-384", "P-521")) or (kind == "OKP" and curve in ("Ed25519", "Ed448")):
        verifies = (CURVES[curve],)
    else:
        raise ValueError("another type")
    operations = entry.get("key_ops", ["verify"])
    verifies = tuple(alg for alg in verifies if entry.get("alg", alg) == alg)
    if entry.get("use", "sig") != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise ValueError("for something else")
    if not verifies:
        raise ValueError("for another algorithm")
    return Key(entry.get("kid"), verifies, _material(entry))


def _material(entry: dict[str, Any]) -> Any:
    """The public key; ValueError if it is broken or too short."""
    names = {"RSA": ("n", "e"), "EC": ("crv", "x", "y"), "OKP": ("crv", "x")}[entry["kty"]]
    for name in names:
        text = entry.get(name)
        if not isinstance(text, str) or not re.fullmatch("[A-Za-z0-9_-]+", text):
            raise ValueError(f"{name} is not base64url")
    alg = "RS256" if entry["kty"] == "RSA" else CURVES[entry["crv"]]
    try:
        key = PyJWK(json.loads(json.dumps({n: entry[n] for n in ("kty", *names)})), alg).key
    except PyJWTError:
        raise ValueError("broken") from None
    if isinstance(key, RSAPublicKey) and not 2048 <= key.key_size <= 16384:
        raise ValueError("too short")
    return key


def decoded(part: str) -> bytes:
    """The bytes of a base64url text with one spelling: no padding, no unused bits; ValueError for any other."""
    if not re.fullmatch("[A-Za-z0-9_-]+", part) or len(part) % 4 == 1:
        raise ValueError("not base64url")
    data = urlsafe_b64decode(part + "=" * (-len(part) % 4))
    spare = {0: 0, 2: 4, 3: 2}[len(part) % 4]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    if alphabet.index(part[-1]) % 2**spare:
        raise ValueError("unused bits are set")
    return data
