"""Tokens: good ones verify; anything else is refused, and the refusal repeats nothing of the token."""

from __future__ import annotations

import hashlib
import hmac
import json
from base64 import urlsafe_b64decode
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import get_default_algorithms

from ext_authz.core import identity
from ext_authz.core.check import identify
from ext_authz.core.condition import compile_condition
from ext_authz.core.identity import MAX_TOKEN, anonymous, token_of, verify
from ext_authz.core.jwk import parse_jwks, secret_key
from ext_authz.core.model import Identity, Reason, Refusal, Request
from ext_authz.core.policy import ClearanceRule, Issuer, Policy, Revoked
from ext_authz.core.snapshot import Snapshot
from tests.harness import tokens
from tests.harness.strategies import json_values
from tests.harness.tokens import AUDIENCE, ISSUER, b64, raw_parts, raw_token, sign, with_unused_bit

NOW = 1_800_000_000.0
LEEWAY = 30
OTHER = "https://other.example.com/"
SHARED = "https://secret.example.com/"
STRANGER = "https://stranger.example.com/"

_SIGNERS = get_default_algorithms()
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493

POLICY = Policy(
    tiers=("low", "high"),
    experts={},
    issuers={
        ISSUER: Issuer(ISSUER, frozenset({AUDIENCE, "second"}), frozenset(tokens.ALGORITHMS)),
        OTHER: Issuer(OTHER, frozenset({AUDIENCE}), frozenset({"ES256"})),
        SHARED: Issuer(SHARED, frozenset({AUDIENCE}), frozenset({"HS256"})),
    },
    anonymous=0,
    clearance=(ClearanceRule(compile_condition('claims.plan == "premium"', "clearance[0].when", 1), 1),),
    revoked=Revoked(frozenset({"stolen-token"}), frozenset({"mallory"}), issued_before=NOW - 86_400),
    leeway=LEEWAY,
)


@pytest.fixture(scope="module")
def keys() -> identity.Keys:
    """The keys of three issuers. The second has a key with the same `kid` as one of the first's."""
    other = json.dumps({"keys": [tokens.jwk("ES256", "other", kid="ES256")]}).encode()
    return {
        ISSUER: parse_jwks(tokens.jwks()).keys,
        OTHER: parse_jwks(other).keys,
        SHARED: (secret_key(key_of("HS256")),),
    }


def claims(**over: Any) -> dict[str, Any]:
    return tokens.claims(**{"iat": NOW, "exp": NOW + 300, **over})


def null(name: str) -> dict[str, Any]:
    """The claims of a good token, except that `name` is null."""
    return {**claims(), name: None}


def good(alg: str = "ES256", **over: Any) -> str:
    return sign(claims(**over), alg)


def header(alg: str = "ES256", **over: Any) -> dict[str, Any]:
    return {"alg": alg, "typ": "JWT", "kid": alg, **over}


def signed_by(fields: Mapping[str, Any], payload: Mapping[str, Any], alg: str, key: Any) -> str:
    """A token signed by `alg` with `key`, whatever its header says."""
    text = f"{b64(json.dumps(fields).encode())}.{b64(json.dumps(payload).encode())}"
    return f"{text}.{b64(_SIGNERS[alg].sign(text.encode(), key))}"


def with_header(**fields: Any) -> str:
    return sign(claims(), header=fields)


def by_eve(kid: str | None = "ES256", **fields: Any) -> str:
    """A token signed with a stranger's key."""
    return sign(claims(), name="eve", kid=kid, header=fields)


def at_other(**over: Any) -> str:
    """A good token of the second issuer, whose key shares a `kid` with one of the first's."""
    return sign(claims(iss=OTHER, **over), name="other", kid="ES256")


def as_json(token: str) -> str:
    """The flattened JSON serialisation (RFC 7515 §7.2.2)."""
    return json.dumps(dict(zip(("protected", "payload", "signature"), parts(token), strict=True)))


def mismatched(says: str, does: str) -> str:
    """A token whose header names one algorithm of a key and whose signature uses another."""
    return signed_by(header(says), claims(), does, key_of(says))


def raw_header(text: str | bytes) -> str:
    return raw_token(text.encode() if isinstance(text, str) else text, json.dumps(claims()).encode())


def raw_claims(text: str | bytes) -> str:
    return raw_token(json.dumps(header()).encode(), text.encode() if isinstance(text, str) else text)


def more_claims(text: str) -> str:
    """The claims of a good token, followed by more JSON members."""
    return raw_claims(json.dumps(claims())[:-1] + f", {text}}}")


def parts(token: str) -> list[str]:
    return token.split(".")


def repart(change: Callable[[list[str]], list[str]], token: str | None = None) -> str:
    return ".".join(change(parts(token or good())))


def resigned(signature: Callable[[bytes], bytes], alg: str = "ES256") -> str:
    """A good token with its signature changed by `signature`."""
    return repart(lambda p: [p[0], p[1], b64(signature(unb64(p[2])))], good(alg))


def unb64(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def public(alg: str, encoding: Encoding) -> bytes:
    found: bytes = key_of(alg).public_key().public_bytes(encoding, PublicFormat.SubjectPublicKeyInfo)
    return found


def key_of(alg: str) -> Any:
    return tokens.private_key(alg, "")


def by_secret(secret: bytes, issuer: str = ISSUER, **fields: Any) -> str:
    """Key confusion: an HMAC with something public. PyJWT would refuse to sign this; an attacker would not."""
    text = f"{b64(json.dumps({'alg': 'HS256', **fields}).encode())}.{b64(json.dumps(claims(iss=issuer)).encode())}"
    return f"{text}.{b64(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


def unused(which: int) -> str:
    """A good token with a bit set in one part that no decoder reads."""
    for n in range(12):
        split = parts(sign(claims(n="n" * n), header={"n": "n" * n}))
        if len(split[which]) % 4 in (2, 3):
            if which < 2:
                split[which] = with_unused_bit(split[which])
                return raw_parts(split[0], split[1])
            return ".".join([*split[:2], with_unused_bit(split[2])])
    raise AssertionError("no part has a length that leaves bits unused")


def der(raw: bytes) -> bytes:
    return encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))


def plus_order(raw: bytes) -> bytes:
    return raw[:32] + (int.from_bytes(raw[32:], "little") + ED25519_ORDER).to_bytes(32, "little")


def flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


