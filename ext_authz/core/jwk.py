"""JSON Web Key Sets and shared secrets, parsed into keys that can only verify what they are meant for. Pure.

A key that cannot be used, because it is weak, broken or of a kind that is not known here, is skipped and named: real
providers publish such keys beside good ones. A private key makes the whole set invalid. A set without any usable key is
a set: no token verifies with it, which is how an issuer, or the operator, distrusts the last key.
Source: RFC 7517 (JWK; §5 says to skip), RFC 7518 §6 (RSA and EC members), RFC 8037 §2 (OKP), and docs/tokens.md for
what is stricter.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode, urlsafe_b64decode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from jwt.algorithms import ECAlgorithm, HMACAlgorithm, OKPAlgorithm, RSAAlgorithm
from jwt.exceptions import PyJWTError

from ext_authz.core.strict_json import loads

MAX_BYTES = 256 * 1024
MAX_KEYS = 100


@dataclass(frozen=True, slots=True, eq=False)
class Key:
    """A verification key. `algorithms` are the JWS algorithms it may be used with, never empty.

    `material` is what PyJWS.decode takes as its key: a public key of `cryptography`, or the bytes of a secret.
    """

    kid: str | None
    algorithms: frozenset[str]
    material: Any


@dataclass(frozen=True, slots=True)
class _Kind:
    """How to read one key type and curve: the algorithms it can verify, its public members, and PyJWT's reader."""

    algorithms: frozenset[str]
    members: tuple[str, ...]
    read: Callable[[dict[str, Any]], Any]


_RSA = _Kind(frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}), ("n", "e"), RSAAlgorithm.from_jwk)

_KINDS: Mapping[tuple[str, str | None], _Kind] = {
    ("RSA", None): _RSA,
    ("EC", "P-256"): _Kind(frozenset({"ES256"}), ("x", "y"), ECAlgorithm.from_jwk),
    ("EC", "P-384"): _Kind(frozenset({"ES384"}), ("x", "y"), ECAlgorithm.from_jwk),
    ("EC", "P-521"): _Kind(frozenset({"ES512"}), ("x", "y"), ECAlgorithm.from_jwk),
    ("OKP", "Ed25519"): _Kind(frozenset({"EdDSA"}), ("x",), OKPAlgorithm.from_jwk),
    ("OKP", "Ed448"): _Kind(frozenset({"EdDSA"}), ("x",), OKPAlgorithm.from_jwk),
}

# RFC 7518 §6.2.2 and §6.3.2; `priv` is the private member of the AKP type.
_PRIVATE = ("d", "p", "q", "dp", "dq", "qi", "oth", "priv")

# RFC 7518 §3.2: a secret is at least as long as the hash.
_HMAC = ((32, "HS256"), (48, "HS384"), (64, "HS512"))

_RSA_BITS = range(2048, 16384 + 1)
_RSA_EXPONENTS = range(3, 2**32, 2)


def _powers(base: int, prime: int) -> frozenset[int]:
    """The residues of all powers of `base`."""
    return frozenset(pow(base, exponent, prime) for exponent in range(prime))


# The library makes primes whose residues are powers of 65537. Of other keys one in 2^27 has such a modulus. Source:
# Nemec et al., "The Return of Coppersmith's Attack", 2017, §2.
_ROCA = tuple(
    (p, _powers(65537, p)) for p in (11, 13, 17, 19, 37, 53, 61, 71, 73, 79, 97, 103, 107, 109, 127, 151, 157)
)


@dataclass(frozen=True, slots=True)
class KeySet:
    """The usable signature keys of a set, in its order; `skipped` names the others and says why, a line each."""

    keys: tuple[Key, ...]
    skipped: tuple[str, ...] = ()


