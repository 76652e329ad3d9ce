"""What the conditions of a policy read, and whether a decision record contains it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ext_authz.core.condition import Condition
from ext_authz.core.condition_reads import Members, members
from ext_authz.core.policy import Policy
from ext_authz.observe.decision_record import Record


class Cause(StrEnum):
    """Why a record cannot be replayed."""

    EARLY = "refused before the gate"
    CLAIMS = "claims not logged"
    REQUEST = "request not logged"
    GATE = "gate changed"
    ISSUERS = "issuers changed"
    REVOKED = "revocation changed"
    OTHERWISE = "decided otherwise"


@dataclass(frozen=True, slots=True)
class NotReplayable:
    """The record cannot be replayed. `detail` names what is missing."""

    cause: Cause
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Read:
    """What one condition reads. `where` is its path in the policy."""

    where: str
    claims: Members
    request: Members

    @classmethod
    def of(cls, condition: Condition) -> Read:
        return cls(condition.where, members(condition, "claims"), members(condition, "request"))

    def missing(self, record: Record) -> NotReplayable | None:
        """What the record lacks. An anonymous caller has no claims, so no claim is missing."""
        if self.claims is None and not record.anonymous:
            return NotReplayable(Cause.CLAIMS, f"{self.where} may read any claim")
        if lacking := sorted(c for c in self.claims or () if not record.knows(c)):
            return NotReplayable(Cause.CLAIMS, f"{self.where} reads claims.{lacking[0]}")
        known = {"method", "path"} if record.path is not None else {"method"}
        if self.request is None or not self.request <= known:
            return NotReplayable(Cause.REQUEST, f"{self.where} reads more than method and path")
        return None


class Reads:
    """What the conditions of one policy read of callers and requests, computed once."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._clearance = [Read.of(rule.when) for rule in policy.clearance]
        self._allow = {e.name: Read.of(e.allow) for e in policy.experts.values() if e.allow is not None}

    def claims(self, record: Record) -> Members:
        """The claims that can affect the record's decision; None if any claim can."""
        every = [read.claims for read in self._relevant(record)]
        return None if None in every else frozenset(name for names in every for name in names or ())

    def missing(self, record: Record) -> NotReplayable | None:
        """What the record lacks for a replay under this policy; None if nothing."""
        return next((missing for read in self._relevant(record) if (missing := read.missing(record))), None)

    def _relevant(self, record: Record) -> list[Read]:
        return self.allow(record) if record.anonymous else [*self._clearance, *self.allow(record)]

    def allow(self, record: Record) -> list[Read]:
        """The `allow` rules that can apply to the record: those of the experts asked for and of their stand-ins."""
        asked = [self._policy.experts[n] for n in record.requested or () if n in self._policy.experts]
        return [self._allow[n] for e in asked for n in (e.name, *e.downgrade_to) if n in self._allow]