# What a refusal says: each hostile token must fail for its own reason.
BASE64URL = "a part of the token is not base64url"
PARTS = "the token does not have three parts"
ALGORITHM = "the token's algorithm is not one of its issuer's"
SIGNATURE = "the token's signature is not valid"
KEY_ID = "the token's key id is not a string"
EXTENSION = "the token's header has an extension that is not supported"
TYPE = "the token's type is not JWT"
UNUSED_BITS = "a part of the token has unused bits set"
ASCII = "the token is not ASCII"
SIZE = "the token is over 16384 bytes"
JSON = "is not JSON"
OBJECT = "is not an object"
DUPLICATE = "has a duplicate name"
CONSTANT = "holds "
BOM = "starts with a byte order mark"
DEPTH = "is nested more than 16 deep"
NUMBER = "holds a number"
UTF8 = "is not UTF-8"
NO_EXPIRY = "the token has no expiry"
TIME = "not a time"
EXPIRED = "the token has expired"
EARLY = "not valid yet"
FUTURE = "issued in the future"
NO_AUDIENCE = "the token has no usable audience"
OTHER_AUDIENCE = "the token is for another audience"
UNTRUSTED = "the token's issuer is not trusted"
SUBJECT = "the token's subject is not usable"
TOKEN_ID = "the token's id is not a string"
REVOKED = "the token is revoked"

