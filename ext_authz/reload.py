"""The control path: policy file → Policy → keys → Envoy's clusters → Envoy's ACK → decisions.

Make before break: decisions name a cluster only after Envoy has it. A policy that cannot be read, or whose clusters
Envoy refuses, changes nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from ext_authz import policy_file
from ext_authz.check import Snapshot
from ext_authz.clusters import cluster_resources
from ext_authz.keys import KeyStore
from ext_authz.policy import Policy
from ext_authz.policy_file import PolicyError
from ext_authz.server import Epoch
from ext_authz.watched import WatchedFile
from ext_authz.xds import Ads, Kind

ACK_TIMEOUT = 2.0  # seconds to wait for Envoy before going live without it
CLUSTER_DRAIN = 10.0  # seconds that a removed expert's cluster outlives the last decision that named it

log = logging.getLogger("srp.reload")


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyStatus:
    """What `/status` tells of the policy. `since` is in seconds since the epoch.

    `error` is why the newest file is not in force, None when it is.
    """

    digest: str
    since: float
    reloads: int
    failures: int
    error: str | None
    warnings: tuple[str, ...]


class Control:
    """Keeps one policy in force. `install` is called with each new epoch."""

    def __init__(self, path: Path, keys: KeyStore, ads: Ads, install: Callable[[Epoch], None]) -> None:
        self._file = WatchedFile(path)
        self._keys = keys
        self._ads = ads
        self._install = install
        self._policy: Policy | None = None
        self._epoch = 0
        self._since = 0.0
        self._reloads = self._failures = 0
        self._error: str | None = None
        self._warnings: tuple[str, ...] = ()
        self._lock = asyncio.Lock()
        self._drain: asyncio.Task[None] | None = None
        keys.on_change = self._renew

    @property
    def status(self) -> PolicyStatus:
        digest = self._policy.digest if self._policy else ""
        return PolicyStatus(digest, self._since, self._reloads, self._failures, self._error, self._warnings)

    async def start(self) -> None:
        """Put the file's policy in force; PolicyError or OSError if there is none to be had."""
        await self._adopt(await self._parse(await self._file.read() or b""))

    async def watch(self) -> None:
        """Follow the file until cancelled."""
        async for _ in self._file.changes():
            await self.reload()

    async def reload(self) -> bool:
        """Read the file again; put it in force if it changed and is good. Whether it did."""
        async with self._lock:
            try:
                text = await self._file.read()
                if text is None:
                    return False
                policy = await self._parse(text)
            except (PolicyError, OSError) as e:
                self._refuse(str(e))
                return False
            return await self._adopt(policy)

    async def close(self) -> None:
        """End what is still to come."""
        if self._drain is not None:
            self._drain.cancel()
            await asyncio.gather(self._drain, return_exceptions=True)

    async def _parse(self, text: bytes) -> Policy:
        path = self._file.path
        return await asyncio.to_thread(policy_file.parse, text, str(path), path.parent)

    async def _adopt(self, policy: Policy) -> bool:
        old = self._policy
        # Until the swap both policies' issuers are followed: the old one still answers.
        await self._keys.follow({**(old.issuers if old else {}), **policy.issuers}.values())
        if self._drain is not None:
            self._drain.cancel()
        outcome = await self._ads.publish(cluster_resources(_both(old, policy)), timeout=ACK_TIMEOUT)
        if outcome.kind is Kind.NACKED:
            if old is not None:
                await self._keys.follow(old.issuers.values())
                await self._ads.publish(cluster_resources(old), timeout=ACK_TIMEOUT)
            self._refuse(f"envoy refused the policy's clusters: {outcome.message}")
            return False
        self._policy, self._error, self._since = policy, None, time.time()
        self._reloads += old is not None
        self._warnings = tuple(policy_file.warnings(policy))
        if old is not None:
            self._warnings += tuple(policy_file.dropped(old, policy))
            if set(old.experts) - set(policy.experts):
                self._drain = asyncio.create_task(self._drop_clusters(policy))
        self._renew()
        await self._keys.follow(policy.issuers.values())
        log.info("policy %s is in force (%s)", policy.digest, outcome.message or outcome.kind.value)
        for warning in self._warnings:
            log.warning("policy %s: %s", policy.digest, warning)
        return True

    async def _drop_clusters(self, policy: Policy) -> None:
        await asyncio.sleep(CLUSTER_DRAIN)
        outcome = await self._ads.publish(cluster_resources(policy), timeout=ACK_TIMEOUT)
        if outcome.kind is Kind.NACKED:
            self._error = f"envoy refused to drop clusters: {outcome.message}"
            log.error("%s", self._error)

    def _renew(self) -> None:
        """A new epoch: the policy in force with the keys of now."""
        if self._policy is not None:
            self._epoch += 1
            self._install(Epoch.of(Snapshot(self._policy, self._keys.keys, self._epoch)))

    def _refuse(self, error: str) -> None:
        self._failures += 1
        if error != self._error:
            kept = f"policy {self._policy.digest} stays in force" if self._policy else "there is no policy"
            log.error("%s; %s", error, kept)
        self._error = error


def _both(old: Policy | None, new: Policy) -> Policy:
    """The new policy with the old one's experts still in it, as long as a decision under way may name them.

    An expert whose cluster the new policy gives to another is left out: a cluster has one owner.
    """
    if old is None:
        return new
    taken = {e.cluster for e in new.experts.values()}
    kept = {n: e for n, e in old.experts.items() if n not in new.experts and e.cluster not in taken}
    if not kept:
        return new
    return dataclasses.replace(new, experts=MappingProxyType({**new.experts, **kept}))
