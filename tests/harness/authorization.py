"""An Authorization over a small policy, to be called without Envoy and without gRPC."""

from __future__ import annotations

from pathlib import Path

from ext_authz.core.jwk import parse_jwks
from ext_authz.core.policy import Policy
from ext_authz.core.snapshot import Snapshot
from ext_authz.observe.metrics import Tally
from ext_authz.policyfile import parse
from ext_authz.serve.authorization import Authorization
from ext_authz.serve.epoch import Epoch
from ext_authz.sources.keys import KeyStore
from tests.harness import tokens

POLICY = f"""\
version: 1
tiers: [low, high]
issuers:
  - {{issuer: "{tokens.ISSUER}", audiences: [{tokens.AUDIENCE}], algorithms: [ES256], jwks: {{file: jwks.json}}}}
anonymous: low
log_claims: [plan, org]
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
experts:
  A: {{tier: low, cluster: expert-a, endpoints: ["127.0.0.1:1"]}}
  B: {{tier: low, cluster: expert-b, endpoints: ["127.0.0.1:2"]}}
  C: {{tier: high, cluster: expert-c, endpoints: ["127.0.0.1:3"]}}
  D: {{tier: high, cluster: expert-d, endpoints: ["127.0.0.1:4"], downgrade_to: [B, A]}}
gate:
  - {{path: /route, json: /expert_names, default: [A, B]}}
  - {{prefix: /, header: x-expert-names}}
"""


def write_policy(directory: Path, text: str = POLICY, name: str = "policy.yaml") -> Path:
    """Write a policy, and the keys it names, to `directory`."""
    (directory / "jwks.json").write_bytes(tokens.jwks("ES256"))
    path = directory / name
    path.write_text(text)
    return path


def load_policy(directory: Path, *edits: tuple[str, str], text: str = POLICY) -> Policy:
    """The policy of `text` with each `(old, new)` replaced."""
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return parse.load_policy(write_policy(directory, text))


def snapshot(policy: Policy) -> Snapshot:
    return Snapshot(policy, {tokens.ISSUER: parse_jwks(tokens.jwks("ES256")).keys})


def authorization(policy: Policy) -> Authorization:
    return Authorization(Epoch.of(snapshot(policy)), KeyStore(), Tally())
