"""Who is calling? From a request's token to a verified Identity, or a refusal. Pure.

`now` is in seconds since the epoch. The rules of form are stricter than the RFCs (docs/tokens.md lists them). Once they
are met, PyJWT does the cryptography.
Sources: RFC 7515 (JWS), RFC 7519 (JWT), RFC 8725 (JWT best current practices), RFC 6750 (Bearer).
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jwt
from jwt.algorithms import get_default_algorithms

from ext_authz.core import strict_json
from ext_authz.core.clearance import claims_read, clearance
from ext_authz.core.headers import TOKEN_HEADERS
from ext_authz.core.jwk import Key
from ext_authz.core.model import Claims, Identity, Reason, Refusal, Request
from ext_authz.core.policy import Issuer, Policy

MAX_TOKEN = 16 * 1024  # bytes
MAX_SUBJECT = 1024  # bytes
MAX_DEPTH = 16
_MAX_TIME = 2**53
_NUMBERS = (int, float)  # not bool, although a bool is an int
_CACHED_HEADERS = 128

Keys = Mapping[str, tuple[Key, ...]]

_AUTHORIZATION, _BARE = TOKEN_HEADERS
_TYPES = frozenset({"jwt", "at+jwt"})
_FORBIDDEN_HEADERS = frozenset({"crit", "b64", "zip"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ALGORITHMS = get_default_algorithms()
_STANDARD = bytes.maketrans(b"-_+/=", b"+/***")  # what base64url lacks becomes `*`, which base64 lacks too
# By the length of a part modulo 4: its padding, and the last characters that set no unused bit (RFC 4648 §3.5).
_ENDS = ((b"", bytes(range(128))), (b"===", b""), (b"==", b"AQgw"), (b"=", b"AEIMQUYcgkosw048"))


def token_of(request: Request) -> str | Refusal | None:
    """The request's token: None if it has none, a refusal if it has several or a malformed one."""
    value, bare = request.headers.get(_AUTHORIZATION), request.headers.get(_BARE)
    if value is None and bare is None:
        return None
    if (value is not None and bare is not None) or not request.repeated.isdisjoint(TOKEN_HEADERS):
        return _invalid("more than one token")
    if len(value or bare or "") > MAX_TOKEN + len("Bearer "):
        return _invalid(f"the token is over {MAX_TOKEN} bytes")
    if value is None:
        return bare
    scheme, _, rest = value.partition(" ")
    token = rest.strip(" ")
    if scheme.lower() != "bearer" or not token or " " in token:
        return _invalid("the authorization header is not `Bearer TOKEN`")
    return token


def anonymous(policy: Policy) -> Identity | Refusal:
    """The identity of a caller without a token: the policy's anonymous tier, or a refusal (401)."""
    if policy.anonymous is None:
        return Refusal(Reason.TOKEN_REQUIRED, "a token is required")
    return Identity(policy.anonymous)


def verify(policy: Policy, keys: Keys, token: str, now: float) -> Identity | Refusal:
    """The identity that `token` proves at time `now`, or why it proves none."""
    try:
        header, claims, signed, signature = _parse(token)
        issuer = _issuer(policy, claims)
        if header.alg not in issuer.algorithms:
            raise _BadToken("the token's algorithm is not one of its issuer's")
    except _BadToken as e:
        return _invalid(str(e))
    known = keys.get(issuer.issuer)
    if known is None:
        return Refusal(Reason.KEYS_UNAVAILABLE, "the keys of the token's issuer are not loaded yet", issuer.issuer)
    try:
        key = _key(known, header)
        if key is None:
            return Refusal(Reason.INVALID_TOKEN, "no key of the issuer matches the token", issuer.issuer)
        if not _genuine(key, header.alg, signed, signature):
            raise _BadToken("the token's signature is not valid")
        expires = _claims(policy, issuer, claims, now)
        if policy.max_entries is not None and _entries(claims_read(policy, claims)) > policy.max_entries:
            raise _BadToken(
                f"the token's claims hold over {policy.max_entries} entries, more than conditions go through"
            )
    except _BadToken as e:
        return _invalid(str(e))
    tier, errors = clearance(policy, claims)
    return Identity(tier, claims.get("sub", ""), issuer.issuer, claims, expires, errors)


class _BadToken(Exception):
    """Unwinds to `verify`, which turns it into a Refusal. Its text never contains any of the token."""


class _Header(NamedTuple):
    """A token's header, once it has been checked. `kid` None: it names no key."""

    alg: str
    kid: str | None


class _Parsed(NamedTuple):
    """The parts of a token; `signed` is the text that `signature` covers (RFC 7515 §5.2)."""

    header: _Header
    claims: Claims
    signed: bytes
    signature: bytes


def _parse(token: str) -> _Parsed:
    if len(token) > MAX_TOKEN:
        raise _BadToken(f"the token is over {MAX_TOKEN} bytes")
    try:
        data = token.encode("ascii")
    except UnicodeEncodeError:
        raise _BadToken("the token is not ASCII") from None
    parts = data.split(b".")
    if len(parts) != 3:
        raise _BadToken("the token does not have three parts")
    header, claims, signature = parts
    signed = data[: -1 - len(signature)]
    return _Parsed(_header(header), _object(_base64url(claims), "payload"), signed, _base64url(signature))


