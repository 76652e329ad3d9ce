"""The control path: policy file → Policy → keys → Envoy's clusters → Envoy's ACK → decisions.

Clusters are make-before-break: decisions name a cluster only after Envoy has it. A policy that cannot be read, or
whose clusters Envoy rejects, changes nothing; one that is in force because no Envoy answered in time ends when an Envoy
rejects its clusters after all.

Other processes that decide (`Followers`) receive each epoch. A policy is reported as in force only when none of them
uses an older one.

Leases are break-before-make: each epoch has its own lease filter, which Envoy receives with the clusters. Once it is
sent, the old epoch grants no leases, and the new one grants them only while every Envoy has its filter.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ext_authz.core import leases
from ext_authz.core.policy import Policy
from ext_authz.core.snapshot import CacheSizes
from ext_authz.policyfile.parse import parse_policy
from ext_authz.policyfile.source import PolicyError
from ext_authz.policyfile.warnings import dropped, warnings
from ext_authz.serve.draining import Draining
from ext_authz.serve.epoch import Epoch
from ext_authz.sources.keys import KeyStore
from ext_authz.sources.watched import WatchedFile
from ext_authz.wire import lease_filter
from ext_authz.wire.ads import Ads, Publication, PublishResult, Resources
from ext_authz.wire.clusters import cluster_resources

ACK_TIMEOUT = 2.0  # seconds to wait for Envoy's ACK; after that the policy goes live without it
MAX_PREVIOUS = 8  # policies to return to
KEY_DEBOUNCE = 0.05  # seconds; key changes within this time are sent in one push
WORKER_LAG = 0.02  # seconds that Envoy's worker threads may lag behind its main thread, which sends the ACK

log = logging.getLogger("srp.reload")


@dataclasses.dataclass(frozen=True, slots=True)
class PolicyStatus:
    """The policy's part of `/status`. `since` is in seconds since the epoch.

    `error` is why the newest file is not in force; None if it is.
    """

    digest: str
    since: float
    reloads: int
    failures: int
    error: str | None
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Leasing:
    """The lease filter's script, and the size of its table on each of Envoy's worker threads."""

    script: str
    entries: int = leases.ENTRIES


class Followers(Protocol):
    """Other processes that decide with the epochs installed here."""

    async def prepare(self, digest: str, text: bytes, path: Path) -> None:
        """Make them compile a policy that may come into force."""

    async def settled(self) -> None:
        """Return when each of them uses the newest epoch or has ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Sent:
    """What Envoy was last sent: clusters, and the lease filter of `policy` for `lease_epoch`.

    `version` is that of the filter.
    """

    clusters: Resources
    policy: Policy
    lease_epoch: str
    version: str


