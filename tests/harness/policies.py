"""Policies for tests: the demo's, and a small one of which any part can be replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from ext_authz.core.policy import Policy
from ext_authz.policyfile.parse import parse_policy
from tests.harness import ROOT
from tests.harness.tokens import AUDIENCE, ISSUER

# Policies with one mistake each, and those whose mistake is in a key file: the server starts with them.
BROKEN = sorted((ROOT / "tests/policyfile/broken").glob("*.yaml"))
BROKEN_KEYS = frozenset(
    {
        "jwks_file_is_a_folder", "jwks_file_missing", "jwks_file_not_json", "jwks_file_other_algorithm",
        "jwks_file_private", "secret_file_is_a_key", "secret_file_missing", "secret_file_short",
        "secret_too_short_for_hs512",
    }
)  # fmt: skip

# Who calls: the callers of `tokens`, some of them premium, and anonymous ones. The rest of a policy follows.
HEAD = f"""\
version: 1
tiers: [low, high]
issuers:
  - {{issuer: {ISSUER}, audiences: [{AUDIENCE}], algorithms: [ES256], jwks: {{file: jwks.json}}}}
anonymous: low
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
"""

# Fields: issuer, audience, jwks (a path), and the endpoints a, b and c (each `host:port`, or several with commas).
DEMO = """\
version: 1
tiers: [low, high]
issuers:
  - issuer: {issuer}
    audiences: [{audience}]
    algorithms: [ES256, RS256]
    jwks: {{file: {jwks}}}
anonymous: low
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
experts:
  A: {{tier: low, cluster: expert-a, endpoints: [{a}]}}
  B: {{tier: low, cluster: expert-b, endpoints: [{b}]}}
  C: {{tier: high, cluster: expert-c, endpoints: [{c}], downgrade_to: []}}
gate:
  - {{path: /route, json: /expert_names, default: [A, B]}}
  - {{prefix: /v1/, json: /model}}
  - {{prefix: /, header: x-expert-names}}
"""

SMALL: dict[str, Any] = {
    "version": 1,
    "tiers": ["low", "high"],
    "anonymous": "low",
    "clearance": [{"when": 'claims.plan == "premium"', "tier": "high"}],
    "experts": {
        "A": {"tier": "low", "cluster": "expert-a", "endpoints": ["expert-a:8001"]},
        "B": {"tier": "low", "cluster": "expert-b", "endpoints": ["expert-b:8002"]},
        "C": {"tier": "high", "cluster": "expert-c", "endpoints": ["expert-c:8003"]},
    },
}


def text(**overrides: Any) -> str:
    """The small policy's text, as JSON, with top-level keys replaced; None removes a key."""
    data = {key: value for key, value in (SMALL | overrides).items() if value is not None}
    return json.dumps(data, indent=1, ensure_ascii=False)


def policy(base: Path = Path(), **overrides: Any) -> Policy:
    """The small policy, compiled, with top-level keys replaced: `policy(anonymous="deny")`."""
    return parse_policy(text(**overrides), base=base)


def write_keys(directory: Path) -> None:
    """Key files for issuers: `jwks.json`, `private.json` (which must be refused) and `secret`, of 32 bytes."""
    private = ec.generate_private_key(ec.SECP256R1())
    for name, key in (("jwks", private.public_key()), ("private", private)):
        jwk = {**ECAlgorithm.to_jwk(key, as_dict=True), "kid": "test"}
        (directory / f"{name}.json").write_text(json.dumps({"keys": [jwk]}))
    (directory / "secret").write_bytes(b"s" * 31 + b"!")


def with_stand_ins(**c: Any) -> Policy:
    """A and B are low, D is high; C is high, and B, D and A stand in for it. `c` replaces keys of expert C."""
    experts = {
        "A": {"tier": "low", "endpoints": ["a:1"]},
        "B": {"tier": "low", "endpoints": ["b:1"], "weight": 3, "allow": "claims.org == 'acme'"},
        "C": {"tier": "high", "endpoints": ["c:1"], "downgrade_to": ["B", "D", "A"], "unavailable": "downgrade", **c},
        "D": {"tier": "high", "endpoints": ["d:1"]},
    }
    return policy(experts=experts, lease="30s", gate=[{"prefix": "/", "header": "x-expert-names"}])
