"""A new policy that Envoy does not accept."""

from __future__ import annotations

from pathlib import Path

import pytest

import ext_authz.serve.control
from ext_authz.core.policy import Policy
from ext_authz.serve.control import Control
from ext_authz.serve.epoch import Epoch
from ext_authz.sources.keys import KeyStore
from ext_authz.wire.ads import Resources
from tests.harness import tokens
from tests.harness.rig import rig

POLICY = """\
version: 1
tiers: [low]
anonymous: low
issuers:
  - {{issuer: {issuer}, audiences: [{audience}], algorithms: [ES256], jwks: {{file: jwks.json}}}}
experts:
  A: {{tier: low, cluster: expert-a, endpoints: ["127.0.0.1:{port}"]}}
"""


def test_a_policy_that_envoy_rejects_changes_neither_decisions_nor_envoy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port of 99999 reaches Envoy: decisions and Envoy stay as they were, and Envoy's message is reported."""
    good_resources = ext_authz.serve.control.cluster_resources

    def with_mistake(policy: Policy, *draining: Policy) -> Resources:
        """The policy's resources; in those of the marked policy, the port is impossible."""
        made = good_resources(policy, *draining)
        if policy.experts["A"].traffic.max_requests != 99:
            return made
        return Resources.of({url: tuple(_port_99999(m) for m in messages) for url, messages in made.types.items()})

    monkeypatch.setattr(ext_authz.serve.control, "cluster_resources", with_mistake)
    path = tmp_path / "policy.yaml"
    (tmp_path / "jwks.json").write_bytes(tokens.jwks("ES256"))
    with rig({"A": 1}) as it:
        port = it.experts["A"][0].port
        text = POLICY.format(issuer=tokens.ISSUER, audience=tokens.AUDIENCE, port=port)
        path.write_text(text)
        installed: list[Epoch] = []

        async def scene() -> None:
            keys = KeyStore()
            control = Control(path, keys, it.ads, installed.append)
            try:
                await control.start()
                first = control.status.digest
                path.write_text(text.replace(f'{port}"]', f'{port}"], max_requests: 99'))
                epochs = len(installed)
                assert not await control.reload()
                assert control.status.digest == first
                assert control.status.error is not None
                assert "99999" in control.status.error or "port" in control.status.error.lower()
                assert {e.snapshot.policy.digest for e in installed[epochs:]} <= {first}
                assert (await it.send("expert-a")).status == 200
                path.write_text(text + "# mended\n")
                assert await control.reload()
                assert control.status.error is None
                assert installed[-1].snapshot.policy.digest == control.status.digest != first
            finally:
                await control.close()
                await keys.close()

        it.run(scene())


def _port_99999(message: bytes) -> bytes:
    from ext_authz.wire.clusters import _TWINS, Cluster  # the mistake is made in the message that is really sent

    cluster = _TWINS[Cluster].FromString(message)
    for group in cluster.load_assignment.endpoints:
        for endpoint in group.lb_endpoints:
            endpoint.endpoint.address.socket_address.port_value = 99999
    return bytes(cluster.SerializeToString())
