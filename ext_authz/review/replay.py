"""Replays a logged decision under two policies: how they differ, or why that is unknown. Pure.

Nothing is guessed. If a policy reads something that the record lacks, the record is not replayed. The replay trusts the
log that the caller's token was valid, unless the two policies may disagree about the token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

from ext_authz.core import identity
from ext_authz.core.clearance import clearance
from ext_authz.core.decide import decide
from ext_authz.core.difference import Difference, difference
from ext_authz.core.gate import rule_for
from ext_authz.core.headers import REQUESTED_CLUSTER
from ext_authz.core.model import Decision, Identity, Reason, Refusal, Request, refuse
from ext_authz.core.policy import Header, Policy, Revoked
from ext_authz.observe.decision_record import Record
from ext_authz.review.reads import Cause, NotReplayable, Reads

MAX_CACHED = 20_000  # entries of each cache

_T = TypeVar("_T")
_AT_THE_GATE = frozenset({Reason.BAD_GATE, Reason.NO_EXPERTS_REQUESTED})
_BY_CLUSTER = Header(REQUESTED_CLUSTER)
_REVOKED = Refusal(Reason.INVALID_TOKEN, "the token is revoked")
_UNTRUSTED = Refusal(Reason.INVALID_TOKEN, "the token's issuer is not trusted")


@dataclass(frozen=True, slots=True)
class Replayed:
    """Both decisions. `widening`: a denial became an allow, or the new policy offers an expert that the old policy does
    not permit for the caller."""

    old: Decision
    new: Decision
    difference: Difference
    widening: bool


class Replay:
    """Replays records under `old` and `new`. Equivalent records are decided once."""

    def __init__(self, old: Policy, new: Policy) -> None:
        self._old, self._new = old, new
        self._reads = tuple(Reads(p) for p in (old, new))
        self._same_gates = _same_gates(old, new)
        # Method and path matter only if the gates differ or a condition reads the request.
        self._by_request = not self._same_gates or old.reads_request or new.reads_request
        self._token_claims = _token_claims(old, new)
        self._issuers = {let_in: _changed_issuers(old, new, let_in) for let_in in (False, True)}
        self._revocations = {let_in: _changed_revocations(old.revoked, new.revoked, let_in) for let_in in (False, True)}
        self._relevant: dict[Any, _Relevant] = {}
        self._replayed: dict[Any, Replayed | NotReplayable] = {}
        self._decided: dict[Any, Replayed] = {}

    def __call__(self, record: Record) -> Replayed | NotReplayable:
        """The record's decisions under both policies."""
        of_old = record.policy == self._old.digest
        key = (
            record.requested, record.anonymous, record.downgrade, self._claims_of(record), of_old,
            record.reason in _AT_THE_GATE, (record.method, record.path) if self._by_request else None,
        )  # fmt: skip
        found = self._replayed.get(key)
        if found is None:
            found = _cached(self._replayed, key, self._replay(record))
        if of_old and isinstance(found, Replayed) and not _reproduces(found.old, record):
            return NotReplayable(Cause.OTHERWISE, "the old policy here does not reproduce the logged decision")
        return found

    def _claims_of(self, record: Record) -> object:
        """The record's claims that can affect its decision, as a hashable value."""
        if record.anonymous or record.claims is None:
            return None
        read = self._relevant_to(record).claims
        if read is None:
            return repr(record.claims), record.absent
        return tuple(repr(record.claims[n]) if n in record.claims else n in record.absent for n in read)

    def _relevant_to(self, record: Record) -> _Relevant:
        key = record.requested, record.anonymous
        found = self._relevant.get(key)
        if found is None:
            read = [reads.claims(record) for reads in self._reads]
            every = self._token_claims.union(*(names for names in read if names is not None))
            allowed = any(reads.allow(record) for reads in self._reads)
            relevant = _Relevant(None if None in read else tuple(sorted(every)), allowed)
            found = _cached(self._relevant, key, relevant)
        return found

    def _replay(self, record: Record) -> Replayed | NotReplayable:
        if record.requested is None and record.reason not in _AT_THE_GATE:
            return NotReplayable(Cause.EARLY)
        missing = self._gate(record) or self._token(record) or self._conditions(record)
        if missing:
            return missing
        callers = _caller(self._old, record), _caller(self._new, record)
        if self._relevant_to(record).allow:
            return self._outcome(record, *callers)
        # Without an `allow` rule, a decision depends on nothing else about the caller.
        ranks = tuple(c.reason if isinstance(c, Refusal) else c.tier for c in callers)
        key = ranks, record.requested, record.downgrade, record.reason in _AT_THE_GATE
        found = self._decided.get(key)
        return found or _cached(self._decided, key, self._outcome(record, *callers))

    def _outcome(self, record: Record, old_caller: Identity | Refusal, new_caller: Identity | Refusal) -> Replayed:
        old, new = _decide(self._old, old_caller, record), _decide(self._new, new_caller, record)
        found = difference(old, new)
        widening = found is Difference.DENY_TO_ALLOW or any(
            not _permitted(self._old, old_caller, record, name) for name in new.serve if name not in old.serve
        )
        return Replayed(old, new, found, widening)

    def _gate(self, record: Record) -> NotReplayable | None:
        """None if both policies read the same names from the request."""
        if self._same_gates:
            return None
        if record.path is None:
            return NotReplayable(Cause.REQUEST, "path")
        old, new = (rule_for(p, record.path) for p in (self._old, self._new))
        if (old and old.source) != (new and new.source):
            return NotReplayable(Cause.GATE, "other names may be read")
        if old and old.source == _BY_CLUSTER and self._old.clusters != self._new.clusters:
            return NotReplayable(Cause.GATE, "clusters changed")
        if old and new and old.default != new.default:
            # The record does not show whether the names were asked for or are the default.
            by_default = record.requested in (None, old.default) or record.policy != self._old.digest
            return NotReplayable(Cause.GATE, "the default may apply") if by_default else None
        return None

    def _token(self, record: Record) -> NotReplayable | None:
        """None if it is known whether each policy accepts the token."""
        if record.anonymous:
            return None
        # A caller that the old policy let in has an issuer that it trusts, and a token that it does not revoke.
        let_in = record.policy == self._old.digest
        changed = self._issuers[let_in]
        if changed and not record.knows("iss"):
            return NotReplayable(Cause.ISSUERS, "needs claims.iss")
        iss = (record.claims or {}).get("iss")
        if iss in changed and iss in self._old.issuers and iss in self._new.issuers:
            return NotReplayable(Cause.ISSUERS, f"other tokens of {iss} may be valid")
        lacking = next((claim for claim in self._revocations[let_in] if not record.knows(claim)), None)
        return NotReplayable(Cause.REVOKED, f"needs claims.{lacking}") if lacking else None

    def _conditions(self, record: Record) -> NotReplayable | None:
        """None if the record contains everything that its conditions read."""
        for reads in self._reads:
            missing = reads.missing(record)
            if missing:
                return missing
        return None


