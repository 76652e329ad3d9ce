"""One epoch as the server uses it: a snapshot, the writer of its responses, and whether it grants leases."""

from __future__ import annotations

from dataclasses import dataclass

from ext_authz.core.policy import Policy
from ext_authz.core.snapshot import Snapshot
from ext_authz.wire.check import Writer


@dataclass(frozen=True, slots=True)
class Epoch:
    """`lease_epoch` is its id in Envoy's lease filter. `grants` is whether decisions may carry leases now."""

    snapshot: Snapshot
    writer: Writer
    lease_epoch: str = ""
    grants: bool = False

    @staticmethod
    def of(snapshot: Snapshot, lease_epoch: str = "") -> Epoch:
        """The epoch of `snapshot`, which does not grant leases yet."""
        return Epoch(snapshot, Writer(snapshot.policy, lease_epoch), lease_epoch)


NO_POLICY = Epoch.of(Snapshot(Policy(tiers=("none",), experts={})))  # denies every request until there is a policy