@lru_cache(_CACHED_HEADERS)
def _header(part: bytes) -> _Header:
    """Cached, because an issuer's tokens share a few headers. (Exceptions are not cached.)

    `jwk`, `jku`, `x5u` and `x5c` are never read.
    """
    header = _object(_base64url(part), "header")
    alg, kid, typ = header.get("alg"), header.get("kid"), header.get("typ", "jwt")
    if not isinstance(alg, str):
        raise _BadToken("the token's algorithm is not one of its issuer's")
    if _FORBIDDEN_HEADERS.intersection(header):
        raise _BadToken("the token's header has an extension that is not supported")
    if "kid" in header and not isinstance(kid, str):
        raise _BadToken("the token's key id is not a string")
    if not isinstance(typ, str) or typ.lower().removeprefix("application/") not in _TYPES:
        raise _BadToken("the token's type is not JWT")
    return _Header(alg, kid)


def _base64url(part: bytes) -> bytes:
    """Decode base64url without padding (RFC 7515 §2). Texts that no encoder would write are refused."""
    padding, last = _ENDS[len(part) % 4]
    try:
        data = binascii.a2b_base64(part.translate(_STANDARD) + padding, strict_mode=True)
    except binascii.Error:
        raise _BadToken("a part of the token is not base64url") from None
    if not part:
        raise _BadToken("a part of the token is not base64url")
    if part[-1] not in last:
        raise _BadToken("a part of the token has unused bits set")
    return data


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = strict_json.loads(data, MAX_DEPTH)
    except ValueError as e:
        raise _BadToken(f"the token's {what} {e}") from None
    if not isinstance(value, dict):
        raise _BadToken(f"the token's {what} is not an object")
    return value


def _issuer(policy: Policy, claims: Claims) -> Issuer:
    iss = claims.get("iss")
    issuer = policy.issuers.get(iss) if isinstance(iss, str) else None
    if issuer is None:
        raise _BadToken("the token's issuer is not trusted")
    return issuer


def _key(known: tuple[Key, ...], header: _Header) -> Key | None:
    """The key that the token names; without a `kid`, the key that fits, if exactly one does."""
    alg, kid = header
    if kid is not None:
        for key in known:
            if key.kid == kid and alg in key.algorithms:
                return key
        return None
    fitting = [key for key in known if alg in key.algorithms]
    return fitting[0] if len(fitting) == 1 else None


def _genuine(key: Key, alg: str, signed: bytes, signature: bytes) -> bool:
    """Whether `key` made the signature. (PyJWS.decode would parse the whole token again.)"""
    try:
        return _ALGORITHMS[alg].verify(signed, key.material, signature) is True
    except (jwt.PyJWTError, ValueError, TypeError):
        return False


def _claims(policy: Policy, issuer: Issuer, claims: Claims, now: float) -> float:
    """Check the registered claims (RFC 7519 §4.1); return when the token expires, leeway included."""
    aud = claims.get("aud")
    if not isinstance(aud, str) and not (isinstance(aud, list) and all(isinstance(a, str) for a in aud)):
        raise _BadToken("the token has no usable audience")
    if issuer.audiences.isdisjoint((aud,) if isinstance(aud, str) else aud):
        raise _BadToken("the token is for another audience")
    exp, nbf, iat = _time(claims, "exp"), _time(claims, "nbf"), _time(claims, "iat")
    if exp is None:
        raise _BadToken("the token has no expiry")
    if now >= exp + policy.leeway:
        raise _BadToken("the token has expired")
    if nbf is not None and now < nbf - policy.leeway:
        raise _BadToken("the token is not valid yet")
    if iat is not None and now < iat - policy.leeway:
        raise _BadToken("the token was issued in the future")
    sub = claims.get("sub", "")
    if not isinstance(sub, str) or not _usable(sub):
        raise _BadToken("the token's subject is not usable")
    if not isinstance(claims.get("jti", ""), str):
        raise _BadToken("the token's id is not a string")
    if policy.revoked.covers(claims):
        raise _BadToken("the token is revoked")
    return exp + policy.leeway


def _entries(value: Any) -> int:
    """The members of all objects and the elements of all lists in it. Bounded: a token is at most 16 KiB, 16 deep."""
    if isinstance(value, Mapping):
        return len(value) + sum(map(_entries, value.values()))
    return len(value) + sum(map(_entries, value)) if isinstance(value, list) else 0


def _usable(subject: str) -> bool:
    if len(subject) > MAX_SUBJECT:
        return False
    if subject.isascii() and subject.isprintable():
        return True
    return not _CONTROL.search(subject) and len(subject.encode()) <= MAX_SUBJECT


def _time(claims: Claims, name: str) -> float | None:
    """A NumericDate (RFC 7519 §2): a finite JSON number, in seconds since the epoch; None if absent."""
    value: Any = claims.get(name)
    if value is None and name not in claims:
        return None
    if type(value) not in _NUMBERS or not -_MAX_TIME < value < _MAX_TIME:
        raise _BadToken(f"the token's {name} is not a time")
    return float(value)


def _invalid(detail: str) -> Refusal:
    return Refusal(Reason.INVALID_TOKEN, detail)
