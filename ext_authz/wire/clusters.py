"""From a policy to Envoy clusters: one for each expert, and the *ladders* that lead from one to the next.

A request may be served by any expert that its decision permits, and by no other. Only the route script knows which of
them is idlest (envoy/least_request.lua), and only Envoy's health checks know which are alive. Ladders combine the two:
aggregate clusters, whose rungs Envoy tries in order, skipping dead ones.

    expert-a.D                expert A alone; D stands for the digest of `Policy.envoy_clusters`
    expert-a.D~expert-b.D     A, then B, then the spare
    expert-a.D~               A, then the spare: in policies of more than MAX_PAIRED experts, which have too many pairs
    ~spare                    every endpoint again, reachable only through the names in a request's `fallback_list`

The first two rungs are the idlest and the second idlest. If both are dead, the spare takes any other expert that the
request's decision permits. A request without a list gets no host from it, and one with a list only hosts on the list.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any, NamedTuple

from envoy_data_plane.envoy.config.cluster.v3 import Cluster, ClusterDiscoveryType, ClusterLbPolicy
from envoy_data_plane.envoy.extensions.clusters.aggregate.v3 import ClusterConfig
from envoy_data_plane.envoy.extensions.clusters.common.dns.v3 import DnsLookupFamily
from envoy_data_plane.envoy.extensions.clusters.dns.v3 import DnsCluster
from envoy_data_plane.envoy.extensions.load_balancing_policies.least_request.v3 import (
    LeastRequest,
    LeastRequestSelectionMethod,
)
from envoy_data_plane.envoy.extensions.load_balancing_policies.subset.v3 import (
    Subset,
    SubsetLbSubsetMetadataFallbackPolicy,
)
from envoy_data_plane.envoy.extensions.upstreams.http.v3 import HttpProtocolOptions
from envoy_data_plane.message_pool import default_message_pool

from ext_authz.core.policy import Expert, Health, Outlier, Policy
from ext_authz.wire.ads import Resources
from ext_authz.wire.twin import twins

TYPE_CLUSTER = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
SPARE = "~spare"  # no policy can define this name: cluster names have no `~`
MAX_PAIRED = 32  # experts; their 992 ladders cost Envoy about 40 MB
SPARE_RUNGS = 4  # a failed attempt ejects one endpoint, and the next attempt starts one rung lower

_TWINS = twins(Cluster, ClusterConfig, DnsCluster, LeastRequest, Subset, HttpProtocolOptions)
_OVERPROVISION = 100_000  # percent: one healthy endpoint of an expert takes all of its traffic
_UNLIMITED = 2**31

# Below the shortest keep-alive of common HTTP servers (uvicorn: 5 s), so that Envoy closes idle connections first
# and no request is sent into a connection that is being closed.
_IDLE = 4.0  # seconds

Fields = dict[str, Any]

_COMMON: Fields = {
    "healthy_panic_threshold": {"value": 0},  # otherwise Envoy sends requests to endpoints that it knows are dead
    "update_merge_window": {},  # 0: otherwise the workers get a health check's result up to a second late
}


class _Member(NamedTuple):
    """An expert under the name of its cluster in Envoy."""

    cluster: str
    expert: Expert


def cluster_resources(policy: Policy, *draining: Policy) -> Resources:
    """What Envoy needs to serve `policy`, and requests that `draining` policies, newest first, have let through.

    The same policies give the same bytes, whatever the order of their experts. Where two policies give the same name,
    it means the same (`Policy.envoy_clusters`), and the newer one says how requests are sent there.
    """
    members: dict[str, _Member] = {}
    ladders: dict[str, Fields] = {}
    spare = False
    for each in (policy, *draining):
        own = sorted((_Member(each.envoy_clusters[e.name], e) for e in each.experts.values()), key=lambda m: m.cluster)
        members = {m.cluster: m for m in own} | members
        ladders = {ladder["name"]: ladder for ladder in _ladders(own)} | ladders
        spare = spare or len(own) > 2
    clusters = [*map(_expert, members.values()), *ladders.values(), *([_spare([*members.values()])] if spare else [])]
    return Resources.of({TYPE_CLUSTER: tuple(_packed(Cluster, c) for c in clusters)})


def _expert(member: _Member) -> Fields:
    traffic = member.expert.traffic
    return {
        **_served(member.cluster, [member], traffic.health),
        "alt_stat_name": member.expert.cluster,  # statistics and logs go on under one name
        "connect_timeout": _seconds(traffic.connect_timeout),
        "load_balancing_policy": _lb_policy("least_request", LeastRequest, _least_request(traffic.slow_start)),
        "outlier_detection": _outlier(traffic.outlier) if traffic.outlier else None,
        "circuit_breakers": _breakers(traffic.max_requests, traffic.max_pending),
    }


def _ladders(members: Sequence[_Member]) -> Iterator[Fields]:
    spare = [SPARE] * SPARE_RUNGS if len(members) > 2 else []
    if len(members) <= MAX_PAIRED:
        ladders = [list(pair) for pair in permutations(members, 2)]
    else:
        ladders = [[member] for member in members]
    for tried in ladders:
        yield {
            "name": _ladder_name([m.cluster for m in tried]),
            "alt_stat_name": _ladder_name([m.expert.cluster for m in tried]),
            "lb_policy": ClusterLbPolicy.CLUSTER_PROVIDED,
            "cluster_type": {
                "name": "envoy.clusters.aggregate",
                "typed_config": _any(ClusterConfig, {"clusters": [*(m.cluster for m in tried), *spare]}),
            },
            "common_lb_config": _COMMON,
            "circuit_breakers": _breakers(),
        }


def _ladder_name(clusters: Sequence[str]) -> str:
    return "~".join(clusters) if len(clusters) > 1 else f"{clusters[0]}~"


def _spare(members: Sequence[_Member]) -> Fields:
    """What is left when the idlest two are dead.

    A cluster has one health check, so the spare has the one that most experts share. Endpoints of the others count as
    healthy until a connection fails: one failure ejects an endpoint, from this cluster only.
    """
    traffic = [m.expert.traffic for m in members]
    health, _ = Counter(t.health for t in traffic).most_common(1)[0]
    least = min(t.max_requests for t in traffic)
    subset = {
        "subset_selectors": [{"keys": ["cluster"]}],
        "metadata_fallback_policy": SubsetLbSubsetMetadataFallbackPolicy.FALLBACK_LIST,
        "subset_lb_policy": _lb_policy("least_request", LeastRequest, _least_request()),
    }
    return {
        **_served(SPARE, members, health),
        "connect_timeout": _seconds(min(t.connect_timeout for t in traffic)),
        "load_balancing_policy": _lb_policy("subset", Subset, subset),
        "outlier_detection": _outlier(Outlier(1, base_ejection=2.0)),
        "circuit_breakers": _breakers(least, least),
    }


def _served(name: str, members: Sequence[_Member], health: Health | None) -> Fields:
    """The part about the endpoints of one or more experts. `health` checks those experts that have this same check."""
    endpoints = [p for m in members for p in _endpoints(m, checked=m.expert.traffic.health == health)]
    http1 = {
        "explicit_http_config": {"http_protocol_options": {}},
        "common_http_protocol_options": {"idle_timeout": _seconds(_IDLE)},
    }
    return {
        "name": name,
        **_discovery([m.expert for m in members]),
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": endpoints}],
            "policy": {"overprovisioning_factor": {"value": _OVERPROVISION}},
        },
        "common_lb_config": _COMMON,
        "ignore_health_on_host_removal": True,
        "health_checks": _health_checks(health),
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": _any(HttpProtocolOptions, http1)
        },
    }


def _discovery(experts: Sequence[Expert]) -> Fields:
    """Names are resolved again when their TTL expires: a headless Service's name has an address for each ready pod."""
    if all(_is_address(p.host) for e in experts for p in e.endpoints):
        return {"type": ClusterDiscoveryType.STATIC}
    dns = {
        "dns_lookup_family": DnsLookupFamily.V4_PREFERRED,
        "respect_dns_ttl": True,
        "dns_min_refresh_rate": _seconds(1),
        "dns_refresh_rate": _seconds(5),
        "dns_failure_refresh_rate": {"base_interval": _seconds(1), "max_interval": _seconds(5)},
    }
    return {"cluster_type": {"name": "envoy.clusters.dns", "typed_config": _any(DnsCluster, dns)}}


