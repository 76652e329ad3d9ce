"""The sentence: who is calling, what do they name, may they have it. One immutable snapshot a request.

`Snapshot` is everything a decision depends on. A new policy or key set makes a new snapshot with empty caches,
so nothing remembered can outlive what it was derived from.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType

from cachetools import LRUCache

from ext_authz import gate, identity
from ext_authz.identity import Keys
from ext_authz.model import Decision, Identity, Refusal, Request, refuse
from ext_authz.policy import Policy, decide

DOWNGRADE = "x-srp-downgrade"
CACHED_TOKENS = 16_384
CACHED_DECISIONS = 16_384

Memo = MutableMapping[tuple[Identity, tuple[str, ...], bool], Decision]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One epoch: a policy, the keys it is read with, and what has been worked out under them (bounded)."""

    policy: Policy
    keys: Keys = field(default_factory=lambda: MappingProxyType({}))
    epoch: int = 0
    tokens: MutableMapping[bytes, Identity] = field(default_factory=lambda: LRUCache(CACHED_TOKENS))
    decisions: Memo = field(default_factory=lambda: LRUCache(CACHED_DECISIONS))
    anonymous: Identity | Refusal = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anonymous", identity.anonymous(self.policy))


def check(snapshot: Snapshot, request: Request, now: float) -> Decision | Refusal:
    """The decision on one request at `now` (seconds since the epoch).

    A Refusal comes back only when fresh keys of `Refusal.issuer` could change it; `refuse` makes it a decision.
    """
    caller = identify(snapshot, request, now)
    if isinstance(caller, Refusal):
        return caller if caller.issuer else refuse(caller)
    names = gate.read(snapshot.policy, request)
    if isinstance(names, Refusal):
        return refuse(names, snapshot.policy.tiers[caller.tier])
    downgrade = may_downgrade(request)
    if snapshot.policy.reads_request:
        return decide(snapshot.policy, caller, names, request, downgrade)
    key = (caller, names, downgrade)
    decision = snapshot.decisions.get(key)
    if decision is None:
        decision = decide(snapshot.policy, caller, names, request, downgrade)
        if not decision.unknown:  # names that anybody can invent would fill the memory
            snapshot.decisions[key] = decision
    return decision


def may_downgrade(request: Request) -> bool:
    """Whether the client takes a lesser expert: it does, unless it says anything but `allow`."""
    return request.headers.get(DOWNGRADE, "allow") == "allow" and DOWNGRADE not in request.repeated


def identify(snapshot: Snapshot, request: Request, now: float) -> Identity | Refusal:
    """The caller, verified now or remembered until its token ends. A failure is never remembered."""
    token = identity.token_of(request)
    if token is None:
        return snapshot.anonymous
    if isinstance(token, Refusal):
        return token
    digest = blake2b(token.encode("utf-8", "surrogatepass"), digest_size=32).digest()
    known = snapshot.tokens.get(digest)
    if known is not None and now < known.expires:
        return known
    caller = identity.verify(snapshot.policy, snapshot.keys, token, now)
    if isinstance(caller, Identity):
        snapshot.tokens[digest] = caller
    return caller
