"""Where Envoy finds the workers: the endpoints of its cluster `ext_authz_workers`, for ADS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from envoy_data_plane.envoy.config.endpoint.v3 import ClusterLoadAssignment

from ext_authz.wire.twin import twins

CLUSTER = "ext_authz_workers"  # in envoy.yaml
TYPE_ENDPOINTS = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"

_TWINS = twins(ClusterLoadAssignment)
_OVERPROVISION = 100_000  # percent: as long as one worker is alive, only workers are asked


def worker_endpoints(sockets: Sequence[Path]) -> Mapping[str, tuple[bytes, ...]]:
    """The resources that name exactly these sockets. If there are none, Envoy asks the server named in envoy.yaml."""
    endpoints = [{"endpoint": {"address": {"pipe": {"path": str(path.absolute())}}}} for path in sockets]
    assignment = _TWINS[ClusterLoadAssignment](
        cluster_name=CLUSTER,
        endpoints=[{"lb_endpoints": endpoints}] if endpoints else [],
        policy={"overprovisioning_factor": {"value": _OVERPROVISION}},
    )
    return {TYPE_ENDPOINTS: (bytes(assignment.SerializeToString(deterministic=True)),)}