HOSTILE: list[tuple[str, str, Callable[[], str]]] = [
    # name, what the detail says, the token
    # ---- the algorithm
    ("alg none, no signature", BASE64URL, lambda: repart(lambda p: [b64(b'{"alg":"none"}'), p[1], ""])),
    ("alg none, no third part", PARTS, lambda: repart(lambda p: [b64(b'{"alg":"none"}'), p[1]])),
    ("alg none, another's signature", ALGORITHM, lambda: repart(lambda p: [b64(b'{"alg":"none"}'), p[1], p[2]])),
    ("alg None", ALGORITHM, lambda: with_header(alg="None")),
    ("alg nOnE", ALGORITHM, lambda: with_header(alg="nOnE")),
    ("alg HS256, RSA key in PEM as secret", ALGORITHM, lambda: by_secret(public("RS256", Encoding.PEM), kid="RS256")),
    ("alg HS256, RSA key in DER as secret", ALGORITHM, lambda: by_secret(public("RS256", Encoding.DER), kid="RS256")),
    ("alg HS256, EC key in PEM as secret", ALGORITHM, lambda: by_secret(public("ES256", Encoding.PEM), kid="ES256")),
    ("alg HS256, JWK as secret", ALGORITHM, lambda: by_secret(json.dumps(tokens.jwk("RS256")).encode())),
    ("alg HS256, empty secret", ALGORITHM, lambda: by_secret(b"")),
    ("alg HS256 at an issuer that has a secret, empty secret", SIGNATURE, lambda: by_secret(b"", SHARED)),
    ("alg of the other issuer", ALGORITHM, lambda: sign(claims(), "HS256", kid=None)),
    ("alg not in the other issuer's list", ALGORITHM, lambda: sign(claims(iss=OTHER), "RS256", kid="ES256")),
    ("alg list", ALGORITHM, lambda: with_header(alg=["ES256"])),
    ("alg object", ALGORITHM, lambda: with_header(alg={"ES256": 1})),
    ("alg number", ALGORITHM, lambda: with_header(alg=256)),
    ("alg null", ALGORITHM, lambda: with_header(alg=None)),
    ("alg true", ALGORITHM, lambda: with_header(alg=True)),
    ("alg empty", ALGORITHM, lambda: with_header(alg="")),
    ("alg missing", ALGORITHM, lambda: raw_header('{"typ": "JWT", "kid": "ES256"}')),
    ("alg in lower case", ALGORITHM, lambda: with_header(alg="es256")),
    ("alg with a space", ALGORITHM, lambda: with_header(alg="ES256 ")),
    ("alg not supported", ALGORITHM, lambda: with_header(alg="ES256K")),
    ("alg of an encryption", ALGORITHM, lambda: with_header(alg="RSA-OAEP", enc="A256GCM")),
    # ---- the header's other members
    ("kid number", KEY_ID, lambda: with_header(kid=7)),
    ("kid null", KEY_ID, lambda: with_header(kid=None)),
    ("kid list", KEY_ID, lambda: with_header(kid=["ES256"])),
    ("kid object", KEY_ID, lambda: with_header(kid={})),
    ("kid true", KEY_ID, lambda: with_header(kid=True)),
    ("crit", EXTENSION, lambda: with_header(crit=["exp"], exp=NOW)),
    ("crit empty", EXTENSION, lambda: with_header(crit=[])),
    ("crit null", EXTENSION, lambda: with_header(crit=None)),
    ("b64 false", EXTENSION, lambda: with_header(b64=False)),
    ("b64 true", EXTENSION, lambda: with_header(b64=True)),
    ("b64 false, critical", EXTENSION, lambda: with_header(b64=False, crit=["b64"])),
    ("zip", EXTENSION, lambda: with_header(zip="DEF")),
    ("zip null", EXTENSION, lambda: with_header(zip=None)),
    ("typ JOSE", TYPE, lambda: with_header(typ="JOSE")),
    ("typ of a logout token", TYPE, lambda: with_header(typ="logout+jwt")),
    ("typ of a DPoP proof", TYPE, lambda: with_header(typ="dpop+jwt")),
    ("typ of a security event", TYPE, lambda: with_header(typ="application/secevent+jwt")),
    ("typ of another media type", TYPE, lambda: with_header(typ="text/jwt")),
    ("typ application twice", TYPE, lambda: with_header(typ="application/application/jwt")),
    ("typ with a space", TYPE, lambda: with_header(typ="JWT ")),
    ("typ empty", TYPE, lambda: with_header(typ="")),
    ("typ null", TYPE, lambda: with_header(typ=None)),
    ("typ number", TYPE, lambda: with_header(typ=1)),
    ("typ list", TYPE, lambda: with_header(typ=["JWT"])),
    # ---- keys that the token brings along
    ("jwk of the signer", SIGNATURE, lambda: by_eve(kid=None, jwk=tokens.jwk("ES256", "eve"))),
    ("jwk of the signer, known kid", SIGNATURE, lambda: by_eve(jwk=tokens.jwk("ES256", "eve", kid="ES256"))),
    ("jku of the signer", SIGNATURE, lambda: by_eve(jku="https://eve.example/jwks")),
    ("x5u of the signer", SIGNATURE, lambda: by_eve(x5u="https://eve.example/x5u")),
    ("x5c of the signer", SIGNATURE, lambda: by_eve(x5c=["MIIB"])),
    # ---- the form
    ("empty", PARTS, lambda: ""),
    ("blank", PARTS, lambda: " "),
    ("one part", PARTS, lambda: parts(good())[0]),
    ("two parts", PARTS, lambda: repart(lambda p: p[:2])),
    ("two parts and a dot", BASE64URL, lambda: repart(lambda p: [p[0], p[1], ""])),
    ("four parts", PARTS, lambda: good() + ".x"),
    ("four parts, the last empty", PARTS, lambda: good() + "."),
    ("five parts", PARTS, lambda: good() + ".x.x"),
    ("only dots", BASE64URL, lambda: ".."),
    ("no header", BASE64URL, lambda: repart(lambda p: ["", p[1], p[2]])),
    ("no claims", BASE64URL, lambda: repart(lambda p: [p[0], "", p[2]])),
    ("no claims, signed", BASE64URL, lambda: raw_parts(parts(good())[0], "")),
    ("header padded", BASE64URL, lambda: raw_parts(b64(b'{"alg":"ES256","kid":"ES256"} ') + "==", parts(good())[1])),
    ("claims padded", BASE64URL, lambda: raw_parts(parts(good())[0], parts(good())[1] + "=")),
    ("signature padded", BASE64URL, lambda: good() + "=="),
    ("header with an unused bit", UNUSED_BITS, lambda: unused(0)),
    ("claims with an unused bit", UNUSED_BITS, lambda: unused(1)),
    ("signature with an unused bit", UNUSED_BITS, lambda: unused(2)),
    ("header of an impossible length", BASE64URL, lambda: raw_parts(b64(b'{"alg":"ES256"}  ')[:-2], parts(good())[1])),
    ("standard base64", BASE64URL, lambda: raw_parts(parts(good())[0], parts(good())[1][:-1] + "+")),
    ("slash", BASE64URL, lambda: repart(lambda p: [p[0], p[1], p[2][:-1] + "/"])),
    ("space before", BASE64URL, lambda: " " + good()),
    ("space behind", BASE64URL, lambda: good() + " "),
    ("newline behind", BASE64URL, lambda: good() + "\n"),
    ("space inside", BASE64URL, lambda: repart(lambda p: [p[0], " " + p[1], p[2]])),
    ("newline inside", BASE64URL, lambda: repart(lambda p: [p[0][:8] + "\n" + p[0][8:], p[1], p[2]])),
    ("NUL behind", BASE64URL, lambda: good() + "\x00"),
    ("quoted", BASE64URL, lambda: f'"{good()}"'),
    ("percent-encoded", PARTS, lambda: good().replace(".", "%2E")),
    ("not ASCII", ASCII, lambda: good() + "\xe9"),
    ("no-break space behind", ASCII, lambda: good() + "\xa0"),
    ("two tokens", PARTS, lambda: good() + "," + good()),
    ("scheme twice", BASE64URL, lambda: "Bearer " + good()),
    ("JSON serialisation", PARTS, lambda: as_json(good())),
    ("over 16 KiB", SIZE, lambda: good(filler="x" * 12_288)),
    ("1 MiB", SIZE, lambda: "A" * 2**20),
    ("100,000 dots", SIZE, lambda: "." * 100_000),
    # ---- the JSON inside
    ("header not JSON", JSON, lambda: raw_header("ES256")),
    ("header a list", OBJECT, lambda: raw_header('[{"alg": "ES256"}]')),
    ("header a string", OBJECT, lambda: raw_header('"ES256"')),
    ("header null", OBJECT, lambda: raw_header("null")),
    ("header cut short", JSON, lambda: raw_header('{"alg": "ES256"')),
    ("header followed by more", JSON, lambda: raw_header('{"alg": "ES256", "kid": "ES256"} {}')),
    ("header with alg twice", DUPLICATE, lambda: raw_header('{"alg": "none", "alg": "ES256", "kid": "ES256"}')),
    ("header with alg twice by an escape", DUPLICATE, lambda: raw_header('{"alg": "ES256", "\\u0061lg": "none"}')),
    ("header with kid twice", DUPLICATE, lambda: raw_header('{"alg": "ES256", "kid": "ES256", "kid": "ES256"}')),
    ("header with NaN", CONSTANT, lambda: raw_header('{"alg": "ES256", "kid": "ES256", "x": NaN}')),
    ("header with a byte order mark", BOM, lambda: raw_header(b'\xef\xbb\xbf{"alg": "ES256", "kid": "ES256"}')),
    ("header in UTF-16", JSON, lambda: raw_header('{"alg": "ES256", "kid": "ES256"}'.encode("utf-16-le"))),
    ("header nested deep", DEPTH, lambda: raw_header('{"alg": "ES256", "x": ' + "[" * 16 + "]" * 16 + "}")),
    ("claims not JSON", JSON, lambda: raw_claims("sub=ada")),
    ("claims a list", OBJECT, lambda: raw_claims(json.dumps([claims()]))),
    ("claims a string", OBJECT, lambda: raw_claims(json.dumps(json.dumps(claims())))),
    ("claims a token", JSON, lambda: raw_claims(good())),
    ("claims null", OBJECT, lambda: raw_claims("null")),
    ("claims a number", OBJECT, lambda: raw_claims("1")),
    ("claims cut short", JSON, lambda: raw_claims(json.dumps(claims())[:-1])),
    ("claims followed by NUL", JSON, lambda: raw_claims(json.dumps(claims()) + "\x00")),
    ("claims with exp twice", DUPLICATE, lambda: more_claims(f'"exp": {NOW + 9999}')),
    ("claims with exp twice by an escape", DUPLICATE, lambda: more_claims(f'"\\u0065xp": {NOW + 9999}')),
    ("claims with a duplicate deep down", DUPLICATE, lambda: more_claims('"x": [{"y": 1, "y": 2}]')),
    ("claims with NaN", CONSTANT, lambda: more_claims('"x": NaN')),
    ("claims with Infinity", CONSTANT, lambda: more_claims('"x": [Infinity]')),
    ("claims with 1e400", NUMBER, lambda: more_claims('"x": 1e400')),
    ("claims with a vast integer", NUMBER, lambda: more_claims('"x": ' + "9" * 5000)),
    ("claims with a byte order mark", BOM, lambda: raw_claims(b"\xef\xbb\xbf" + json.dumps(claims()).encode())),
    ("claims not UTF-8", UTF8, lambda: raw_claims(json.dumps(claims())[:-1].encode() + b', "x": "\xff"}')),
    ("claims nested deep", DEPTH, lambda: more_claims('"x": ' + "[" * 16 + "]" * 16)),
    ("claims nested 5,000 deep", DEPTH, lambda: more_claims('"x": ' + "[" * 5000 + "]" * 5000)),
    ("claims with unclosed brackets", DEPTH, lambda: raw_claims("[" * 10_000)),
    # ---- times
    ("exp missing", NO_EXPIRY, lambda: good(exp=None)),
    ("exp null", TIME, lambda: sign(null("exp"))),
    ("exp string", TIME, lambda: good(exp=str(int(NOW + 300)))),
    ("exp true", TIME, lambda: good(exp=True)),
    ("exp list", TIME, lambda: good(exp=[NOW + 300])),
    ("exp object", TIME, lambda: good(exp={"exp": NOW + 300})),
    ("exp Infinity", CONSTANT, lambda: raw_claims(json.dumps({**claims(), "exp": float("inf")}))),
    ("exp NaN", CONSTANT, lambda: raw_claims(json.dumps({**claims(), "exp": float("nan")}))),
    ("exp 1e400", NUMBER, lambda: raw_claims(json.dumps(claims(exp=0)).replace('"exp": 0', '"exp": 1e400'))),
    ("exp 1e300", TIME, lambda: good(exp=1e300)),
    ("exp 2^53", TIME, lambda: good(exp=2**53)),
    ("exp 2^60", TIME, lambda: good(exp=2**60)),
    ("exp -2^60", TIME, lambda: good(exp=-(2**60))),
    ("exp zero", EXPIRED, lambda: good(exp=0)),
    ("exp long ago", EXPIRED, lambda: good(exp=NOW - 3600)),
    ("exp in milliseconds of the past", EXPIRED, lambda: good(exp=(NOW - 3600) / 1000)),
    ("nbf in the future", EARLY, lambda: good(nbf=NOW + 3600)),
    ("nbf string", TIME, lambda: good(nbf="0")),
    ("nbf true", TIME, lambda: good(nbf=True)),
    ("nbf null", TIME, lambda: sign(null("nbf"))),
    ("nbf 1e300", TIME, lambda: good(nbf=1e300)),
    ("nbf -2^53", TIME, lambda: good(nbf=-(2**53))),
    ("iat in the future", FUTURE, lambda: good(iat=NOW + 3600)),
    ("iat string", TIME, lambda: good(iat=str(NOW))),
    ("iat true", TIME, lambda: good(iat=True)),
    ("iat null", TIME, lambda: sign(null("iat"))),
    ("iat 2^60", TIME, lambda: good(iat=2**60)),
    # ---- audience
    ("aud missing", NO_AUDIENCE, lambda: good(aud=None)),
    ("aud null", NO_AUDIENCE, lambda: sign(null("aud"))),
    ("aud of another gateway", OTHER_AUDIENCE, lambda: good(aud="another-gateway")),
    ("aud list of others", OTHER_AUDIENCE, lambda: good(aud=["another-gateway", "third"])),
    ("aud empty list", OTHER_AUDIENCE, lambda: good(aud=[])),
    ("aud empty string", OTHER_AUDIENCE, lambda: good(aud="")),
    ("aud number", NO_AUDIENCE, lambda: good(aud=7)),
    ("aud true", NO_AUDIENCE, lambda: good(aud=True)),
    ("aud object", NO_AUDIENCE, lambda: good(aud={AUDIENCE: 1})),
    ("aud list with a number", NO_AUDIENCE, lambda: good(aud=[AUDIENCE, 7])),
    ("aud list with null", NO_AUDIENCE, lambda: good(aud=[AUDIENCE, None])),
    ("aud list in a list", NO_AUDIENCE, lambda: good(aud=[[AUDIENCE]])),
    ("aud in upper case", OTHER_AUDIENCE, lambda: good(aud=AUDIENCE.upper())),
    ("aud that begins like ours", OTHER_AUDIENCE, lambda: good(aud=AUDIENCE + "-2")),
    ("aud of which ours is a list", OTHER_AUDIENCE, lambda: good(aud=f"{AUDIENCE},another-gateway")),
    ("aud of another issuer", OTHER_AUDIENCE, lambda: at_other(aud="second")),
    # ---- issuer
    ("iss missing", UNTRUSTED, lambda: good(iss=None)),
    ("iss null", UNTRUSTED, lambda: sign(null("iss"))),
    ("iss number", UNTRUSTED, lambda: good(iss=7)),
    ("iss list", UNTRUSTED, lambda: good(iss=[ISSUER])),
    ("iss object", UNTRUSTED, lambda: good(iss={})),
    ("iss empty", UNTRUSTED, lambda: good(iss="")),
    ("iss unknown", UNTRUSTED, lambda: good(iss=STRANGER)),
    ("iss without its slash", UNTRUSTED, lambda: good(iss=ISSUER.rstrip("/"))),
    ("iss in upper case", UNTRUSTED, lambda: good(iss=ISSUER.upper())),
    ("iss with a space", UNTRUSTED, lambda: good(iss=ISSUER + " ")),
    ("iss of another, whose key has the same kid", SIGNATURE, lambda: good(iss=OTHER)),
    ("iss ours, another's key with the same kid", SIGNATURE, lambda: sign(claims(), name="other", kid="ES256")),
    ("iss with a secret, not that one", SIGNATURE, lambda: sign(claims(iss=SHARED), "HS256", None, name="x")),
    # ---- subject and id
    ("sub number", SUBJECT, lambda: good(sub=7)),
    ("sub null", SUBJECT, lambda: sign(null("sub"))),
    ("sub true", SUBJECT, lambda: good(sub=True)),
    ("sub list", SUBJECT, lambda: good(sub=["ada"])),
    ("sub with a newline", SUBJECT, lambda: good(sub="ada\r\nx-srp-tier: high")),
    ("sub with NUL", SUBJECT, lambda: good(sub="ada\x00")),
    ("sub with DEL", SUBJECT, lambda: good(sub="ada\x7f")),
    ("sub with a C1 control", SUBJECT, lambda: good(sub="ada\x85")),
    ("sub with half a surrogate pair", SUBJECT, lambda: good(sub="ada\ud800")),
    ("sub of 1,025 bytes", SUBJECT, lambda: good(sub="a" * 1025)),
    ("sub of 513 characters, 1,026 bytes", SUBJECT, lambda: good(sub="é" * 513)),
    ("jti number", TOKEN_ID, lambda: good(jti=7)),
    ("jti null", TOKEN_ID, lambda: sign(null("jti"))),
    ("jti list", TOKEN_ID, lambda: good(jti=["stolen-token"])),
    ("jti object", TOKEN_ID, lambda: good(jti={})),
    # ---- revoked
    ("jti revoked", REVOKED, lambda: good(jti="stolen-token")),
    ("sub revoked", REVOKED, lambda: good(sub="mallory")),
    ("sub revoked, at another issuer", REVOKED, lambda: at_other(sub="mallory")),
    ("issued too early", REVOKED, lambda: good(iat=NOW - 86_401)),
    ("issued at an unknown time", REVOKED, lambda: good(iat=None)),
    # ---- the signature
    ("signature missing", SIGNATURE, lambda: repart(lambda p: [p[0], p[1], "AA"])),
    ("signature of another token", SIGNATURE, lambda: repart(lambda p: [p[0], p[1], parts(good(sub="bob"))[2]])),
    ("claims of another token", SIGNATURE, lambda: repart(lambda p: [p[0], parts(good(plan="premium"))[1], p[2]])),
    ("header of another token", SIGNATURE, lambda: repart(lambda p: [parts(with_header(typ="at+jwt"))[0], *p[1:]])),
    ("header with one more space", SIGNATURE, lambda: repart(lambda p: [b64(unb64(p[0]) + b" "), p[1], p[2]])),
    ("ES256, signed by a stranger", SIGNATURE, by_eve),
    ("ES256, one bit off", SIGNATURE, lambda: resigned(flipped)),
    ("ES256 in DER", SIGNATURE, lambda: resigned(der)),
    ("ES256, cut short", SIGNATURE, lambda: resigned(lambda s: s[:-1])),
    ("ES256, a byte more", SIGNATURE, lambda: resigned(lambda s: s + b"\x00")),
    ("ES256, a zero before each half", SIGNATURE, lambda: resigned(lambda s: b"\x00" + s[:32] + b"\x00" + s[32:])),
    ("ES256, r and s zero", SIGNATURE, lambda: resigned(lambda s: bytes(64))),
    ("ES256, r zero", SIGNATURE, lambda: resigned(lambda s: bytes(32) + s[32:])),
    ("ES256, s zero", SIGNATURE, lambda: resigned(lambda s: s[:32] + bytes(32))),
    ("ES256, r and s the order", SIGNATURE, lambda: resigned(lambda s: P256_ORDER.to_bytes(32) * 2)),
    ("ES256, r one, s one", SIGNATURE, lambda: resigned(lambda s: (1).to_bytes(32) * 2)),
    ("ES384, one bit off", SIGNATURE, lambda: resigned(flipped, "ES384")),
    ("ES512 in DER", SIGNATURE, lambda: resigned(
        lambda s: encode_dss_signature(int.from_bytes(s[:66]), int.from_bytes(s[66:])), "ES512")),
    ("RS256, one bit off", SIGNATURE, lambda: resigned(flipped, "RS256")),
    ("RS256, all zero", SIGNATURE, lambda: resigned(lambda s: bytes(256), "RS256")),
    ("RS256, one", SIGNATURE, lambda: resigned(lambda s: (1).to_bytes(256), "RS256")),
    ("RS256, a zero before", SIGNATURE, lambda: resigned(lambda s: b"\x00" + s, "RS256")),
    ("PS256, one bit off", SIGNATURE, lambda: resigned(flipped, "PS256")),
    ("PS256 header, RS256 signature", SIGNATURE, lambda: mismatched("PS256", "RS256")),
    ("RS256 header, PS256 signature", SIGNATURE, lambda: mismatched("RS256", "PS256")),
    ("RS256 header, RS512 signature", SIGNATURE, lambda: mismatched("RS256", "RS512")),
    ("EdDSA, one bit off", SIGNATURE, lambda: resigned(flipped, "EdDSA")),
    ("EdDSA, s plus the order", SIGNATURE, lambda: resigned(plus_order, "EdDSA")),
    ("EdDSA, all zero", SIGNATURE, lambda: resigned(lambda s: bytes(64), "EdDSA")),
    ("EdDSA, cut short", SIGNATURE, lambda: resigned(lambda s: s[:63], "EdDSA")),
]  # fmt: skip


