"""The values that pass between the rooms: frozen, slotted, free of I/O.

Everything a decision reads or says is one of these. Nothing here imports another room.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import Any, NamedTuple

Claims = Mapping[str, Any]


class Verdict(StrEnum):
    """What the caller gets."""

    __hash__ = str.__hash__  # Enum's own is a Python function, and both are counted by at each request

    ALLOW = "allow"
    DOWNGRADE = "downgrade"
    DENY = "deny"


class Reason(StrEnum):
    """Why. The wire code of each reason is its value; `STATUS` gives its HTTP status when it denies."""

    __hash__ = str.__hash__

    PERMITTED = "permitted"
    TIER_TOO_LOW = "tier_too_low"
    NOT_ALLOWED = "not_allowed"
    DOWNGRADE_FORBIDDEN = "downgrade_forbidden"
    UNKNOWN_EXPERT = "unknown_expert"
    NO_EXPERTS_REQUESTED = "no_experts_requested"
    BAD_GATE = "bad_gate"
    TOKEN_REQUIRED = "token_required"
    INVALID_TOKEN = "invalid_token"
    KEYS_UNAVAILABLE = "keys_unavailable"
    INTERNAL = "internal_error"


STATUS: Mapping[Reason, int] = {
    Reason.TIER_TOO_LOW: 403,
    Reason.NOT_ALLOWED: 403,
    Reason.DOWNGRADE_FORBIDDEN: 403,
    Reason.UNKNOWN_EXPERT: 404,
    Reason.NO_EXPERTS_REQUESTED: 400,
    Reason.BAD_GATE: 400,
    Reason.TOKEN_REQUIRED: 401,
    Reason.INVALID_TOKEN: 401,
    Reason.KEYS_UNAVAILABLE: 503,
    Reason.INTERNAL: 500,
}


class Request(NamedTuple):
    """One HTTP request as Envoy saw it. `path` has no query; header names are lower case, values latin-1 text.

    `repeated` names the headers that came more than once: `headers` holds the first of them only, and no
    room may trust it. (A tuple, for it is made at each request: a frozen dataclass takes four times as long.)
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    repeated: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """A verified caller. `expires` is in seconds since the epoch, leeway included; `tier` indexes `Policy.tiers`.

    `errors` names the clearance rules that could not be evaluated (each counted as no match).
    Compared by identity: the cache of verified tokens holds one for each token.
    """

    tier: int
    subject: str = ""
    issuer: str | None = None
    claims: Claims = field(default_factory=dict)
    expires: float = inf
    errors: tuple[str, ...] = ()

    @property
    def anonymous(self) -> bool:
        return self.issuer is None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a room would not go on. `detail` is for the caller: never a token, never a claim's value.

    `issuer` is set when fresh keys of that issuer could change the answer: the shell may fetch them and ask again.
    """

    reason: Reason
    detail: str
    issuer: str | None = None


@dataclass(frozen=True, slots=True)
class Struck:
    """An expert taken out of the list: `reason` says why, `rule` which line of the policy said so."""

    expert: str
    reason: Reason
    rule: str


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Decision:
    """The outcome for one request. `serve` is empty exactly when `verdict` is DENY.

    `requested` are the known experts asked for, `unknown` the names dropped; `required_tier` is the lowest tier
    among the requested experts struck out for their tier, None when none was. `standby` are permitted experts that may
    serve only when `serve` cannot: that answer is a downgrade, which only Envoy knows of.
    Nothing in it belongs to one caller, so one decision may serve many. Compared by identity: what is derived from a
    decision is cached by the object.
    """

    verdict: Verdict
    reason: Reason
    requested: tuple[str, ...] = ()
    serve: tuple[str, ...] = ()
    struck: tuple[Struck, ...] = ()
    unknown: tuple[str, ...] = ()
    detail: str = ""
    required_tier: str | None = None
    caller_tier: str | None = None
    errors: tuple[str, ...] = ()
    standby: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        """The HTTP status of a denial; 200 for anything served."""
        return 200 if self.serve else STATUS[self.reason]


UNVERIFIED = Identity(0)  # the caller of a decision that was made without verifying one


class Outcome(NamedTuple):
    """A decision and the caller it was made for. `new_token`: the caller's token was not in the cache."""

    decision: Decision
    caller: Identity
    new_token: bool = False


def refuse(refusal: Refusal, caller_tier: str | None = None) -> Decision:
    """The decision that a refusal amounts to."""
    return Decision(Verdict.DENY, refusal.reason, detail=refusal.detail, caller_tier=caller_tier)