@dataclass(frozen=True, slots=True)
class _Relevant:
    """What can affect all records that ask for the same experts: `claims` (None: any), and whether there are `allow`
    rules."""

    claims: tuple[str, ...] | None
    allow: bool


def _token_claims(old: Policy, new: Policy) -> frozenset[str]:
    """The claims that either policy uses to judge a token."""
    revoked = (old.revoked, new.revoked)
    read = {
        "iss": True,
        "jti": any(r.jti for r in revoked),
        "sub": any(r.sub for r in revoked),
        "iat": any(r.issued_before is not None for r in revoked),
    }
    return frozenset(name for name, needed in read.items() if needed)


def _cached(cache: dict[Any, _T], key: object, value: _T) -> _T:
    """Cache `value` and return it. A full cache is emptied first."""
    if len(cache) >= MAX_CACHED:
        cache.clear()
    cache[key] = value
    return value


def _caller(policy: Policy, record: Record) -> Identity | Refusal:
    """The caller under `policy`. The record must contain everything that this needs."""
    if record.anonymous:
        return identity.anonymous(policy)
    claims: Mapping[str, Any] = record.claims or {}
    if record.knows("iss") and claims.get("iss") not in policy.issuers:
        return _UNTRUSTED
    if policy.revoked.covers(claims):
        return _REVOKED
    tier, errors = clearance(policy, claims)
    return Identity(tier, issuer="", claims=claims, errors=errors)


def _decide(policy: Policy, caller: Identity | Refusal, record: Record) -> Decision:
    if isinstance(caller, Refusal):
        return refuse(caller)
    if record.requested is None:
        return refuse(Refusal(record.reason, ""), policy.tiers[caller.tier])
    return decide(policy, caller, record.requested, Request(record.method, record.path or "", {}), record.downgrade)


def _permitted(policy: Policy, caller: Identity | Refusal, record: Record, expert: str) -> bool:
    if isinstance(caller, Refusal):
        return False
    request = Request(record.method, record.path or "", {})
    return bool(decide(policy, caller, (expert,), request, downgrade=False).serve)


def _reproduces(decision: Decision, record: Record) -> bool:
    return decision.verdict is record.verdict and set(decision.serve) == set(record.serve)


def _changed_issuers(old: Policy, new: Policy, let_in: bool) -> frozenset[str]:
    """The issuers that the policies treat differently, if that can affect the caller."""
    names = old.issuers.keys() if let_in else old.issuers.keys() | new.issuers.keys()
    return frozenset(name for name in names if old.issuers.get(name) != new.issuers.get(name))


def _changed_revocations(old: Revoked, new: Revoked, let_in: bool) -> list[str]:
    """The claims that decide whether only one of the policies revokes a token."""
    needed = [
        claim
        for claim, before, after in (("jti", old.jti, new.jti), ("sub", old.sub, new.sub))
        if after - before or (before - after and not let_in)
    ]
    before, after = (r.issued_before if r.issued_before is not None else -inf for r in (old, new))
    return [*needed, "iat"] if after > before or (after < before and not let_in) else needed


def _same_gates(old: Policy, new: Policy) -> bool:
    def text(policy: Policy) -> list[object]:
        return [(r.match, r.exact, r.source, r.default) for r in policy.gate]

    by_cluster = any(r.source == _BY_CLUSTER for r in old.gate)
    return text(old) == text(new) and not (by_cluster and old.clusters != new.clusters)
