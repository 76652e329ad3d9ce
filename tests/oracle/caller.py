"""Who is calling: docs/tokens.md, rule by rule."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from jwt.algorithms import get_default_algorithms

from tests.oracle import json_text
from tests.oracle.keys import Key, decoded

Headers = Sequence[tuple[str, bytes]]
Keys = Mapping[str, Sequence[Key] | None]

MAX_TOKEN = 16 * 1024
MAX_TIME = 2**53
_ALGORITHMS = get_default_algorithms()


class RefusedError(Exception):
    """The request is denied for this reason. `fresh`: newer keys of this issuer are looked for first."""

    def __init__(self, reason: str, fresh: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fresh = fresh


@dataclass(frozen=True)
class Caller:
    """A verified caller, or the anonymous one."""

    anonymous: bool = True
    claims: dict[str, Any] = field(default_factory=dict)


def caller(policy: Mapping[str, Any], keys: Keys, headers: Headers, leeway: float, now: float) -> Caller:
    """The caller of a request, or RefusedError."""
    sent = [(name, value) for name, value in headers if name in ("authorization", "x-expert-access-token")]
    if not sent:
        if policy.get("anonymous", "deny") == "deny":
            raise RefusedError("token_required")
        return Caller()
    if len(sent) > 1:
        raise RefusedError("invalid_token")
    [(name, value)] = sent
    text = value.decode("latin-1")
    if len(text) > MAX_TOKEN + len("Bearer "):
        raise RefusedError("invalid_token")
    if name == "authorization":
        bearer = re.fullmatch(r"[Bb][Ee][Aa][Rr][Ee][Rr] +([^ ]*) *", text, re.DOTALL)
        text = bearer[1] if bearer else ""
    try:
        return Caller(False, _verified(policy, keys, text, leeway, now))
    except ValueError:
        raise RefusedError("invalid_token") from None


def _verified(policy: Mapping[str, Any], keys: Keys, token: str, leeway: float, now: float) -> dict[str, Any]:
    """The claims of a token; ValueError for a bad one."""
    _must(len(token) <= MAX_TOKEN)
    parts = token.split(".")
    _must(len(parts) == 3)
    head, payload, signature = map(decoded, parts)
    header, claims = json_text.read(head, 16), json_text.read(payload, 16)
    _must(isinstance(header, dict) and isinstance(claims, dict))
    _check_header(header)
    issuer = _issuer(policy, claims)
    _must(header.get("alg") in issuer["algorithms"])
    key = _key(keys, issuer, header)
    signed = f"{parts[0]}.{parts[1]}".encode()
    _must(_signed(key, header["alg"], signed, signature))
    _check_claims(claims, issuer["audiences"])
    _check_times(claims, leeway, now)
    _must(not _revoked(policy.get("revoked", {}), claims))
    return claims


def _must(holds: bool) -> None:
    if not holds:
        raise ValueError("a bad token")


def _check_header(header: dict[str, Any]) -> None:
    _must(not header.keys() & {"crit", "b64", "zip"})
    _must(isinstance(header.get("alg"), str))
    _must(isinstance(header.get("kid", ""), str))
    typ = header.get("typ", "JWT")
    _must(isinstance(typ, str) and typ.lower() in ("jwt", "at+jwt", "application/jwt", "application/at+jwt"))


def _issuer(policy: Mapping[str, Any], claims: dict[str, Any]) -> dict[str, Any]:
    named = [i for i in policy.get("issuers", []) if i["issuer"] == claims.get("iss")]
    _must(len(named) == 1)
    return dict(named[0])


def _key(keys: Keys, issuer: dict[str, Any], header: dict[str, Any]) -> Key:
    """The key that the token's header names, or the only one that fits."""
    name, alg = issuer["issuer"], header["alg"]
    known = keys.get(name)
    if known is None:
        raise RefusedError("keys_unavailable", name)
    fitting = [key for key in known if alg in key.algorithms and ("kid" not in header or key.kid == header["kid"])]
    if len(fitting) != 1:
        raise RefusedError("invalid_token", name)
    return fitting[0]


def _signed(key: Key, alg: str, signed: bytes, signature: bytes) -> bool:
    return bool(_ALGORITHMS[alg].verify(signed, key.material, signature))


def _check_claims(claims: dict[str, Any], audiences: Sequence[str]) -> None:
    aud = claims.get("aud")
    meant = [aud] if isinstance(aud, str) else aud
    _must(isinstance(meant, list) and all(isinstance(a, str) for a in meant))
    _must(any(a in audiences for a in meant or []))
    sub = claims.get("sub", "")
    _must(isinstance(sub, str) and len(sub.encode()) <= 1024)  # half a surrogate pair is a ValueError
    _must(not re.search(r"[\x00-\x1f\x7f-\x9f]", sub))
    _must(isinstance(claims.get("jti", ""), str))
    _must("exp" in claims)
    for name in ("exp", "nbf", "iat"):
        time = claims.get(name, 0)
        _must(isinstance(time, (int, float)) and not isinstance(time, bool) and -MAX_TIME < time < MAX_TIME)


def _check_times(claims: dict[str, Any], leeway: float, now: float) -> None:
    _must(now < claims["exp"] + leeway)
    _must(claims.get("nbf", now) <= now + leeway)
    _must(claims.get("iat", now) <= now + leeway)


def _revoked(revoked: Mapping[str, Any], claims: dict[str, Any]) -> bool:
    if claims.get("jti") in revoked.get("jti", []) or claims.get("sub") in revoked.get("sub", []):
        return True
    before = revoked.get("issued_before")
    if before is None:
        return False
    return "iat" not in claims or claims["iat"] < datetime.fromisoformat(before).timestamp()
