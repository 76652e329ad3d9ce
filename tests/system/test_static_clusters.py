"""A policy cannot take over a cluster that Envoy has from elsewhere, nor send requests there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from ext_authz.policyfile.parse import parse_policy
from ext_authz.policyfile.source import PolicyError
from ext_authz.wire.ads import PublishResult
from tests.harness import ROOT
from tests.harness.rig import HOST, Rig, rig, until


def clusters_in(value: Any) -> Iterator[dict[str, Any]]:
    """The clusters that a manifest merges into Envoy's configuration (`--config-yaml`)."""
    if isinstance(value, list) and "--config-yaml" in value:
        yield from yaml.safe_load(value[value.index("--config-yaml") + 1])["static_resources"]["clusters"]
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from clusters_in(item)


MANIFESTS = [d for path in (ROOT / "k8s").rglob("*.yaml") for d in yaml.safe_load_all(path.read_text())]
MERGED = {cluster["name"]: cluster for cluster in clusters_in(MANIFESTS)}
OWN = [c["name"] for c in yaml.safe_load((ROOT / "envoy/envoy.yaml").read_text())["static_resources"]["clusters"]]


def merged(text: str) -> str:
    """envoy/envoy.yaml as it runs in a pod."""
    config = yaml.safe_load(text)
    config["static_resources"]["clusters"] += MERGED.values()
    return str(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def running() -> Iterator[Rig]:
    with rig({"X": 1}) as it:

        async def again() -> None:
            await it.stop_envoy()
            await it.start_envoy(merged)

        it.run(again())
        yield it


def test_every_static_cluster_is_known_here() -> None:
    assert set(MERGED) == {"admin"}
    assert set(OWN) == {"ext_authz", "ext_authz_ads", "ext_authz_workers", "ext_authz_any"}


@pytest.mark.parametrize("name", [*OWN, *MERGED])
@pytest.mark.parametrize(
    "form", ["{name}: {{tier: low, endpoints: [{at}]}}", "A: {{tier: low, cluster: {name}, endpoints: [{at}]}}"]
)
def test_an_expert_of_the_same_name_is_another_cluster_or_a_mistake(running: Rig, name: str, form: str) -> None:
    """Envoy would keep its own silently, and acknowledge: the expert's requests would go there."""
    at = f"{HOST}:{running.experts['X'][0].port}"
    text = f"version: 1\ntiers: [low]\nanonymous: low\nexperts:\n  {form.format(name=name, at=at)}\n"
    if "_" in name and "cluster" in form:  # without it, the cluster of `ext_authz` would be `ext-authz`
        with pytest.raises(PolicyError):
            parse_policy(text)
        return

    async def play() -> None:
        policy = parse_policy(text)
        (expert,) = policy.experts.values()
        outcome = await running.publish(policy)
        assert outcome.result is PublishResult.ACKED
        await until(lambda: running.ads.settled, "the ACK")
        answer = await running.send(expert.cluster)
        assert (answer.status, answer.text, answer.headers.get("x-srp-expert")) == (200, "X", expert.name)

    running.run(play())


@pytest.mark.parametrize("name", [*OWN, *MERGED, "admin.", "admin.admin", "admin.;w=1"])
def test_a_target_that_is_a_static_cluster_names_nobody(running: Rig, name: str) -> None:
    answer = running.run(running.send(set={"x-target-cluster": name}))
    assert (answer.status, answer.code) == (503, "experts_unavailable")