def parse_jwks(data: bytes) -> KeySet:
    """The keys of a JWK Set.

    ValueError if the set is malformed or holds a private key; the message is one line and names the key by its position
    and `kid`, and never contains a byte of any key.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"holds over {MAX_BYTES} bytes")
    document = loads(data)
    entries = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise ValueError("is not a JWK Set: expected an object with a list `keys`")
    if len(entries) > MAX_KEYS:
        raise ValueError(f"holds {len(entries)} keys, at most {MAX_KEYS} are allowed")
    keys: list[Key] = []
    skipped: list[str] = []
    seen: set[tuple[str, str]] = set()
    for place, entry in enumerate(entries):
        _refuse_private(place, entry)
        try:
            key = _key(entry)
            if key is not None and key.kid is not None and (entry["kty"], key.kid) in seen:
                raise ValueError("another key of this type has the same kid")
        except ValueError as e:
            skipped.append(f"{_label(place, entry)}: {e}")
            continue
        if key is not None:
            keys.append(key)
            if key.kid is not None:
                seen.add((entry["kty"], key.kid))
    return KeySet(tuple(keys), tuple(skipped))


def _refuse_private(place: int, entry: Any) -> None:
    """ValueError for a key that must never have been published."""
    if isinstance(entry, dict) and entry.get("kty") != "oct" and (found := [n for n in _PRIVATE if n in entry]):
        advice = "publish public keys only, and replace this one"
        raise ValueError(f"{_label(place, entry)}: holds the private member {found[0]}: {advice}")


def secret_key(data: bytes) -> Key:
    """The key in a secret file, without one trailing newline; HS256 needs 32 bytes, HS384 48, HS512 64.

    ValueError for a shorter one, and for what looks like another kind of key: if a public key were taken for a secret,
    anyone who knows it could sign.
    """
    secret = data.removesuffix(b"\n").removesuffix(b"\r") if data.endswith(b"\n") else data
    algorithms = frozenset(name for size, name in _HMAC if len(secret) >= size)
    if not algorithms:
        raise ValueError(f"the secret has {len(secret)} bytes, at least {_HMAC[0][0]} are needed")
    try:
        HMACAlgorithm(HMACAlgorithm.SHA256).prepare_key(secret)
    except PyJWTError:
        raise ValueError("is a public key, certificate or JWK, not a secret") from None
    return Key(None, algorithms, secret)


def key_text(key: Key) -> str:
    """A parsed key, as ASCII text for another process of ours. The text contains the key material, secrets too."""
    secret = isinstance(key.material, bytes)
    form = Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    material = b64encode(key.material) if secret else key.material.public_bytes(*form)
    return json.dumps([key.kid, sorted(key.algorithms), secret, material.decode()])


def key_of_text(text: str) -> Key:
    """The key that `key_text` wrote; ValueError for anything else."""
    try:
        kid, algorithms, secret, material = json.loads(text)
        return Key(
            kid, frozenset(algorithms), b64decode(material) if secret else load_pem_public_key(material.encode())
        )
    except (ValueError, TypeError, AttributeError, UnsupportedAlgorithm):
        raise ValueError("is not a key") from None


def _key(entry: Any) -> Key | None:
    """The key of one entry; None if it is for another use."""
    if not isinstance(entry, dict):
        raise ValueError("is not an object")
    kty, kid, alg = _text(entry, "kty"), _text(entry, "kid"), _text(entry, "alg")
    if kty is None:
        raise ValueError("has no kty")
    if kty == "oct":
        return None
    kind = _KINDS.get((kty, None if kty == "RSA" else _text(entry, "crv")))
    if kind is None or not _for_signatures(entry):
        return None
    algorithms = kind.algorithms if alg is None else kind.algorithms & {alg}
    if not algorithms:
        raise ValueError(f"alg {_shown(alg)} is not one that a key of its type verifies here")
    octets = {name: _octets(entry, name) for name in kind.members}
    if kind is _RSA:
        _check_rsa(int.from_bytes(octets["n"]), int.from_bytes(octets["e"]))
    try:
        # Pass on only the members that have been checked.
        material = kind.read({name: entry[name] for name in ("kty", "crv", *kind.members) if name in entry})
    except (PyJWTError, ValueError, UnsupportedAlgorithm):
        raise ValueError(f"is not a valid {kty} public key") from None
    return Key(kid, algorithms, material)


def _for_signatures(entry: Mapping[str, Any]) -> bool:
    """Whether `use` and `key_ops` allow the key to verify (RFC 7517 §4.2, §4.3)."""
    if _text(entry, "use") not in (None, "sig"):
        return False
    if "key_ops" not in entry:
        return True
    operations = entry["key_ops"]
    if not isinstance(operations, list):
        raise ValueError("key_ops is not a list")
    return "verify" in operations


def _check_rsa(modulus: int, exponent: int) -> None:
    bits = modulus.bit_length()
    if bits not in _RSA_BITS:
        raise ValueError(f"is an RSA key of {bits} bits, expected {_RSA_BITS[0]} to {_RSA_BITS[-1]}")
    if exponent not in _RSA_EXPONENTS or modulus % 2 == 0:
        raise ValueError("is an RSA key with an impossible modulus or exponent")
    if all(modulus % prime in residues for prime, residues in _ROCA):
        raise ValueError("is an RSA key of a library whose keys can be factored (ROCA, CVE-2017-15361)")


def _text(entry: Mapping[str, Any], name: str) -> str | None:
    value = entry.get(name)
    if value is None and name not in entry:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a string")
    return value


def _octets(entry: Mapping[str, Any], name: str) -> bytes:
    """A member's bytes, from base64url without padding or other characters (RFC 7515 §2): PyJWT would accept them."""
    text = _text(entry, name)
    if not text or re.fullmatch("[A-Za-z0-9_-]+", text) is None or len(text) % 4 == 1:
        raise ValueError(f"{name} is not base64url")
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _shown(text: str | None) -> str:
    return f"{(text or '')[:64]!a}"


def _label(place: int, entry: Any) -> str:
    kid = entry.get("kid") if isinstance(entry, dict) else None
    return f"keys[{place}] (kid {kid[:64]!a})" if isinstance(kid, str) else f"keys[{place}]"
