"""One epoch: a policy, the keys that verify its tokens, and caches of what was derived from the two.

Everything that a decision depends on, except the request and the time, is in its snapshot. A new policy or key set
makes a new snapshot with empty caches, so no cached value outlives what it was derived from. The caches:

| cache       | key                                      | value                  | valid until            |
|-------------|------------------------------------------|------------------------|------------------------|
| `tokens`    | BLAKE2b digest of the whole token        | the verified Identity  | the token expires      |
| `decisions` | caller (or its tier), names, downgrade   | the Decision           | the snapshot ends      |
| `requests`  | path and digest of all headers, as sent  | the Outcome, or what   | the caller's token     |
|             |                                          | the headers say if the | expires                |
|             |                                          | body names the experts |                        |

Why that is safe: failures are never cached, so a bad token is verified each time; a digest covers every byte that the
cached value was derived from (with 256 bits of BLAKE2b, collisions cannot be found); a decision is cached without its
caller only if no condition can read claims, and not at all if one reads the request; and time, the only other input, is
compared with `Identity.expires` on every use. Only `core.check` uses the caches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ext_authz.core import gate, identity
from ext_authz.core.cache import Cache, CacheCounts
from ext_authz.core.headers import DOWNGRADE, TOKEN_HEADERS
from ext_authz.core.identity import Keys
from ext_authz.core.model import Decision, Identity, Outcome, Refusal
from ext_authz.core.policy import Body, Policy

CACHED_TOKENS = 32_768
CACHED_DECISIONS = 32_768
CACHES = ("tokens", "decisions", "requests")  # of a Snapshot

Fingerprint = tuple[str, bytes]  # path without query, digest of the headers' exact text


@dataclass(frozen=True, slots=True)
class Asked:
    """What the path and headers of a request say if its body, which `source` reads, names the experts."""

    caller: Identity
    source: Body
    default: tuple[str, ...] | None
    downgrade: bool


Tokens = Cache[bytes, Identity]
Decisions = Cache[tuple[Identity | tuple[int, tuple[str, ...]], tuple[str, ...], bool], Decision]
Requests = Cache[Fingerprint, Outcome | Asked]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One epoch, immutable except for its caches, which are bounded.

    `reads` are the headers that a decision may read (None: any); `personal`: whether it may read the caller's claims.
    """

    policy: Policy
    keys: Keys = field(default_factory=lambda: MappingProxyType({}))
    epoch: int = 0
    tokens: Tokens = field(default_factory=lambda: Cache(CACHED_TOKENS))
    decisions: Decisions = field(default_factory=lambda: Cache(CACHED_DECISIONS))
    requests: Requests = field(default_factory=lambda: Cache(CACHED_DECISIONS))
    anonymous: Identity | Refusal = field(init=False)
    reads: frozenset[str] | None = field(init=False)
    personal: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anonymous", identity.anonymous(self.policy))
        object.__setattr__(self, "reads", headers_read(self.policy))
        object.__setattr__(self, "personal", any(e.allow is not None for e in self.policy.experts.values()))


@dataclass(frozen=True, slots=True)
class CacheSizes:
    """How much each epoch may cache, in ordinary entries, and usage counts of the caches across all epochs."""

    tokens: int = CACHED_TOKENS
    decisions: int = CACHED_DECISIONS
    counts: Mapping[str, CacheCounts] = field(default_factory=lambda: {name: CacheCounts() for name in CACHES})

    def snapshot(self, policy: Policy, keys: Keys, epoch: int) -> Snapshot:
        """A new epoch, with empty caches."""
        tokens: Tokens = Cache(self.tokens, self.counts["tokens"])
        decisions: Decisions = Cache(self.decisions, self.counts["decisions"])
        requests: Requests = Cache(self.decisions, self.counts["requests"])
        return Snapshot(policy, keys, epoch, tokens, decisions, requests)


def headers_read(policy: Policy) -> frozenset[str] | None:
    """The headers that `check` may read under `policy`; None: any."""
    return None if policy.reads_request else gate.headers(policy).union(TOKEN_HEADERS, (DOWNGRADE,))