def refused(found: object) -> Refusal:
    assert isinstance(found, Refusal), found
    return found


def values(value: Any) -> list[str]:
    """Every text in a JSON value, including names."""
    if isinstance(value, dict):
        return [text for k, v in value.items() for text in (k, *values(v))]
    if isinstance(value, list):
        return [text for v in value for text in values(v)]
    return [value] if isinstance(value, str) else [str(value)]


def repeats_nothing(detail: str, token: str) -> bool:
    """Whether `detail` repeats no 8 consecutive characters of the token and none of the values inside."""
    secrets = [token[i : i + 8] for i in range(min(len(token), 4000) - 7)]
    for part in token.split(".")[:2]:
        try:
            secrets += [v for v in values(json.loads(unb64(part))) if len(v) > 4]
        except (ValueError, RecursionError):
            continue
    return not any(s in detail for s in secrets)


@pytest.mark.parametrize(("why", "build"), [h[1:] for h in HOSTILE], ids=[h[0] for h in HOSTILE])
def test_hostile_tokens_are_refused(why: str, build: Callable[[], str], keys: identity.Keys) -> None:
    """With 401: never anonymous, never an exception, no part of the token in the detail, no call for fresh keys."""
    token = build()
    found = refused(verify(POLICY, keys, token, NOW))
    assert (found.reason, found.issuer) == (Reason.INVALID_TOKEN, None)
    assert why in found.detail
    assert "\n" not in found.detail
    assert repeats_nothing(found.detail, token)
    request = Request("GET", "/", {"x-expert-access-token": token})
    assert refused(identify(Snapshot(POLICY, keys), request, NOW)).reason is Reason.INVALID_TOKEN


