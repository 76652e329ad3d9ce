"""A second policy that judges every request beside the one in force, and is only counted.

It has a snapshot, caches and key store of its own: whatever is wrong with it stays here.
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


class Undecided(StrEnum):
    """Why there is nothing to compare: no answer of the shadow (keys that it does not have), none of the policy in
    force, or a mistake of ours."""

    KEYS = "keys_unavailable"
    ACTIVE = "active_failed"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class ShadowStatus:
    """What `/status` tells. `since`, in seconds since the epoch, is when the shadow policy of `digest` was taken up.

    `differences` counts since then. `error` is why the newest file was not taken up, None if it was.
    """

    digest: str | None
    since: float | None
    error: str | None
    differences: Mapping[str, int]


class Shadow:
    """Follows the policy file at `path`. `judge` may be called at any time; without a policy it finds nothing."""

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

    def judge(self, request: Request, made: Decision, now: float) -> Difference | None:
        """Count, and tell, what would differ if the shadow were in force; None if there is nothing to compare."""
        if self._snapshot is None:
            return None
        try:
            found = self._compare(self._snapshot, request, made, now)
        except Exception as e:  # noqa: BLE001 - the request is answered: nothing may come of it but a count
            if not self.differences[Undecided.ERROR]:
                log.error("the shadow policy could not judge a request: %s", type(e).__name__)
            found = Undecided.ERROR
        self.differences[found] += 1
        return found if isinstance(found, Difference) else None

    async def watch(self) -> None:
        """Take up the file's policy, and follow it until cancelled. A file that is no policy is only reported."""
        await self.reload()
        async for _ in self._file.changes():
            await self.reload()

    async def reload(self) -> bool:
        """Read the file again; take it up if it changed and is good. Whether it did."""
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
        log.info("shadow policy %s judges beside the one in force", policy.digest)
        return True

    def beside(self, active: Snapshot) -> None:
        """Have the keys of what is in force now: those of an issuer that both policies read from one place."""
        self._active = active
        self._renew()

    async def close(self) -> None:
        await self._keys.close()

    def _compare(self, snapshot: Snapshot, request: Request, made: Decision, now: float) -> Difference | Undecided:
        if made.reason in (Reason.INTERNAL, Reason.KEYS_UNAVAILABLE):
            return Undecided.ACTIVE
        own = check(snapshot, request, now)
        return Undecided.KEYS if isinstance(own, Refusal) else difference(made, own.decision)

    def _renew(self) -> None:
        if self._policy is None:
            return
        keys = dict(self._keys.keys)
        if self._active is not None:
            # A key id that is new is fetched for the policy in force at once; the shadow's own store only follows.
            for name, issuer in self._policy.issuers.items():
                other = self._active.policy.issuers.get(name)
                if other and (other.jwks, other.secret_file) == (issuer.jwks, issuer.secret_file):
                    keys |= {name: self._active.keys[name]} if name in self._active.keys else {}
        self._snapshot = Snapshot(self._policy, keys)

    def _refuse(self, error: str) -> None:
        if error != self._error:
            kept = f"shadow policy {self._policy.digest} goes on" if self._policy else "there is no shadow policy"
            log.error("%s; %s", error, kept)
        self._error = error
