"""Random tokens, really signed: good ones, and bad ones of many kinds."""

from __future__ import annotations

import json
import random
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.oracle.policies import AUDIENCES, ISSUERS, JTI, START, SUB, Case
from tests.oracle.signers import Signer, pem, private

Spoil = Callable[[random.Random, "Draft"], None]

_LEEWAYS = (0, 1, 0.5, 30, 300)
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_CLAIMS: dict[str, tuple[Any, ...]] = {
    "plan": ("premium", "free", "acme", None, 1, ["premium"]),
    "level": (1, 2, 2.0, 2.5, 3, 10**30, -1, "3", True),
    "limit": (2.5, 3, 10**20),
    "groups": (["g1"], ["g1", "g2"], ["g2", 1, None], [], "g1", {"g1": 1}, [True]),
    "org": ("acme", "umbrella", "açme", "", 7, None, "b"),
    "blocked": (True, False, "false", 0),
    "address": ({"country": "de"}, {"country": ""}, {}, "de", {"country": {"country": "de"}}),
}
_HEADER: dict[str, tuple[Any, ...]] = {
    "typ": ("jwt", "AT+JWT", "application/At+jwt", "JWS", "", None, 5, "application/application/jwt"),
    "alg": ("none", "HS256", "es256", "ES512", "RS512", "PS256", 5, None, ["ES256"], "EdDSA"),
    "kid": ("k1", "k2", "k3", "k4", "", None, 1, ["k1"]), "crit": ([], ["exp"], None), "b64": (True, False),
    "zip": ("DEF", None), "jwk": ({"kty": "oct", "k": "AA"},), "jku": ("https://evil.example.com/",), "x5c": ([],),
    "cty": ("JWT",),
}  # fmt: skip
_REGISTERED: dict[str, tuple[Any, ...]] = {
    "iss": (*ISSUERS, "https://evil.example.com/", None, 5, [ISSUERS[0]]),
    "aud": (*AUDIENCES, [], list(AUDIENCES), ["x", AUDIENCES[0]], [AUDIENCES[0], 5], "", None, 7, {"moe-gateway": 1}),
    "sub": (
        *SUB, "", 5, None, "a\x00b", "a\x7fb", "a\x85b", "é" * 512, "é" * 513, "s" * 1024, "s" * 1025, "x\ud800",
    ),
    "jti": (*JTI, "", 7, None, [JTI[0]]),
}  # fmt: skip
_WRONG_TIMES = ("1900000000", True, None, [], {}, 2**53, -(2**53), 2**53 - 1, 1e300, 10**400)
_RAW = (
    ('"exp"', '"exp":1,"exp"'), ('"exp"', '"\\u0065xp":1,"exp"'), ("{", '{"a":NaN,'), ("{", '{"a":-Infinity,'),
    ("{", '{"a":1e999,'), ("{", '{"a":' + "1" * 400 + ","), ("{", '{"a":' + "1" * 401 + ","), ("{", '{"a":01,'),
    ("{", "\ufeff{"), ("{", '{"a":' + "[" * 15 + "]" * 15 + ","), ("{", '{"a":' + "[" * 16 + "]" * 16 + ","),
    ("{", "[{"), ("}", "}}"), ("}", ",}"), ("{", " \t\r\n{ "), ("{", "\x0b{"), ('"', "'"), ("{", '{"a":"\t",'),
    ("{", '{"a":"\\ud800",'), ("{", '{"org":"\\ud800",'), ("{", '{"level":1' + "0" * 350 + ","), ("{", '{"a":"\\x",'),
    ("{", '{"a":{"b":1,"b":2},'), ("{", '{"groups":["\\udfff"],'), ("{", '{"a":-' + "1" * 400 + ","), ("{", '{"a":.5,'),
    ("{", '{"a":"[[[[[[[[[[[[[[[[[[[[[[[[{{{{{{{{{{{{{{",'),
)  # fmt: skip


@dataclass
class Draft:
    """A token before it is signed. `edit`: a text in the payload, or in the header, and what it becomes."""

    signer: Signer
    header: dict[str, Any]
    claims: dict[str, Any]
    now: float
    edit: tuple[str, str] | None = None
    edit_header: bool = False
    finish: Callable[[str], str] = str

    def text(self) -> str:
        header, claims = _json(self.header), _json(self.claims)
        if self.edit and self.edit_header:
            header = header.replace(*self.edit, 1)
        elif self.edit:
            claims = claims.replace(*self.edit, 1)
        signed = f"{_b64(header.encode())}.{_b64(claims.encode())}"
        return self.finish(f"{signed}.{_b64(self.signer.sign(signed.encode()))}")


