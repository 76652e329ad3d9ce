"""Private keys, made once, and the key sets and secrets that issuers publish of them."""

from __future__ import annotations

import hmac
import json
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import get_default_algorithms

from tests.oracle.keys import RSA

ALGORITHMS = get_default_algorithms()
_CURVES = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
_NAMES = (
    "ES256-1", "ES256-2", "ES256-3", "ES256-1", "ES256-2", "ES384-1", "ES512-1", "RS256-1", "RS256-1", "EdDSA-1",
    "EdDSA-2",
)  # fmt: skip
_USES: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {"use": "sig"}, {"key_ops": ["verify"]}, {"use": "enc"}, {"key_ops": ["sign"]},
)  # fmt: skip
_BROKEN: tuple[Any, ...] = (
    {"kty": "EC", "crv": "P-256", "d": "AA"}, {"kid": "k9"}, 5, {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
    {"kty": "RSA", "n": "_" * 171, "e": "AQAB"}, {"kty": "OKP", "crv": "Ed25519", "x": "AA=="}, {"kty": "EC", "crv": 5},
    {"kty": "OKP", "crv": "X25519", "x": "AA"}, {"kty": "RSA", "use": 5}, {"kty": "RSA", "key_ops": "verify"},
)  # fmt: skip


@dataclass(frozen=True)
class Signer:
    """What an issuer signs with. `kid` None: its key has none. `usable`: most likely, its tokens are valid."""

    issuer: str
    alg: str
    kid: str | None
    key: Any
    usable: bool = True

    def sign(self, signed: bytes) -> bytes:
        if isinstance(self.key, bytes):  # PyJWT refuses the text of a public key, which an attacker would use
            return hmac.digest(self.key, signed, f"sha{self.alg[2:]}")
        return bytes(ALGORITHMS[self.alg].sign(signed, self.key))


@cache
def private(name: str) -> Any:
    """The key of this name. EC keys are the same in every run."""
    alg, _, number = name.partition("-")
    if alg in _CURVES:
        return ec.derive_private_key(0x5EED << 200 | int(number), _CURVES[alg])
    if alg == "EdDSA":
        kind = ed25519.Ed25519PrivateKey if number == "1" else ed448.Ed448PrivateKey
        return kind.from_private_bytes(b"k" * (32 if number == "1" else 57))
    return rsa.generate_private_key(65537, 2048)


@cache
def _public(name: str) -> str:
    """The JWK of a key, as text."""
    alg = name.partition("-")[0]
    entry = ALGORITHMS[alg].to_jwk(private(name).public_key(), as_dict=True)
    return json.dumps({k: v for k, v in entry.items() if k != "key_ops"})


@cache
def pem(name: str) -> bytes:
    """A public key as text, which some verifiers mistake for a secret."""
    return bytes(private(name).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def shared_secret(rng: random.Random, issuer: str) -> tuple[bytes, list[Signer]]:
    """A secret file, and what signs with it."""
    size = rng.choice((32, 47, 48, 63, 64, 80))
    secret = bytes(rng.choices(range(33, 127), k=size))
    strong = [alg for alg, least in (("HS256", 32), ("HS384", 48), ("HS512", 64)) if size >= least]
    return secret + rng.choice((b"", b"\n", b"\r\n")), [Signer(issuer, alg, None, secret) for alg in strong]


def key_set(rng: random.Random, issuer: str) -> tuple[bytes, list[Signer]]:
    """A JWK Set, and what signs for its keys, whether or not the set is one to accept."""
    entries: list[Any] = []
    signers: list[Signer] = []
    names = rng.sample(_NAMES, rng.randint(1, 3))
    kids = rng.sample(("k1", "k2", "k3", "", "a key"), 3) if rng.random() < 0.9 else ["k1", "k1", "k1"]
    for name, kid in zip(names, kids, strict=False):
        alg = rng.choice(RSA) if name.startswith("RS") else name.partition("-")[0]
        entry = json.loads(_public(name)) | ({"alg": alg} if rng.random() < 0.5 else {})
        entry |= rng.choice(_USES)
        named = rng.random() < 0.9
        entry |= {"kid": kid} if named else {}
        usable = entry.get("use") != "enc" and entry.get("key_ops") != ["sign"]
        entries.append(entry)
        for used in (alg, rng.choice(RSA)) if alg in RSA else (alg,):
            fits = entry.get("alg", used) == used
            signers.append(Signer(issuer, used, kid if named else None, private(name), usable and fits))
    entries += rng.choices(({"kty": "oct", "k": "c2VjcmV0"}, {"kty": "EC", "crv": "secp256k1"}, {"kty": "AKP"}), k=1)
    if rng.random() < 0.12:
        entries.append(rng.choice((*_BROKEN, {**entries[0], "kid": 5}, {**entries[0], "alg": "RS1"})))
    if rng.random() < 0.03:
        return rng.choice((b'{"keys": []}', b'{"keys": {}}', b"[]", b"{")), signers
    return json.dumps({"keys": rng.sample(entries, len(entries))}).encode(), signers
