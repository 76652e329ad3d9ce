"""One logged decision made again under two policies: what would differ, or why that cannot be told. Pure.

Nothing is guessed. Where a policy reads what the record does not hold, the record is not replayed. That the caller's
token was good is taken from the log, unless the two policies disagree about it.
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
from ext_authz.review.reads import Cause, Reads, Unknown

MAX_CACHED = 20_000  # records that differ

_T = TypeVar("_T")
_AT_THE_GATE = frozenset({Reason.BAD_GATE, Reason.NO_EXPERTS_REQUESTED})
_BY_CLUSTER = Header(REQUESTED_CLUSTER)
_REVOKED = Refusal(Reason.INVALID_TOKEN, "the token is revoked")
_UNTRUSTED = Refusal(Reason.INVALID_TOKEN, "the token's issuer is not trusted")


@dataclass(frozen=True, slots=True)
class Replayed:
    """Both decisions. `widening`: a denial turned to allow, or an expert offered that the old policy kept from the
    caller."""

    old: Decision
    new: Decision
    difference: Difference
    widening: bool


class Replay:
    """Replays records under `old` and `new`. Records that are alike are decided once."""

    def __init__(self, old: Policy, new: Policy) -> None:
        self._old, self._new = old, new
        self._reads = tuple(Reads(p) for p in (old, new))
        self._alike = _same_gates(old, new)
        # Where a request came from matters only if the two policies could read it differently.
        self._by_request = not self._alike or old.reads_request or new.reads_request
        self._token_claims = _token_claims(old, new)
        self._issuers = {let_in: _changed_issuers(old, new, let_in) for let_in in (False, True)}
        self._revocations = {let_in: _changed_revocations(old.revoked, new.revoked, let_in) for let_in in (False, True)}
        self._concerns: dict[Any, _Concern] = {}
        self._known: dict[Any, Replayed | Unknown] = {}
        self._decided: dict[Any, Replayed] = {}

    def __call__(self, record: Record) -> Replayed | Unknown:
        """What comes of the record under both."""
        of_old = record.policy == self._old.digest
        key = (
            record.requested, record.anonymous, record.downgrade, self._claims_of(record), of_old,
            record.reason in _AT_THE_GATE, (record.method, record.path) if self._by_request else None,
        )  # fmt: skip
        found = self._known.get(key)
        if found is None:
            found = _cached(self._known, key, self._replay(record))
        if of_old and isinstance(found, Replayed) and not _reproduces(found.old, record):
            return Unknown(Cause.OTHERWISE, "the old policy, as it is here, does not decide as it is logged")
        return found

    def _claims_of(self, record: Record) -> object:
        """What the record tells of the claims that matter to it, in a form that can be compared."""
        if record.anonymous or record.claims is None:
            return None
        read = self._concern(record).claims
        if read is None:
            return repr(record.claims), record.absent
        return tuple(repr(record.claims[n]) if n in record.claims else n in record.absent for n in read)

    def _concern(self, record: Record) -> _Concern:
        key = record.requested, record.anonymous
        found = self._concerns.get(key)
        if found is None:
            read = [reads.claims(record) for reads in self._reads]
            every = self._token_claims.union(*(names for names in read if names is not None))
            allowed = any(reads.allow(record) for reads in self._reads)
            made = _Concern(None if None in read else tuple(sorted(every)), allowed)
            found = _cached(self._concerns, key, made)
        return found

    def _replay(self, record: Record) -> Replayed | Unknown:
        if record.requested is None and record.reason not in _AT_THE_GATE:
            return Unknown(Cause.EARLY)
        unknown = self._gate(record) or self._token(record) or self._conditions(record)
        if unknown:
            return unknown
        callers = _caller(self._old, record), _caller(self._new, record)
        if self._concern(record).allow:
            return self._outcome(record, *callers)
        # Without an `allow` rule a decision depends on no more of the caller than this.
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

    def _gate(self, record: Record) -> Unknown | None:
        """Whether the same names would be read of the request."""
        if self._alike:
            return None
        if record.path is None:
            return Unknown(Cause.REQUEST, "path")
        old, new = (rule_for(p, record.path) for p in (self._old, self._new))
        if (old and old.source) != (new and new.source):
            return Unknown(Cause.GATE, "other names may be read")
        if old and old.source == _BY_CLUSTER and self._old.clusters != self._new.clusters:
            return Unknown(Cause.GATE, "clusters changed")
        if old and new and old.default != new.default:
            # The record does not tell whether names were asked for or are the default.
            by_default = record.requested in (None, old.default) or record.policy != self._old.digest
            return Unknown(Cause.GATE, "the default may apply") if by_default else None
        return None

    def _token(self, record: Record) -> Unknown | None:
        """Whether it can be told if each policy accepts the token."""
        if record.anonymous:
            return None
        # Whom the old policy has let in already is of an issuer that it trusts, and not revoked by it.
        let_in = record.policy == self._old.digest
        changed = self._issuers[let_in]
        if changed and not record.knows("iss"):
            return Unknown(Cause.ISSUERS, "needs claims.iss")
        iss = (record.claims or {}).get("iss")
        if iss in changed and iss in self._old.issuers and iss in self._new.issuers:
            return Unknown(Cause.ISSUERS, f"other tokens of {iss} may be good")
        lacking = next((claim for claim in self._revocations[let_in] if not record.knows(claim)), None)
        return Unknown(Cause.REVOKED, f"needs claims.{lacking}") if lacking else None

    def _conditions(self, record: Record) -> Unknown | None:
        """Whether the record holds all that the conditions which concern it read."""
        for reads in self._reads:
            missing = reads.missing(record)
            if missing:
                return missing
        return None


@dataclass(frozen=True, slots=True)
class _Concern:
    """What can matter to the records that ask for the same: the claims (None: any), and whether there are `allow`
    rules."""

    claims: tuple[str, ...] | None
    allow: bool


def _token_claims(old: Policy, new: Policy) -> frozenset[str]:
    """The claims that either policy judges a token by."""
    revoked = (old.revoked, new.revoked)
    read = {
        "iss": True,
        "jti": any(r.jti for r in revoked),
        "sub": any(r.sub for r in revoked),
        "iat": any(r.issued_before is not None for r in revoked),
    }
    return frozenset(name for name, needed in read.items() if needed)


def _cached(cache: dict[Any, _T], key: object, value: _T) -> _T:
    """Cache it, within bounds: a full cache is emptied."""
    if len(cache) >= MAX_CACHED:
        cache.clear()
    cache[key] = value
    return value


def _caller(policy: Policy, record: Record) -> Identity | Refusal:
    """The caller as `policy` sees it; the record is known to hold what that takes."""
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
    """The issuers that the policies treat differently, as far as that can concern the caller."""
    names = old.issuers.keys() if let_in else old.issuers.keys() | new.issuers.keys()
    return frozenset(name for name in names if old.issuers.get(name) != new.issuers.get(name))


def _changed_revocations(old: Revoked, new: Revoked, let_in: bool) -> list[str]:
    """The claims that tell whether a token is revoked by one policy only."""
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
