"""The values that pass between the rooms: frozen, slotted, free of I/O.

Everything that a decision reads or reports is one of these. Nothing here imports another room.
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

    __hash__ = str.__hash__  # Enum's own is a Python function, and every request is counted by both enums

    ALLOW = "allow"
    DOWNGRADE = "downgrade"
    DENY = "deny"


class Reason(StrEnum):
    """Why. A reason's value is its code on the wire; `STATUS` has the HTTP status of a denial."""

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
    HEADERS_TOO_LARGE = "headers_too_large"
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
    Reason.HEADERS_TOO_LARGE: 431,
    Reason.INTERNAL: 500,
}


class Request(NamedTuple):
    """One HTTP request as Envoy saw it. `path` has no query; header names are lower case, values latin-1 text.

    `repeated` names the headers that appear more than once: `headers` has only the first value, which no room may
    trust. `lines` and `size` are those of all headers, in header lines and bytes. (A tuple, because every request
    creates one: a frozen dataclass takes four times as long.)
    """

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    repeated: frozenset[str] = frozenset()
    lines: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """A verified caller. `expires` is in seconds since the epoch, leeway included; `tier` indexes `Policy.tiers`.

    `errors` names the clearance rules that could not be evaluated (each counted as no match).
    Compared by identity: the cache of verified tokens has one for each token.
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
    """Why a request is refused. `detail` is for the caller: never a token, never a claim's value.

    `issuer` is set if fresh keys from that issuer could change the answer: the server may fetch them and ask again.
    """

    reason: Reason
    detail: str
    issuer: str | None = None


@dataclass(frozen=True, slots=True)
class Struck:
    """An expert removed from the list: `reason` says why, `rule` is the path of the policy rule that removed it."""

    expert: str
    reason: Reason
    rule: str


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Decision:
    """The outcome for one request. `serve` is empty exactly when `verdict` is DENY.

    `requested` are the known experts asked for, `unknown` the names that no expert has. `required_tier` is the lowest
    tier among the requested experts struck for their tier, None if none was. `standby` are permitted experts that may
    serve only when `serve` cannot: that answer is a downgrade, which only Envoy knows about.
    Nothing in it is specific to one caller, so many may share it. Compared by identity: what is derived from a decision
    is cached by the object.
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


UNVERIFIED = Identity(0)  # the caller of a decision that was made without a verified caller


class Outcome(NamedTuple):
    """A decision and the caller it was made for. `new_token`: the caller's token was not in the cache."""

    decision: Decision
    caller: Identity
    new_token: bool = False


def refuse(refusal: Refusal, caller_tier: str | None = None) -> Decision:
    """The decision that a refusal amounts to."""
    return Decision(Verdict.DENY, refusal.reason, detail=refusal.detail, caller_tier=caller_tier)
