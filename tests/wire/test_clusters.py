"""From a policy to Envoy's clusters, read back with envoy-data-plane as Envoy would read them."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from itertools import permutations
from typing import Any

import pytest
from envoy_data_plane.envoy.config.cluster.v3 import Cluster, ClusterDiscoveryType
from envoy_data_plane.envoy.extensions.clusters.aggregate.v3 import ClusterConfig
from envoy_data_plane.envoy.extensions.clusters.dns.v3 import DnsCluster
from envoy_data_plane.envoy.extensions.load_balancing_policies.least_request.v3 import LeastRequest
from envoy_data_plane.envoy.extensions.load_balancing_policies.subset.v3 import Subset

from ext_authz.core.policy import Endpoint, Expert, Health, Outlier, Policy, Traffic
from ext_authz.wire.ads import Resources
from ext_authz.wire.clusters import MAX_PAIRED, SPARE, TYPE_CLUSTER, cluster_resources

HERE = Endpoint("10.0.0.1", 80)


def expert(name: str, *endpoints: Endpoint, **traffic: Any) -> Expert:
    return Expert(name, 0, f"expert-{name.lower()}", endpoints or (HERE,), traffic=Traffic(**traffic))


def resources(*experts: Expert) -> Resources:
    return cluster_resources(Policy(("low",), {e.name: e for e in experts}))


def made(*experts: Expert) -> dict[str, Any]:
    """The clusters by their names without digests, by which statistics call them."""
    return plain(parsed(resources(*experts)))


def parsed(found: Resources) -> dict[str, Any]:
    clusters = [Cluster.parse(data) for data in found.types[TYPE_CLUSTER]]
    assert len({c.name for c in clusters}) == len(clusters)
    return {c.name: c for c in clusters}


def plain(clusters: dict[str, Any]) -> dict[str, Any]:
    found = {without_digests(name): c for name, c in clusters.items()}
    assert len(found) == len(clusters)
    assert all(c.alt_stat_name == name for name, c in found.items() if name != SPARE)
    return found


def without_digests(name: str) -> str:
    return re.sub(r"\.[0-9a-f]{16}", "", name)


def rungs(cluster: Any) -> list[str]:
    """The rungs of a ladder, without digests; each is the name of a cluster of this policy."""
    return [*map(without_digests, ClusterConfig.parse(cluster.cluster_type.typed_config.value).clusters)]


def many(n: int) -> list[Expert]:
    return [expert(f"E{i}") for i in range(n)]


A, B, C = expert("A"), expert("B"), expert("C")

LADDERS = [
    ("no expert", [], {}),
    ("one", [A], {}),
    ("two: no third could take over", [A, B], {"expert-a~expert-b": "ab", "expert-b~expert-a": "ba"}),
    (
        "three",
        [A, B, C],
        {f"expert-{x}~expert-{y}": f"{x}{y}****" for x, y in permutations("abc", 2)},
    ),
]


@pytest.mark.parametrize(("name", "experts", "expected"), LADDERS)
def test_every_ordered_pair_has_a_ladder(name: str, experts: list[Expert], expected: dict[str, str]) -> None:
    letters = {"a": "expert-a", "b": "expert-b", "c": "expert-c", "*": SPARE}
    ladders = {n: rungs(c) for n, c in made(*experts).items() if "~" in n and n != SPARE}
    assert ladders == {n: [letters[x] for x in text] for n, text in expected.items()}


@pytest.mark.parametrize(
    ("experts", "clusters"),
    [
        (0, 0),
        (1, 1),
        (2, 2 + 2),
        (MAX_PAIRED, MAX_PAIRED * MAX_PAIRED + 1),
        (MAX_PAIRED + 1, 2 * (MAX_PAIRED + 1) + 1),
        (1000, 2001),
    ],
)
def test_the_number_of_clusters_grows_no_faster_than_this(experts: int, clusters: int) -> None:
    assert len(resources(*many(experts)).types[TYPE_CLUSTER]) == clusters


def test_above_the_limit_a_ladder_is_one_expert_and_the_spare() -> None:
    ladders = made(*many(MAX_PAIRED + 1))
    assert set(rungs(ladders["expert-e7~"])) == {"expert-e7", SPARE}


def test_the_same_policy_gives_the_same_bytes_in_any_order() -> None:
    assert resources(A, B, C) == resources(C, B, A)


DIFFERENT = [
    expert("A", Endpoint("10.0.0.2", 80)),
    expert("A", Endpoint("10.0.0.1", 81)),
    expert("A", Endpoint("10.0.0.1", 80), Endpoint("10.0.0.2", 80)),
    expert("A", max_requests=7),
    expert("A", health=None),
    expert("A", outlier=None),
    expert("A", slow_start=1.0),
    replace(A, cluster="expert-z"),
    replace(A, name="Z"),
]


@pytest.mark.parametrize("other", DIFFERENT)
def test_what_changes_the_clusters_changes_the_version(other: Expert) -> None:
    assert resources(A).version != resources(other).version


def test_what_does_not_concern_envoy_does_not_change_the_version() -> None:
    traffic = Traffic(timeout=1, retries=3, retry_on="5xx")
    other = replace(A, weight=9, downgrade_to=("B",), line=7, traffic=traffic)
    one, two = (cluster_resources(Policy(("low", "high"), {"A": e}, digest=d)) for e, d in ((A, "x"), (other, "y")))
    assert one == two


def test_a_cluster_has_all_settings_of_its_experts_traffic() -> None:
    cluster = made(
        expert(
            "A", Endpoint("10.0.0.1", 80), Endpoint("::1", 81), connect_timeout=0.25, max_requests=7, max_pending=8,
            health=Health("/up", 0.5), outlier=Outlier(3, 4.5), slow_start=30.0,
        )
    )["expert-a"]  # fmt: skip
    assert cluster.type == ClusterDiscoveryType.STATIC
    assert cluster.connect_timeout == timedelta(seconds=0.25)
    found = cluster.load_assignment.endpoints[0].lb_endpoints
    addresses = [e.endpoint.address.socket_address for e in found]
    assert [(a.address, a.port_value) for a in addresses] == [("10.0.0.1", 80), ("::1", 81)]
    assert {e.metadata.filter_metadata["srp"].fields["expert"].string_value for e in found} == {"A"}
    breaker = cluster.circuit_breakers.thresholds[0]
    assert (breaker.max_requests, breaker.max_pending_requests) == (7, 8)
    check = cluster.health_checks[0]
    assert check.http_health_check.path == "/up"
    assert check.interval == check.no_traffic_interval == timedelta(seconds=0.5)
    assert check.timeout == timedelta(seconds=0.5)
    outlier = cluster.outlier_detection
    assert (outlier.consecutive_gateway_failure, outlier.base_ejection_time) == (3, timedelta(seconds=4.5))
    policy = cluster.load_balancing_policy.policies[0].typed_extension_config
    balancer = LeastRequest.parse(policy.typed_config.value)
    assert balancer.slow_start_config.slow_start_window == timedelta(seconds=30)


def test_a_dns_name_is_resolved_as_often_as_its_ttl_says() -> None:
    cluster = made(expert("A", Endpoint("expert-a.moe.svc", 80), Endpoint("10.0.0.1", 80)))["expert-a"]
    dns = DnsCluster.parse(cluster.cluster_type.typed_config.value)
    assert dns.respect_dns_ttl
    assert not dns.all_addresses_in_single_endpoint


def test_health_checks_and_outlier_detection_can_be_switched_off() -> None:
    cluster = made(expert("A", health=None, outlier=None))["expert-a"]
    assert not cluster.health_checks
    assert cluster.outlier_detection is None


def test_no_cluster_sends_requests_to_endpoints_known_to_be_down() -> None:
    for cluster in made(A, B, C).values():
        assert cluster.common_lb_config.healthy_panic_threshold.value == 0


def test_the_spare_has_every_endpoint_and_selects_none_by_default() -> None:
    odd = expert("D", Endpoint("10.0.0.9", 80), health=Health("/other"))
    spare = made(A, B, C, odd)[SPARE]
    found = spare.load_assignment.endpoints[0].lb_endpoints
    tags = {e.metadata.filter_metadata["envoy.lb"].fields["cluster"].string_value for e in found}
    assert tags == set(Policy(("low",), {e.name: e for e in (A, B, C, odd)}).envoy_clusters.values())
    unchecked = [e.endpoint.health_check_config.disable_active_health_check for e in found]
    assert unchecked == [False, False, False, True]
    extension = spare.load_balancing_policy.policies[0].typed_extension_config
    subset = Subset.parse(extension.typed_config.value)
    assert subset.fallback_policy.name == "NO_FALLBACK"
    assert subset.metadata_fallback_policy.name == "FALLBACK_LIST"
    assert [s.keys for s in subset.subset_selectors] == [["cluster"]]
