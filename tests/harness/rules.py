"""A policy as a value: its text, and which backends a caller may reach by it.

The second is worked out here from docs/policy.md, without the code under test.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.harness import tokens

Keys = frozenset[str]  # names of the issuer's keys, as in `tokens`

HOUR = 3600


@dataclass(frozen=True)
class Caller:
    """Who sends a request. `key` is the name of the key that signed the token, None if no key can make it valid."""

    name: str
    token: str | None = None
    key: str | None = None
    claims: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Expert:
    """An expert of a policy. `endpoints` are names of backends; `acme` is whether only the tenant `acme` may reach it.

    `lesser` are experts to downgrade to, as far as the policy has them and they are of no higher tier.
    """

    tier: str
    endpoints: tuple[str, ...]
    cluster: str
    acme: bool = False
    retry_on: str = "safe"
    retries: int = 3
    connect_timeout: str = "1s"
    lesser: tuple[str, ...] = ()
    unavailable: str = "refuse"

    def __str__(self) -> str:
        return f"{self.tier} at {','.join(self.endpoints)} by {self.cluster}{' for acme' if self.acme else ''}"


@dataclass(frozen=True)
class Rules:
    """A policy. Callers whose token has `plan` have tier high; tokens count only if `trusted`."""

    experts: Mapping[str, Expert]
    plan: str = "premium"
    anonymous: str = "low"
    trusted: bool = True
    revoked_jti: frozenset[str] = frozenset()
    revoked_sub: frozenset[str] = frozenset()
    issued_before: int | None = None

    def tier(self, caller: Caller, keys: Keys) -> str | None:
        """The caller's tier; None if its requests are denied."""
        if caller.token is None:
            return None if self.anonymous == "deny" else self.anonymous
        claims = caller.claims
        if not self.trusted or caller.key not in keys:
            return None
        if claims["jti"] in self.revoked_jti or claims["sub"] in self.revoked_sub:
            return None
        if self.issued_before is not None and claims["iat"] < self.issued_before:
            return None
        return "high" if claims["plan"] == self.plan else "low"

    def reach(self, caller: Caller, keys: Keys, names: Iterable[str]) -> frozenset[str]:
        """The backends that may get a request of `caller` for the experts of these names."""
        tier = self.tier(caller, keys)
        if tier is None:
            return frozenset()

        def permitted(found: Iterable[str]) -> list[str]:
            experts = [(n, self.experts[n]) for n in found if n in self.experts]
            return [
                n
                for n, e in experts
                if (e.tier == "low" or tier == "high") and (not e.acme or caller.claims.get("org") == "acme")
            ]

        requested = [n for n in names if n in self.experts]
        lesser = permitted(d for n in requested for d in self.lesser(n))
        serve = permitted(requested) or lesser
        if len(requested) == 1 and self.experts[requested[0]].unavailable == "downgrade":
            serve = [*serve, *lesser]
        return frozenset(b for n in serve for b in self.experts[n].endpoints)

    def lesser(self, name: str) -> Iterator[str]:
        """The experts that `name` is downgraded to."""
        expert = self.experts[name]
        for other in expert.lesser:
            if other != name and other in self.experts and (expert.tier, self.experts[other].tier) != ("low", "high"):
                yield other

    def text(self, address: Callable[[str], str], note: str = "") -> str:
        """The policy file. `address` gives a backend's `host:port`; `note` tells one file from another."""
        issuer = {
            "issuer": tokens.ISSUER, "audiences": [tokens.AUDIENCE], "algorithms": ["ES256"],
            "jwks": {"file": "jwks.json"},
        }  # fmt: skip
        before = self.issued_before and datetime.fromtimestamp(self.issued_before, UTC).isoformat()
        policy = {
            "version": 1,
            "tiers": ["low", "high"],
            "issuers": [issuer] if self.trusted else [],
            "anonymous": self.anonymous,
            "leeway": "1s",
            "clearance": [{"when": f'has(claims.plan) && claims.plan == "{self.plan}"', "tier": "high"}],
            "experts": {name: self._fields(name, expert, address) for name, expert in self.experts.items()},
            "gate": [{"path": "/route", "json": "/expert_names"}, {"prefix": "/", "header": "x-expert-names"}],
            "revoked": {
                "jti": sorted(self.revoked_jti), "sub": sorted(self.revoked_sub), "issued_before": before
            },
        }  # fmt: skip
        return f"{json.dumps(policy, indent=1)}\n# {note}\n"

    def _fields(self, name: str, expert: Expert, address: Callable[[str], str]) -> dict[str, Any]:
        return {
            "tier": expert.tier, "cluster": expert.cluster, "endpoints": [address(b) for b in expert.endpoints],
            "health": False, "outlier": False, "retry_on": expert.retry_on, "retries": expert.retries,
            "connect_timeout": expert.connect_timeout, "downgrade_to": list(self.lesser(name)),
            "unavailable": expert.unavailable,
            **({"allow": 'has(claims.org) && claims.org == "acme"'} if expert.acme else {}),
        }  # fmt: skip


def callers() -> dict[str, Caller]:
    """Every kind of caller by name, with tokens for an hour."""
    made = {
        "anonymous": Caller("anonymous"),
        "free": _caller("free", plan="free"),
        "premium": _caller("premium"),
        "acme": _caller("acme", org="acme"),
        "gold": _caller("gold", plan="gold"),
        "early": _caller("early", iat=int(time.time()) - HOUR),
        "rotated": _caller("rotated", key="new"),
        "garbage": Caller("garbage", "a.b.c"),
    }
    bad: dict[str, dict[str, Any]] = {
        "expired": {"exp": int(time.time()) - HOUR},
        "foreign": {"aud": "another"},
        "future": {"iat": int(time.time()) + HOUR},
    }
    for name, claims in bad.items():
        made[name] = Caller(name, tokens.sign(_claims(name, **claims)))
    made["forged"] = Caller("forged", tokens.sign(_claims("forged"), kid=tokens.kid_of("ES256"), name="forger"))
    return made


def _caller(name: str, key: str = "", **claims: Any) -> Caller:
    held = _claims(name, **claims)
    return Caller(name, tokens.sign(held, name=key), key, held)


def _claims(name: str, **over: Any) -> dict[str, Any]:
    now = int(time.time())
    usual = {"sub": f"{name}-sub", "jti": f"{name}-jti", "plan": "premium", "iat": now, "exp": now + HOUR}
    return tokens.claims(**{**usual, **over})