def _endpoints(member: _Member, checked: bool) -> Iterator[Fields]:
    """`srp.expert` says who answered, for the response header and the log; `envoy.lb.cluster` is for the spare."""
    metadata = {
        "srp": {"fields": {"expert": {"string_value": member.expert.name}}},
        "envoy.lb": {"fields": {"cluster": {"string_value": member.cluster}}},
    }
    for endpoint in member.expert.endpoints:
        address = {"address": endpoint.host, "port_value": endpoint.port}
        yield {
            "endpoint": {
                "address": {"socket_address": address},
                "health_check_config": {"hostname": endpoint.host, "disable_active_health_check": not checked},
            },
            "metadata": {"filter_metadata": metadata},
        }


def _health_checks(health: Health | None) -> list[Fields]:
    """The first check is immediate. Two failures (or one 503) mark an endpoint dead, one success marks it alive."""
    if health is None:
        return []
    interval = _seconds(health.interval)
    return [
        {
            "http_health_check": {"path": health.path},
            "interval": interval,
            "no_traffic_interval": interval,
            "no_traffic_healthy_interval": interval,
            "unhealthy_interval": _seconds(min(health.interval, 1.0)),
            "timeout": _seconds(min(health.interval, 1.0)),
            "interval_jitter_percent": 10,
            "unhealthy_threshold": {"value": 2},
            "healthy_threshold": {"value": 1},
        }
    ]