class Control:
    """Keeps one policy in force. It calls `install` with each new epoch; `install` also passes it to the `followers`.

    If `leasing` is None, there are no leases.
    """

    def __init__(
        self,
        path: Path,
        keys: KeyStore,
        ads: Ads,
        install: Callable[[Epoch], None],
        leasing: Leasing | None = None,
        caches: CacheSizes | None = None,
        followers: Followers | None = None,
    ) -> None:
        self._file = WatchedFile(path)
        self._keys = keys
        self._ads = ads
        self._install = install
        self._leasing = leasing
        self._caches = caches or CacheSizes()
        self._followers = followers
        self._policy: Policy | None = None
        self._epoch = 0
        self._active: Epoch | None = None
        self._sent: _Sent | None = None
        self._digest = ""
        self._since = 0.0
        self._reloads = self._failures = 0
        self._error: str | None = None
        self._warnings: tuple[str, ...] = ()
        self._lock = asyncio.Lock()
        self._draining = Draining()
        self._dropping: asyncio.Task[None] | None = None
        self._pushing: asyncio.Task[None] | None = None
        self._text = b""  # of the policy in force
        # What to return to, newest first, until Envoy has acknowledged the policy in force.
        self._previous: tuple[tuple[Policy, bytes], ...] = ()
        self._returning: asyncio.Task[None] | None = None
        keys.on_change = self._keys_changed
        ads.on_change = self._envoy_answered

    @property
    def status(self) -> PolicyStatus:
        return PolicyStatus(self._digest, self._since, self._reloads, self._failures, self._error, self._warnings)

    @property
    def lease_epoch(self) -> str | None:
        """The epoch in which leases are granted; None while leases are off."""
        return self._active.lease_epoch if self._active is not None and self._active.grants else None

    async def start(self) -> None:
        """Put the file's policy into force. PolicyError or OSError if it cannot be loaded."""
        async with self._lock:
            text = await self._file.read() or b""
            await self._adopt(await self._parse(text), text)

    async def watch(self) -> None:
        """Follow the file until cancelled."""
        async for _ in self._file.changes():
            await self.reload()

    async def reload(self) -> bool:
        """Read the file again and put it into force if it has changed and is valid. Returns whether it did."""
        async with self._lock:
            try:
                text = await self._file.read()
                if text is None:
                    return False
                policy = await self._parse(text)
            except OSError as e:
                if str(e) != self._error:  # a file that is gone is one failure, however often it is looked for
                    self._refuse(str(e))
                return False
            except PolicyError as e:
                self._refuse(str(e))
                return False
            return await self._adopt(policy, text)

    async def close(self) -> None:
        """Cancel what is still scheduled."""
        for task in (self._dropping, self._pushing, self._returning):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _parse(self, text: bytes) -> Policy:
        path = self._file.path
        # Key files are the key store's: a revocation must not wait for another file to be mended.
        return await asyncio.to_thread(parse_policy, text, str(path), path.parent, key_files=False)

    async def _adopt(self, policy: Policy, text: bytes) -> bool:
        old = self._policy
        if self._followers is not None:
            await self._followers.prepare(policy.digest, text, self._file.path)
        # Follow the issuers of both policies until the swap: the old policy still decides.
        await self._keys.follow({**(old.issuers if old else {}), **policy.issuers}.values())
        lease_epoch = _new_lease_epoch()
        published = await self._publish(self._clusters(policy, old), policy, lease_epoch)
        if published.result is PublishResult.NACKED:
            if old is not None:
                await self._keys.follow(old.issuers.values())
                active = self._active.lease_epoch if self._active else _new_lease_epoch()
                await self._publish(self._clusters(old), old, active, restoring=True)
            self._refuse(f"envoy rejected the policy's clusters: {published.message}")
            return False
        if old is None or published.result is PublishResult.ACKED:
            self._previous = ()
        else:
            self._previous = ((old, self._text), *self._previous)[:MAX_PREVIOUS]
        await self._put_in_force(policy, text, lease_epoch)
        self._error = None
        self._reloads += old is not None
        self._warnings = (*warnings(policy), *(dropped(old, policy) if old is not None else ()))
        log.info("policy %s is in force (%s)", policy.digest, published.message or published.result.value)
        for warning in self._warnings:
            log.warning("policy %s: %s", policy.digest, warning)
        return True

    async def _put_in_force(self, policy: Policy, text: bytes, lease_epoch: str) -> None:
        """Decide by `policy`, whose clusters Envoy was sent; the clusters of the one before stay for a while."""
        old, self._policy, self._text = self._policy, policy, text
        self._renew(lease_epoch)
        if self._followers is not None:
            await self._followers.settled()
        if old is not None and not set(old.envoy_clusters.values()) <= set(policy.envoy_clusters.values()):
            self._draining.add(old, time.monotonic())
            if self._dropping is None or self._dropping.done():
                self._dropping = asyncio.create_task(self._drop_clusters())
        self._digest, self._since = policy.digest, time.time()
        await self._keys.follow(policy.issuers.values())

    def _clusters(self, policy: Policy, *more: Policy | None) -> Resources:
        """The clusters of a policy, of those in `more`, and of those that are draining."""
        return cluster_resources(
            policy, *(p for p in more if p is not None), *self._draining.policies(time.monotonic())
        )

    async def _drop_clusters(self) -> None:
        """Drop the clusters of each draining policy when its time has come, until none is left."""
        while (end := self._draining.next_end()) is not None:
            await asyncio.sleep(max(0.0, end - time.monotonic()))
            async with self._lock:
                if self._policy is None or self._sent is None:
                    return
                # Envoy keeps the lease filter that it has: a new one would start another epoch.
                published = await self._publish(self._clusters(self._policy), self._sent.policy, self._sent.lease_epoch)
                if published.result is PublishResult.NACKED:
                    self._error = f"envoy rejected the removal of clusters: {published.message}"
                    log.error("%s", self._error)

    def _envoy_answered(self) -> None:
        """An Envoy has connected, left, or answered: perhaps later than a push waits for it."""
        self._agree()
        if not self._previous:
            return
        if self._ads.settled and not self._lock.locked():
            self._previous = ()
        elif self._ads.refused and (self._returning is None or self._returning.done()):
            self._returning = asyncio.create_task(self._return())

    async def _return(self) -> None:
        """Put the previous policy back in force, as an Envoy has rejected the clusters of this one after all."""
        async with self._lock:
            error, refused = self._ads.refused, self._policy
            if error is None or refused is None:
                return
            while self._previous:
                (previous, text), *older = self._previous
                self._previous = tuple(older)
                lease_epoch = _new_lease_epoch()
                if self._followers is not None:
                    await self._followers.prepare(previous.digest, text, self._file.path)
                await self._keys.follow({**refused.issuers, **previous.issuers}.values())
                published = await self._publish(self._clusters(previous), previous, lease_epoch, restoring=True)
                if published.result is PublishResult.NACKED and older:
                    continue  # Envoy never had this one either
                if published.result is PublishResult.ACKED:
                    self._previous = ()
                self._policy = None  # nothing of the refused policy is to drain: Envoy does not have its clusters
                await self._put_in_force(previous, text, lease_epoch)
                self._warnings = tuple(warnings(previous))
                self._refuse(f"envoy rejected the clusters of policy {refused.digest}, after it was in force: {error}")
                return

    async def _publish(
        self, clusters: Resources, policy: Policy, lease_epoch: str, restoring: bool = False
    ) -> Publication:
        """Send Envoy clusters and the lease filter of a policy, and wait for its answer."""
        script, entries = (self._leasing.script, self._leasing.entries) if self._leasing else (None, 0)
        resource = lease_filter.filter_resource(script, policy, lease_epoch, entries)
        resources = Resources.of({**clusters.types, lease_filter.TYPE_EXTENSION: (resource,)})
        version = resources.versions[lease_filter.TYPE_EXTENSION]
        self._sent = _Sent(clusters, policy, lease_epoch, version)
        held = self._ads.agreed(lease_filter.TYPE_EXTENSION)
        self._agree()
        published = await self._ads.publish(resources, ACK_TIMEOUT, restoring)
        if published.result is PublishResult.ACKED and held != self._sent.version:
            await asyncio.sleep(WORKER_LAG)
        return published

    def _renew(self, lease_epoch: str) -> None:
        """Start a new epoch: the policy in force with the current keys. Each one has a different lease epoch."""
        if self._policy is not None:
            self._epoch += 1
            self._active = Epoch.of(self._caches.snapshot(self._policy, self._keys.keys, self._epoch), lease_epoch)
            self._install(self._active)
            self._agree()

    def _keys_changed(self) -> None:
        self._renew(_new_lease_epoch())
        if self._pushing is None or self._pushing.done():
            self._pushing = asyncio.create_task(self._push())

    async def _push(self) -> None:
        """Send Envoy the lease filter of the newest epoch. Repeat if a newer epoch starts in the meantime."""
        while self._behind():
            await asyncio.sleep(KEY_DEBOUNCE)
            async with self._lock:
                if self._behind() and self._active is not None and self._sent is not None:
                    published = await self._publish(
                        self._sent.clusters, self._active.snapshot.policy, self._active.lease_epoch
                    )
                    if published.result is PublishResult.NACKED:
                        log.error("envoy rejected the lease filter, so there are no leases: %s", published.message)

    def _behind(self) -> bool:
        return (
            self._active is not None and self._sent is not None and self._active.lease_epoch != self._sent.lease_epoch
        )

    def _agree(self) -> None:
        """Grant leases exactly while every Envoy with a lease filter has the filter of the epoch in force."""
        active, sent = self._active, self._sent
        if active is None or sent is None:
            return
        grants = (
            self._leasing is not None
            and leases.possible(active.snapshot.policy)
            and active.lease_epoch == sent.lease_epoch
            and self._ads.agreed(lease_filter.TYPE_EXTENSION) == sent.version
        )
        if grants != active.grants:
            self._active = dataclasses.replace(active, grants=grants)
            self._install(self._active)

    def _refuse(self, error: str) -> None:
        self._failures += 1
        if error != self._error:
            kept = f"policy {self._policy.digest} stays in force" if self._policy else "there is no policy"
            log.error("%s; %s", error, kept)
        self._error = error


def _new_lease_epoch() -> str:
    """An id never used before, in any process: Envoy keeps its leases if it receives the same filter again."""
    return secrets.token_hex(8)