def token(rng: random.Random, case: Case, now: float) -> tuple[str, float]:
    """A token for a caller of this policy at about `now`, and its `exp`; 0 if that is no time."""
    usable = [signer for signer in case.signers if signer.usable or rng.random() < 0.15]
    signer = rng.choice(usable) if usable else Signer(ISSUERS[0], "ES256", "k1", private("ES256-1"))
    audiences = [i["audiences"] for i in case.policy.get("issuers", []) if i["issuer"] == signer.issuer]
    claims = {"iss": signer.issuer, "aud": audiences[0][0] if audiences else "x", "exp": _time(rng, now + 600)}
    claims |= {"sub": rng.choice(("ada", "bob", "zoë", "eve é", "a%b"))} if rng.random() < 0.8 else {}
    claims |= {"iat": rng.choice((now - 5, now, START, min(now, START + 300)))} if rng.random() < 0.7 else {}
    claims |= {name: rng.choice(values) for name, values in _CLAIMS.items() if rng.random() < 0.4}
    header = {"alg": signer.alg, "typ": "JWT"} | ({"kid": signer.kid} if signer.kid is not None else {})
    draft = Draft(signer, header, claims, now)
    for _ in range(rng.choice((0, 0, 0, 0, 0, 1, 1, 2))):
        rng.choice(_SPOILS)(rng, draft)
    exp = draft.claims.get("exp")
    return draft.text(), exp if isinstance(exp, (int, float)) and exp < 2**53 else 0


def _time(rng: random.Random, about: float) -> float:
    return rng.choice((about, about, round(about), about + 0.25, about + 999, about - 595))


def _spoil_header(rng: random.Random, draft: Draft) -> None:
    name = rng.choice((*_HEADER, "alg", "kid", "kid", "typ"))
    draft.header[name] = rng.choice(_HEADER[name])
    if rng.random() < 0.2:
        del draft.header[rng.choice((name, "kid", "typ")) if "kid" in draft.header and "typ" in draft.header else name]


def _spoil_claim(rng: random.Random, draft: Draft) -> None:
    name = rng.choice((*_REGISTERED, "sub", "aud"))
    mixed = [[draft.claims.get("aud"), other] for other in (5, None, "x")]
    draft.claims[name] = rng.choice(mixed if name == "aud" and rng.random() < 0.4 else _REGISTERED[name])
    if rng.random() < 0.1:
        del draft.claims[name]


def _spoil_time(rng: random.Random, draft: Draft) -> None:
    """A time at, just before or just after its limit, or none."""
    name = rng.choice(("exp", "nbf", "iat"))
    leeway = rng.choice(_LEEWAYS)
    edge = draft.now - leeway if name == "exp" else draft.now + leeway
    near = edge + rng.choice((0, 0, 0.25, -0.25, 1, -1))
    draft.claims[name] = near if rng.random() < 0.7 else rng.choice(_WRONG_TIMES)
    if rng.random() < 0.1:
        del draft.claims[name]


def _spoil_key(rng: random.Random, draft: Draft) -> None:
    """Another key, or a public key taken for a secret."""
    if rng.random() < 0.5:
        draft.signer = replace(draft.signer, alg="ES256", key=private("ES256-3"))
    else:
        name = rng.choice(("ES256-1", "ES256-2", "RS256-1"))
        draft.signer, draft.header["alg"] = Signer(draft.signer.issuer, "HS256", None, pem(name)), "HS256"


def _spoil_json(rng: random.Random, draft: Draft) -> None:
    draft.edit, draft.edit_header = rng.choice(_RAW), rng.random() < 0.2


def _spoil_size(rng: random.Random, draft: Draft) -> None:
    """A token of just about 16 KiB."""
    draft.claims["pad"] = ""
    room = 16 * 1024 - len(draft.text())
    draft.claims["pad"] = "x" * (room * 3 // 4 + rng.randint(-2, 3))


def _spoil_text(rng: random.Random, draft: Draft) -> None:
    draft.finish = lambda text: rng.choice(_FINISHES)(text)


def _with_last_bit(text: str) -> str:
    """Another text, but the same bytes if the last bit is not used."""
    return text[:-1] + _ALPHABET[_ALPHABET.index(text[-1]) ^ 1]


_FINISHES: tuple[Callable[[str], str], ...] = (
    *(_with_last_bit,) * 5, lambda t: t[:-1] + _ALPHABET[_ALPHABET.index(t[-1]) ^ 32], lambda t: t[:-1],
    lambda t: t + "=", lambda t: t + "==", lambda t: t + "A", lambda t: t + "\x80", lambda t: "", lambda t: t + "," + t,
    lambda t: t[1:], lambda t: t + ".", lambda t: "." + t, lambda t: t + ".AA", lambda t: t.replace(".", ". ", 1),
    lambda t: t.replace(".", "..", 1), lambda t: t.rpartition(".")[0], lambda t: t.rpartition(".")[0] + ".",
    lambda t: t.rpartition(".")[0] + ".AAAA", lambda t: t[:-9] + ("A" if t[-9] != "A" else "B") + t[-8:],
    lambda t: t.replace("-", "+").replace("_", "/"), lambda t: t.replace("e", "f", 1), lambda t: t.swapcase(),
)  # fmt: skip

_SPOILS: tuple[Spoil, ...] = (
    *(_spoil_header, _spoil_claim, _spoil_time) * 3, _spoil_json, _spoil_json, _spoil_text, _spoil_key, _spoil_size,
)  # fmt: skip


def _json(value: dict[str, Any]) -> str:
    plain = len(value) % 2 == 0 and "\\ud8" not in ascii(value)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=not plain)


def _b64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
