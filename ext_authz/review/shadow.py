"""A second policy that also decides every request. Its decisions are only compared and counted.

It has its own snapshot, caches and key store, so its failures affect nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from ext_authz.core.check import check
from ext_authz.core.difference import Difference, difference
from ext_authz.core.model import Decision, Reason, Refusal, Request
from ext_authz.core.policy import Policy
from ext_authz.core.snapshot import Snapshot
from ext_authz.policyfile.parse import parse_policy
from ext_authz.policyfile.source import PolicyError
from ext_authz.sources.keys import KeyStore
from ext_authz.sources.watched import WatchedFile

log = logging.getLogger("srp.shadow")


class NotCompared(StrEnum):
    """Why there is nothing to compare: the shadow lacks the keys, the policy in force did not decide, or an internal
    error."""

    KEYS = "keys_unavailable"
    ACTIVE = "active_failed"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ShadowStatus:
    """The shadow's part of `/status`. `since`, in seconds since the epoch, is when the policy of `digest` was loaded.

    `differences` are counted since then. `error` is why the newest file was not loaded; None if it was.
    """

    digest: str | None
    since: float | None
    error: str | None
    differences: Mapping[str, int]


class Shadow:
    """Follows the policy file at `path`. `judge` may be called at any time; without a policy it does nothing."""

    def __init__(self, path: Path, keys: KeyStore | None = None) -> None:
        self.differences: Counter[str] = Counter()
        self._file = WatchedFile(path)
        self._keys = keys or KeyStore()
        self._keys.on_change = self._renew
        self._active: Snapshot | None = None
        self._policy: Policy | None = None
        self._snapshot: Snapshot | None = None
        self._since: float | None = None
        self._error: str | None = None
        self._before: Counter[str] = Counter()

    @property
    def status(self) -> ShadowStatus:
        digest = self._policy.digest if self._policy else None
        return ShadowStatus(digest, self._since, self._error, dict(sorted((self.differences - self._before).items())))

    def judge(self, request: Request, decision: Decision, now: float) -> Difference | None:
        """Count and return how the shadow's decision differs from `decision`; None if there is nothing to compare."""
        if self._snapshot is None:
            return None
        try:
            found = self._compare(self._snapshot, request, decision, now)
        except Exception as e:  # noqa: BLE001 - the request has its response: an error here is only counted
            if not self.differences[NotCompared.ERROR]:
                log.error("the shadow policy could not judge a request: %s", type(e).__name__)
            found = NotCompared.ERROR
        self.differences[found] += 1
        return found if isinstance(found, Difference) else None

    async def watch(self) -> None:
        """Load the file's policy, and reload it on changes until cancelled. An invalid file is only reported."""
        await self.reload()
        async for _ in self._file.changes():
            await self.reload()

    async def reload(self) -> bool:
        """Read the file again and load it if it has changed and is valid. Returns whether it did."""
        try:
            text = await self._file.read()
            if text is None:
                return False
            path = self._file.path
            policy = await asyncio.to_thread(parse_policy, text, str(path), path.parent, key_files=False)
        except (PolicyError, OSError) as e:
            self._refuse(str(e))
            return False
        await self._keys.follow(policy.issuers.values())
        self._policy, self._since, self._error = policy, time.time(), None
        self._before = self.differences.copy()
        self._renew()
        log.info("shadow policy %s is loaded", policy.digest)
        return True

    def set_active(self, active: Snapshot) -> None:
        """Use the keys of the snapshot in force for each issuer whose keys both policies read from one source."""
        self._active = active
        self._renew()

    async def close(self) -> None:
        await self._keys.close()

    def _compare(
        self, snapshot: Snapshot, request: Request, decision: Decision, now: float
    ) -> Difference | NotCompared:
        if decision.reason in (Reason.INTERNAL, Reason.KEYS_UNAVAILABLE):
            return NotCompared.ACTIVE
        own = check(snapshot, request, now)
        return NotCompared.KEYS if isinstance(own, Refusal) else difference(decision, own.decision)

    def _renew(self) -> None:
        if self._policy is None:
            return
        keys = dict(self._keys.keys)
        if self._active is not None:
            # A new key id makes the active policy's key store refresh at once; the shadow's own store lags behind.
            for name, issuer in self._policy.issuers.items():
                other = self._active.policy.issuers.get(name)
                if other and (other.jwks, other.secret_file) == (issuer.jwks, issuer.secret_file):
                    keys |= {name: self._active.keys[name]} if name in self._active.keys else {}
        self._snapshot = Snapshot(self._policy, keys)

    def _refuse(self, error: str) -> None:
        if error != self._error:
            kept = f"shadow policy {self._policy.digest} stays loaded" if self._policy else "there is no shadow policy"
            log.error("%s; %s", error, kept)
        self._error = error