NO_KEY: list[tuple[str, Callable[[], str]]] = [
    ("unknown kid", lambda: sign(claims(), kid="yesterday")),
    ("unknown kid, a path", lambda: sign(claims(), kid="../../../dev/null")),
    ("empty kid", lambda: with_header(kid="")),
    ("kid in another case", lambda: sign(claims(), kid="es256")),
    ("ES256 with the kid of an RSA key", lambda: sign(claims(), kid="RS256")),
    ("RS256 with the kid of an EC key", lambda: sign(claims(), "RS256", kid="ES256")),
    ("RS256 by a key that says PS256", lambda: signed_by(
        header("RS256", kid="PS256"), claims(), "RS256", key_of("PS256"))),
    ("PS256 by a key that says RS256", lambda: signed_by(
        header("PS256", kid="RS256"), claims(), "PS256", key_of("RS256"))),
    ("ES256 with the kid of a P-384 key", lambda: sign(claims(), kid="ES384")),
    ("ES384 with the kid of a P-256 key", lambda: sign(claims(), "ES384", kid="ES256")),
    ("EdDSA with the kid of a P-256 key", lambda: sign(claims(), "EdDSA", kid="ES256")),
    ("a kid at an issuer with a shared secret", lambda: sign(claims(iss=SHARED), "HS256", kid="main")),
]  # fmt: skip


@pytest.mark.parametrize("build", [n[1] for n in NO_KEY], ids=[n[0] for n in NO_KEY])
def test_a_token_whose_key_is_unknown_calls_for_fresh_keys(build: Callable[[], str], keys: identity.Keys) -> None:
    """The 401 names the issuer, so that its keys can be fetched; it still repeats nothing of the token."""
    token = build()
    found = refused(verify(POLICY, keys, token, NOW))
    assert found.reason is Reason.INVALID_TOKEN
    assert found.issuer in (ISSUER, SHARED)
    assert repeats_nothing(found.detail, token)


