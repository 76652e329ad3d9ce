"""Random policies, valid all of them, with their issuers' keys."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from tests.oracle import conditions, signers
from tests.oracle.signers import Signer

START = 1_800_000_000
ISSUERS = ("https://idp.example.com/", "https://idp.example.com", "https://ci.example.com/", "urn:dev")
AUDIENCES = ("moe-gateway", "moe-gateway/", "other")
JTI, SUB = ("4f1c", "ünï", "7"), ("mallory", "eve é", "ada")
PATHS = ("/route", "/v1/", "/v1/chat", "/v1", "/models/a", "/")
_TIERS = ("low", "high", "t.1", "Z_9", "mid-2", "0")
_EXPERTS = ("A", "B", "C", "D", "gpt-4o", "meta-llama/Llama-3.1-8B", "x:y", "e_1", "Z9.")
_HEADERS = ("x-expert-names", "x-expert-names", "x-target-cluster", "x-model")
_POINTERS = ("/model", "/expert_names", "/route/experts", "/experts/0", "/a~1b/~0", "/Key")


@dataclass(frozen=True)
class Case:
    """A policy, the keys that were loaded for its issuers, newer keys that can be loaded, who signs tokens, and
    whether the server grants leases."""

    policy: dict[str, Any]
    keys: dict[str, bytes]
    newer: dict[str, bytes]
    signers: tuple[Signer, ...]
    grants: bool

    @cached_property
    def text(self) -> str:
        """The policy file. JSON is YAML."""
        return json.dumps(self.policy, ensure_ascii=False)

    def with_policy(self, policy: dict[str, Any]) -> Case:
        """The same keys, but for issuers that the policy does not have."""
        names = {issuer.get("issuer") for issuer in policy.get("issuers", [])}
        keys, newer = ({n: k for n, k in held.items() if n in names} for held in (self.keys, self.newer))
        return replace(self, policy=policy, keys=keys, newer=newer)


def case(rng: random.Random) -> Case:
    """A random policy."""
    tiers = rng.sample(_TIERS, rng.choice((1, 2, 2, 3, 4)))
    experts = _experts(rng, tiers)
    issuers, keys, newer, signing = _issuers(rng)
    policy: dict[str, Any] = {"version": 1, "tiers": tiers, "experts": experts}
    policy |= {"issuers": issuers} if issuers else {}
    policy |= rng.choice(({}, {"anonymous": "deny"}, *({"anonymous": tier} for tier in rng.choices(tiers, k=4))))
    if rng.random() < 0.8:
        rules = range(rng.randint(1, 4))
        policy["clearance"] = [{"when": conditions.condition(rng), "tier": rng.choice(tiers)} for _ in rules]
    if gate := _gate(rng, list(experts)):
        policy["gate"] = gate
    if rng.random() < 0.4:
        policy["revoked"] = _revoked(rng)
    policy |= rng.choice(({}, {"leeway": rng.choice((0, "0", "1s", "500ms", "5m"))}))
    policy |= rng.choice(({}, {}, {"forward_token": rng.random() < 0.5}))
    policy |= rng.choice(({}, {}, {"lease": rng.choice((0, "5s", "1h"))}))
    return Case(policy, keys, newer, tuple(signing), grants=rng.random() < 0.5)


def _experts(rng: random.Random, tiers: list[str]) -> dict[str, Any]:
    many = rng.random() < 0.05  # over 64 of them, which may serve for one another
    names = [f"e{n}" for n in range(rng.randint(66, 90))] if many else rng.sample(_EXPERTS, rng.randint(1, 6))
    experts: dict[str, Any] = {}
    allowed = (
        not many and rng.random() < 0.6
    )  # whether experts have conditions at all: decisions are cached by caller if they do
    for number, name in enumerate(names):
        expert: dict[str, Any] = {
            "tier": rng.choice(tiers[:1] * 9 * many + tiers),
            "endpoints": [f"10.0.0.{number}:80"],
        }
        if name not in ("A", "e_1", "gpt-4o") or rng.random() < 0.5:
            expert["cluster"] = f"expert-{number}"
        if allowed and rng.random() < 0.4:
            expert["allow"] = conditions.condition(rng, request=rng.random() < 0.4)
        options = {"weight": 3, "max_requests": 5, "timeout": rng.choice((0, "250ms", "2m")), "retry_on": "5xx"}
        options |= {"retries": rng.choice((0, 9)), "lease": 0}
        expert |= {key: value for key, value in options.items() if rng.random() < 0.2}
        expert |= {"unavailable": "downgrade"} if rng.random() < 0.4 else {}
        experts[name] = expert
    for name, expert in experts.items():
        at_most = tiers.index(expert["tier"])
        lesser = [n for n, e in experts.items() if n != name and tiers.index(e["tier"]) <= at_most]
        if lesser and rng.random() < 0.6:
            expert["downgrade_to"] = rng.sample(lesser, min(len(lesser), 64 if many else rng.randint(0, 3)))
    return experts


def _issuers(rng: random.Random) -> tuple[list[Any], dict[str, bytes], dict[str, bytes], list[Signer]]:
    issuers, keys, newer, signing = [], {}, {}, []
    for name in rng.sample(ISSUERS, rng.choice((0, 1, 1, 1, 2, 2, 3))):
        shared = rng.random() < 0.25
        source = {"secret_file": "secret"} if shared else {"jwks": {"file": "jwks.json"}}
        data, own = signers.shared_secret(rng, name) if shared else signers.key_set(rng, name)
        algorithms = {signer.alg for signer in own} | ({"ES256"} if not shared and rng.random() < 0.5 else set())
        if len(algorithms) > 1 and rng.random() < 0.2:
            algorithms.remove(rng.choice(sorted(algorithms)))
        audiences = rng.sample(AUDIENCES, rng.randint(1, 2))
        issuers.append({"issuer": name, "audiences": audiences, "algorithms": sorted(algorithms), **source})
        if rng.random() < 0.95:
            keys[name] = data
        if not shared and rng.random() < 0.3:
            newer[name], later = signers.key_set(rng, name)
            own += later
        signing += [replace(s, usable=s.usable and s.alg in algorithms and name in keys) for s in own]
    return issuers, keys, newer, signing


def _gate(rng: random.Random, experts: list[str]) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = []
    matches = [(rng.choice(("path", "prefix")), match) for match in rng.choices(PATHS, k=rng.randint(0, 4))]
    for kind, match in [*matches, ("prefix", "/")] if matches and rng.random() < 0.8 else matches:
        if any(_covers(rule, kind, match) for rule in rules):
            continue  # it would never be reached, which is a mistake
        source = rng.choice(({"json": rng.choice(_POINTERS)}, {"header": rng.choice(_HEADERS)}, {}))
        default = rng.sample(experts, rng.randint(1, min(3, len(experts))))
        rules.append({kind: match, **source, **({"default": default} if not source or rng.random() < 0.5 else {})})
    return rules


def _covers(rule: dict[str, Any], kind: str, match: str) -> bool:
    return match.startswith(rule["prefix"]) if "prefix" in rule else kind == "path" and rule["path"] == match


def _revoked(rng: random.Random) -> dict[str, Any]:
    revoked: dict[str, Any] = {"jti": rng.sample(JTI, 1), "sub": rng.sample(SUB, 1)}
    issued_before = {"issued_before": rng.choice((None, "2027-01-15T08:00:00Z", "2027-01-15T09:05:00+01:00"))}
    return {k: v for k, v in {**revoked, **issued_before}.items() if rng.random() < 0.6}