def _outlier(outlier: Outlier) -> Fields:
    """Ejects on gateway failures (502, 503, 504) and, counted separately, on connections that fail or time out."""
    failures = {"value": outlier.consecutive_5xx}
    return {
        "split_external_local_origin_errors": True,
        "consecutive_gateway_failure": failures,
        "enforcing_consecutive_gateway_failure": {"value": 100},
        "consecutive_local_origin_failure": failures,
        "enforcing_consecutive_5xx": {"value": 0},
        "enforcing_success_rate": {"value": 0},
        "enforcing_local_origin_success_rate": {"value": 0},
        "base_ejection_time": _seconds(outlier.base_ejection),
        "interval": _seconds(1),
        "max_ejection_percent": {"value": 100},
    }


def _breakers(requests: int | None = None, pending: int | None = None) -> Fields:
    """Only requests are limited. Idle connections count as connections, so a limit on those would refuse requests
    needlessly; and when an expert dies, every request that was meant for it is a retry.
    """
    limits: Fields = {"max_connections": {"value": _UNLIMITED}, "max_retries": {"value": _UNLIMITED}}
    if requests is not None:
        limits |= {"max_requests": {"value": requests}, "max_pending_requests": {"value": pending}}
    return {"thresholds": [limits]}


def _least_request(slow_start: float = 0.0) -> Fields:
    config: Fields = {"selection_method": LeastRequestSelectionMethod.FULL_SCAN}
    if slow_start:
        config["slow_start_config"] = {"slow_start_window": _seconds(slow_start)}
    return config


def _lb_policy(name: str, message: type, config: Fields) -> Fields:
    extension = {"name": f"envoy.load_balancing_policies.{name}", "typed_config": _any(message, config)}
    return {"policies": [{"typed_extension_config": extension}]}


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _seconds(seconds: float) -> Fields:
    nanoseconds = round(seconds * 1e9)
    return {"seconds": nanoseconds // 10**9, "nanos": nanoseconds % 10**9}


def _any(message: type, fields: Fields) -> Fields:
    return {"type_url": default_message_pool.type_to_url[message], "value": _packed(message, fields)}


def _packed(message: type, fields: Fields) -> bytes:
    return _TWINS[message](**fields).SerializeToString(deterministic=True)