def test_an_issuer_with_an_empty_key_set_verifies_no_token() -> None:
    """401, not 503: its keys are known, and there are none. Newer ones may be asked for."""
    found = refused(verify(POLICY, {ISSUER: ()}, good(), NOW))
    assert (found.reason, found.issuer) == (Reason.INVALID_TOKEN, ISSUER)


def test_missing_keys_are_not_the_callers_fault() -> None:
    """503 `keys_unavailable`, with the issuer; a token that no key could verify is still a 401."""
    found = refused(verify(POLICY, {}, good(), NOW))
    assert (found.reason, found.issuer) == (Reason.KEYS_UNAVAILABLE, ISSUER)
    assert repeats_nothing(found.detail, good())
    for token in (good() + ".", with_header(alg="none"), good(iss=STRANGER), with_header(crit=[])):
        assert refused(verify(POLICY, {}, token, NOW)).reason is Reason.INVALID_TOKEN


# ---- good tokens -----------------------------------------------------------------------------------------------------

GOOD: list[tuple[str, Callable[[], str]]] = [
    *[(alg, lambda alg=alg: good(alg)) for alg in tokens.ALGORITHMS],  # type: ignore[misc]
    ("HS256 at the issuer with a secret", lambda: sign(claims(iss=SHARED), "HS256", kid=None)),
    ("the same kid at another issuer", at_other),
    ("no kid, one key fits", lambda: sign(claims(), kid=None)),
    ("no typ", lambda: raw_header('{"alg": "ES256", "kid": "ES256"}')),
    ("typ jwt", lambda: with_header(typ="jwt")),
    ("typ at+jwt", lambda: with_header(typ="at+jwt")),
    ("typ AT+JWT", lambda: with_header(typ="AT+JWT")),
    ("typ application/at+jwt", lambda: with_header(typ="application/at+jwt")),
    ("members that are never read", lambda: with_header(
        jwk=tokens.jwk("ES256", "eve"), jku="https://eve.example/", x5u="https://eve.example/", x5c=["MIIB"], cty="x")),
    ("aud list", lambda: good(aud=["another-gateway", AUDIENCE])),
    ("the second audience", lambda: good(aud="second")),
    ("exp with a fraction", lambda: good(exp=NOW + 0.5)),
    ("exp below 2^53", lambda: good(exp=2**53 - 1)),
    ("nbf now", lambda: good(nbf=NOW)),
    ("nbf negative", lambda: good(nbf=-1)),
    ("jti", lambda: good(jti="fine")),
    ("claims nested 16 deep", lambda: more_claims('"x": ' + "[" * 15 + "]" * 15)),
    ("claims with half a surrogate pair", lambda: good(plan="\ud800")),
    ("white space in the JSON", lambda: raw_claims(" " + json.dumps(claims(), indent=2) + "\n")),
]  # fmt: skip


@pytest.mark.parametrize("build", [g[1] for g in GOOD], ids=[g[0] for g in GOOD])
def test_good_tokens_verify(build: Callable[[], str], keys: identity.Keys) -> None:
    """And give the caller's subject, claims and the lowest tier."""
    found = verify(POLICY, keys, build(), NOW)
    assert isinstance(found, Identity), found
    assert (found.subject, found.tier, found.anonymous) == ("ada", 0, False)
    assert found.claims["sub"] == "ada"


def test_the_largest_token_is_exactly_16_kib(keys: identity.Keys) -> None:
    """A token of 16,384 bytes is read, the next possible length is not."""
    near = (MAX_TOKEN - len(good(filler=""))) * 3 // 4
    sizes = {len(good(filler="x" * n)): n for n in range(near - 8, near + 8)}
    fits, over = max(s for s in sizes if s <= MAX_TOKEN), min(s for s in sizes if s > MAX_TOKEN)
    assert fits >= MAX_TOKEN - 1
    assert isinstance(verify(POLICY, keys, good(filler="x" * sizes[fits]), NOW), Identity)
    assert isinstance(verify(POLICY, keys, good(filler="x" * sizes[over]), NOW), Refusal)


SUBJECTS = [
    ("absent", None, ""),
    ("empty", "", ""),
    ("1,024 bytes", "a" * 1024, "a" * 1024),
    ("1,024 bytes of two each", "é" * 512, "é" * 512),
    ("not ASCII, spaces, quotes", 'Zoë "Z" \u2028 %0A', 'Zoë "Z" \u2028 %0A'),
]


@pytest.mark.parametrize(("sub", "subject"), [s[1:] for s in SUBJECTS], ids=[s[0] for s in SUBJECTS])
def test_a_subject_is_any_text_up_to_1_kib_without_control_characters(
    sub: str | None, subject: str, keys: identity.Keys
) -> None:
    """An absent subject is an empty one."""
    found = verify(POLICY, keys, good(sub=sub), NOW)
    assert isinstance(found, Identity)
    assert found.subject == subject


def test_the_tier_depends_on_the_claims(keys: identity.Keys) -> None:
    """By the clearance rules; a rule that fails is named in the identity."""
    premium, plain, without = (verify(POLICY, keys, good(plan=p), NOW) for p in ("premium", "free", None))
    assert isinstance(premium, Identity)
    assert (premium.tier, premium.errors) == (1, ())
    assert isinstance(plain, Identity)
    assert (plain.tier, plain.errors) == (0, ())
    assert isinstance(without, Identity)
    assert (without.tier, without.errors) == (0, ("clearance[0].when",))


def test_without_a_kid_two_keys_that_fit_are_refused() -> None:
    """Such a token verifies only if exactly one key fits its algorithm."""
    two = json.dumps({"keys": [tokens.jwk("ES256"), tokens.jwk("ES256", "eve"), tokens.jwk("RS256")]}).encode()
    known = {ISSUER: parse_jwks(two).keys}
    assert refused(verify(POLICY, known, sign(claims(), kid=None), NOW)).issuer == ISSUER
    assert isinstance(verify(POLICY, known, sign(claims()), NOW), Identity)
    assert isinstance(verify(POLICY, known, sign(claims(), name="eve"), NOW), Identity)
    assert isinstance(verify(POLICY, known, sign(claims(), "RS256", kid=None), NOW), Identity)


def test_a_key_without_alg_verifies_the_algorithms_of_its_type() -> None:
    """An RSA key without `alg` verifies those of RS256 and PS256 that the issuer's list has, and nothing else."""
    known = {ISSUER: parse_jwks(json.dumps({"keys": [tokens.jwk("RS256", alg=None, kid="k")]}).encode()).keys}
    for alg in ("RS256", "PS256"):
        token = signed_by(header(alg, kid="k"), claims(), alg, key_of("RS256"))
        assert isinstance(verify(POLICY, known, token, NOW), Identity)
    token = signed_by(header("RS512", kid="k"), claims(), "RS512", key_of("RS256"))
    assert refused(verify(POLICY, known, token, NOW)).issuer is None


