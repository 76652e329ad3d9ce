from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.harness import tokens
from tests.harness.system import System, system

settings.register_profile("srp", deadline=None)  # the time an example takes depends on the machine
settings.load_profile("srp")

POLICY = """\
version: 1
tiers: [low, high]
issuers:
  - issuer: {issuer}
    audiences: [{audience}]
    algorithms: [RS256, ES256, EdDSA]
    jwks: {{file: jwks.json}}
anonymous: low
leeway: 1s
clearance:
  - {{when: 'claims.plan == "premium"', tier: high}}
experts:
  A: {{tier: low, cluster: expert-a, endpoints: [{a}], health: {{path: /healthz, interval: 1s}}}}
  B: {{tier: low, cluster: expert-b, endpoints: [{b}], health: {{path: /healthz, interval: 1s}}}}
  C: {{tier: high, cluster: expert-c, endpoints: [{c}], health: {{path: /healthz, interval: 1s}}}}
  D: {{tier: high, cluster: expert-d, endpoints: [{c2}], downgrade_to: [B, A]}}
gate:
  - {{path: /route, json: /expert_names, default: [A, B]}}
  - {{prefix: /v1/, json: /model, default: [A, B]}}
  - {{prefix: /asked/, header: x-target-cluster, default: [A, B]}}
  - {{prefix: /, header: x-expert-names, default: [A, B]}}
"""


def demo_policy(ports: dict[str, list[int]]) -> str:
    def listed(name: str) -> str:
        return ", ".join(f"127.0.0.1:{port}" for port in ports[name])

    return POLICY.format(
        issuer=tokens.ISSUER, audience=tokens.AUDIENCE, a=listed("A"), b=listed("B"), c=listed("C"), c2=listed("D")
    )


@pytest.fixture(scope="session")
def proxy() -> Iterator[System]:
    """One running proxy, for tests that leave it as they found it."""
    files = {"jwks.json": tokens.jwks("RS256", "ES256", "EdDSA")}
    with system(demo_policy, {"A": 2, "B": 2, "C": 1, "D": 1}, files) as it:
        yield it