TIMES = [
    # claim, its difference from now, leeway, whether it verifies
    ("exp", 0.001 - LEEWAY, LEEWAY, True),
    ("exp", 0 - LEEWAY, LEEWAY, False),
    ("exp", 0.001, 0, True),
    ("exp", 0, 0, False),
    ("nbf", LEEWAY, LEEWAY, True),
    ("nbf", LEEWAY + 0.001, LEEWAY, False),
    ("nbf", 0, 0, True),
    ("nbf", 0.001, 0, False),
    ("iat", LEEWAY, LEEWAY, True),
    ("iat", LEEWAY + 0.001, LEEWAY, False),
    ("iat", 0, 0, True),
    ("iat", 0.001, 0, False),
]


@pytest.mark.parametrize(("claim", "distance", "leeway", "verifies"), TIMES)
def test_times_count_to_the_millisecond(
    claim: str, distance: float, leeway: float, verifies: bool, keys: identity.Keys
) -> None:
    """It ends at `exp` plus the leeway, and starts at `nbf` and `iat` minus the leeway."""
    found = verify(replace(POLICY, leeway=leeway), keys, good(**{claim: NOW + distance}), NOW)
    assert isinstance(found, Identity) is verifies


def test_an_identity_expires_with_its_token(keys: identity.Keys) -> None:
    """`expires` is `exp` plus the leeway: from then on the token is refused."""
    token = good(exp=NOW + 100)
    found = verify(POLICY, keys, token, NOW)
    assert isinstance(found, Identity)
    assert found.expires == NOW + 100 + LEEWAY
    assert isinstance(verify(POLICY, keys, token, found.expires - 0.001), Identity)
    assert isinstance(verify(POLICY, keys, token, found.expires), Refusal)


def test_nothing_is_revoked_unless_the_policy_says_so(keys: identity.Keys) -> None:
    """Then a token needs no `iat` and may have any id and subject."""
    policy = replace(POLICY, revoked=Revoked())
    for token in (good(jti="stolen-token"), good(sub="mallory"), good(iat=None), good(iat=0)):
        assert isinstance(verify(policy, keys, token, NOW), Identity)
    early = good(iat=NOW - 86_400)
    assert isinstance(verify(POLICY, keys, early, NOW), Identity)  # exactly then, not before


@pytest.mark.parametrize(
    ("claims", "refused_"),
    [
        ({"groups": ["g"] * 63}, False),  # and the list itself is a member
        ({"groups": ["g"] * 64}, True),
        ({"groups": {"a": [1, {"b": []}]}, "other": ["x"] * 2000}, False),
        ({"groups": [[["g"] * 10] * 2] * 3}, True),
        ({"groups": {str(n): n for n in range(64)}}, True),
    ],
)
def test_claims_with_more_entries_than_macros_may_range_over_are_refused(
    keys: identity.Keys, claims: dict[str, Any], refused_: bool
) -> None:
    """One signed token could otherwise hold up all other callers. Claims that no condition reads do not count."""
    policy = replace(POLICY, claims_read=frozenset({"groups"}), max_entries=64)
    found = verify(policy, keys, good(**claims), NOW)
    assert isinstance(found, Refusal) is refused_
    if isinstance(found, Refusal):
        assert (found.reason, "over 64 entries" in found.detail) == (Reason.INVALID_TOKEN, True)
    assert isinstance(verify(replace(policy, max_entries=None), keys, good(**claims), NOW), Identity)


# ---- headers ---------------------------------------------------------------------------------------------------------

AUTH, ACCESS = "authorization", "x-expert-access-token"
TOKEN = "aaa.bbb.ccc"

HEADERS: list[tuple[str, dict[str, str], tuple[str, ...], str | Reason | None]] = [
    ("neither", {}, (), None),
    ("other headers", {"x-authorization": "Bearer x", "cookie": "token=x"}, (), None),
    ("Bearer", {AUTH: f"Bearer {TOKEN}"}, (), TOKEN),
    ("bearer", {AUTH: f"bearer {TOKEN}"}, (), TOKEN),
    ("BEARER", {AUTH: f"BEARER {TOKEN}"}, (), TOKEN),
    ("two spaces", {AUTH: f"Bearer  {TOKEN}"}, (), TOKEN),
    ("a space behind", {AUTH: f"Bearer {TOKEN} "}, (), TOKEN),
    ("the other header", {ACCESS: TOKEN}, (), TOKEN),
    ("the other header takes no scheme", {ACCESS: f"Bearer {TOKEN}"}, (), f"Bearer {TOKEN}"),
    ("tab", {AUTH: f"Bearer\t{TOKEN}"}, (), Reason.INVALID_TOKEN),
    ("space and tab", {AUTH: f"Bearer \t{TOKEN}"}, (), f"\t{TOKEN}"),
    ("no scheme", {AUTH: TOKEN}, (), Reason.INVALID_TOKEN),
    ("no token", {AUTH: "Bearer"}, (), Reason.INVALID_TOKEN),
    ("no token but a space", {AUTH: "Bearer "}, (), Reason.INVALID_TOKEN),
    ("empty", {AUTH: ""}, (), Reason.INVALID_TOKEN),
    ("the other header empty", {ACCESS: ""}, (), ""),
    ("Basic", {AUTH: "Basic YTpi"}, (), Reason.INVALID_TOKEN),
    ("Digest", {AUTH: "Digest username=a"}, (), Reason.INVALID_TOKEN),
    ("Bearertoken", {AUTH: f"Bearer{TOKEN}"}, (), Reason.INVALID_TOKEN),
    ("space before", {AUTH: f" Bearer {TOKEN}"}, (), Reason.INVALID_TOKEN),
    ("two tokens", {AUTH: f"Bearer {TOKEN} {TOKEN}"}, (), Reason.INVALID_TOKEN),
    ("joined by a comma", {AUTH: f"Bearer {TOKEN}, Bearer {TOKEN}"}, (), Reason.INVALID_TOKEN),
    ("parameters", {AUTH: f'Bearer {TOKEN}, realm="x"'}, (), Reason.INVALID_TOKEN),
    ("both headers", {AUTH: f"Bearer {TOKEN}", ACCESS: TOKEN}, (), Reason.INVALID_TOKEN),
    ("both headers, one empty", {AUTH: f"Bearer {TOKEN}", ACCESS: ""}, (), Reason.INVALID_TOKEN),
    ("both headers, one Basic", {AUTH: "Basic YTpi", ACCESS: TOKEN}, (), Reason.INVALID_TOKEN),
    ("authorization twice", {AUTH: f"Bearer {TOKEN}"}, (AUTH,), Reason.INVALID_TOKEN),
    ("the other header twice", {ACCESS: TOKEN}, (ACCESS,), Reason.INVALID_TOKEN),
    ("16 KiB", {AUTH: "Bearer " + "x" * MAX_TOKEN}, (), "x" * MAX_TOKEN),
    ("over 16 KiB", {AUTH: "Bearer " + "x" * (MAX_TOKEN + 1)}, (), Reason.INVALID_TOKEN),
    ("over 16 KiB of spaces", {AUTH: "Bearer" + " " * (MAX_TOKEN + 1) + "x"}, (), Reason.INVALID_TOKEN),
]


@pytest.mark.parametrize(
    ("headers", "repeated", "expected"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS]
)
def test_a_token_is_one_bearer_token_or_one_access_token(
    headers: dict[str, str], repeated: tuple[str, ...], expected: str | Reason | None
) -> None:
    """Anything else in these headers is refused, not ignored."""
    found = token_of(Request("GET", "/", headers, repeated=frozenset(repeated)))
    assert (found.reason if isinstance(found, Refusal) else found) == expected


SHOWN = [row for row in HEADERS if row[3] is not None]


@pytest.mark.parametrize(("headers", "repeated"), [row[1:3] for row in SHOWN], ids=[row[0] for row in SHOWN])
def test_a_caller_with_anything_in_a_token_header_is_not_anonymous(
    headers: dict[str, str], repeated: tuple[str, ...], keys: identity.Keys
) -> None:
    """They are verified or refused, even where the policy admits anonymous callers."""
    request = Request("GET", "/", headers, repeated=frozenset(repeated))
    found = refused(identify(Snapshot(POLICY, keys), request, NOW))
    assert found.reason is Reason.INVALID_TOKEN
    assert TOKEN not in found.detail


def test_two_tokens_joined_by_a_comma_are_refused(keys: identity.Keys) -> None:
    """Some proxies join repeated headers with a comma."""
    for value in (f"Bearer {good()},Bearer {good()}", f"Bearer {good()}, {good()}", f"Bearer {good()},"):
        assert isinstance(identify(Snapshot(POLICY, keys), Request("GET", "/", {AUTH: value}), NOW), Refusal)


def test_a_caller_without_a_token_is_anonymous_or_gets_401() -> None:
    """As the policy says."""
    low = anonymous(POLICY)
    assert isinstance(low, Identity)
    assert (low.tier, low.anonymous, low.subject) == (0, True, "")
    closed = refused(anonymous(replace(POLICY, anonymous=None)))
    assert (closed.reason, closed.issuer) == (Reason.TOKEN_REQUIRED, None)


# ---- anything --------------------------------------------------------------------------------------------------------

ALPHABET = "ABCabc019-_.=+/ \n\xe9"


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[str], str]:
    """One to three changes: a character replaced, added or removed; parts swapped, repeated or removed."""

    def change(token: str) -> str:
        for _ in range(draw(st.integers(1, 3))):
            at, char = draw(st.integers(0, max(len(token) - 1, 0))), draw(st.sampled_from(ALPHABET))
            split = parts(token)
            first, second = (draw(st.integers(0, len(split) - 1)) for _ in range(2))
            kind = draw(st.sampled_from(["replace", "insert", "delete", "swap", "repeat", "drop", "case"]))
            match kind:
                case "replace":
                    token = token[:at] + char + token[at + 1 :]
                case "insert":
                    token = token[:at] + char + token[at:]
                case "delete":
                    token = token[:at] + token[at + 1 :]
                case "swap":
                    split[first], split[second] = split[second], split[first]
                    token = ".".join(split)
                case "repeat":
                    token = ".".join([*split[:first], split[second], *split[first:]])
                case "drop":
                    token = ".".join(split[:first] + split[first + 1 :])
                case "case":
                    token = token[:at] + token[at : at + 1].swapcase() + token[at + 1 :]
        return token

    return change


@given(mutations(), st.sampled_from(["ES256", "EdDSA", "RS256"]))
def test_no_mutation_of_a_good_token_verifies(change: Callable[[str], str], alg: str) -> None:
    token = good(alg)
    mutant = change(token)
    found = verify(POLICY, {ISSUER: parse_jwks(tokens.jwks("ES256", "EdDSA", "RS256")).keys}, mutant, NOW)
    assert isinstance(found, Identity) is (mutant == token)


@given(st.one_of(st.text(max_size=80), st.from_regex(r"[A-Za-z0-9_-]{0,40}(\.[A-Za-z0-9_-]{0,40}){0,4}")))
def test_any_unsigned_text_is_refused(text: str) -> None:
    """It never raises."""
    assert isinstance(verify(POLICY, {}, text, NOW), Refusal)
    if text.isascii() or all(ord(c) < 256 for c in text):
        for name in (AUTH, ACCESS):
            assert isinstance(identify(Snapshot(POLICY), Request("GET", "/", {name: text}), NOW), Refusal)


odd = st.one_of(json_values, st.sampled_from([AUDIENCE, [AUDIENCE], NOW, NOW - 10**9, NOW + 10**9, 2**53, "mallory"]))


@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(("exp", "nbf", "iat", "aud", "sub", "jti", "plan", "x"), odd)),
    st.fixed_dictionaries({}, optional=dict.fromkeys(("typ", "x5c", "cty"), odd)),
)
def test_signed_nonsense_never_raises(body: dict[str, Any], head: dict[str, Any]) -> None:
    """Whatever an issuer signs is verified or refused; what verifies follows the rules."""
    payload = {"exp": NOW + 300, "aud": AUDIENCE, "iss": ISSUER, **body}
    found = verify(
        replace(POLICY, revoked=Revoked()),
        {ISSUER: parse_jwks(tokens.jwks("ES256")).keys},
        sign(payload, header=head),
        NOW,
    )
    if isinstance(found, Refusal):
        assert (found.reason, found.issuer) == (Reason.INVALID_TOKEN, None)
        return
    times = [found.claims[n] for n in ("exp", "nbf", "iat") if n in found.claims]
    assert all(type(t) in (int, float) and abs(t) < 2**53 for t in times)
    assert found.claims["exp"] + LEEWAY > NOW
    assert AUDIENCE in found.claims["aud"]
    assert all(isinstance(found.claims.get(n, ""), str) for n in ("sub", "jti"))
    assert found.subject.isprintable() or not any(ord(c) < 32 for c in found.subject)


def test_the_der_row_of_the_table_is_a_good_signature_in_another_form() -> None:
    """Its numbers are those of a good signature: only the form is wrong."""
    raw = unb64(parts(good())[2])
    assert decode_dss_signature(der(raw)) == (int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
