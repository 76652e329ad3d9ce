"""The sentence: who is calling, what do they name, may they have it. One immutable snapshot a request.

`Snapshot` is everything a decision depends on. A new policy or key set makes a new snapshot with empty caches,
so nothing remembered can outlive what it was derived from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType
from typing import Protocol

from ext_authz.core import gate, identity
from ext_authz.core.cache import Recent, Uses
from ext_authz.core.identity import Keys
from ext_authz.core.model import NOBODY, Decision, Identity, Outcome, Refusal, Request, refuse
from ext_authz.core.policy import TOKEN_HEADERS, GateRule, Policy, decide

DOWNGRADE = "x-srp-downgrade"
CACHED_TOKENS = 32_768
CACHED_DECISIONS = 32_768
MEMORIES = ("tokens", "decisions", "headings")  # of a Snapshot
MAX_PATH = 1024  # characters; requests for longer paths are not remembered
_PLACE = 1024  # bytes of a token in an ordinary place of a memory
_PLACE_PATH = 128  # characters of a path, likewise
_PLACE_NAMES = 16  # experts that a decision names, asked and chosen, likewise
_UNREAD = Request("", "", {})

Heading = tuple[str, bytes]  # path without query, digest of the headers' exact text


class Headed(Protocol):
    """A request whose headers have not been looked at."""

    heading: Heading

    @property
    def body(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """What the headers of a request say, when its body names the experts."""

    caller: Identity
    rule: GateRule
    downgrade: bool


Tokens = Recent[bytes, Identity]
Decisions = Recent[tuple[Identity | tuple[int, tuple[str, ...]], tuple[str, ...], bool], Decision]
Headings = Recent[Heading, Outcome | Asked]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One epoch: a policy, the keys it is read with, and what has been worked out under them (bounded).

    `reads` are the headers that a decision may read (None: any); `personal`: whether it may read the caller's claims.
    """

    policy: Policy
    keys: Keys = field(default_factory=lambda: MappingProxyType({}))
    epoch: int = 0
    tokens: Tokens = field(default_factory=lambda: Recent(CACHED_TOKENS))
    decisions: Decisions = field(default_factory=lambda: Recent(CACHED_DECISIONS))
    headings: Headings = field(default_factory=lambda: Recent(CACHED_DECISIONS))
    anonymous: Identity | Refusal = field(init=False)
    reads: frozenset[str] | None = field(init=False)
    personal: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anonymous", identity.anonymous(self.policy))
        object.__setattr__(self, "reads", headers_read(self.policy))
        object.__setattr__(self, "personal", any(e.allow is not None for e in self.policy.experts.values()))


@dataclass(frozen=True, slots=True)
class Memory:
    """What each epoch may remember: so many verified `tokens`, and `decisions` by either key; and how that was used."""

    tokens: int = CACHED_TOKENS
    decisions: int = CACHED_DECISIONS
    uses: Mapping[str, Uses] = field(default_factory=lambda: {name: Uses() for name in MEMORIES})

    def snapshot(self, policy: Policy, keys: Keys, epoch: int) -> Snapshot:
        """A new epoch's, with nothing in it."""
        tokens = Recent[bytes, Identity](self.tokens, self.uses["tokens"])
        decisions: Decisions = Recent(self.decisions, self.uses["decisions"])
        return Snapshot(policy, keys, epoch, tokens, decisions, Recent(self.decisions, self.uses["headings"]))


def check(snapshot: Snapshot, request: Request, now: float) -> Outcome | Refusal:
    """The decision on one request at `now` (seconds since the epoch), and whose it is.

    A Refusal comes back only when fresh keys of `Refusal.issuer` could change it; `refused` makes it an outcome.
    """
    caller, new = _identify(snapshot, request, now)
    if isinstance(caller, Refusal):
        return caller if caller.issuer else refused(caller)
    names = gate.read(snapshot.policy, request)
    if isinstance(names, Refusal):
        return Outcome(refuse(names, snapshot.policy.tiers[caller.tier]), caller)
    downgrade = may_downgrade(request)
    if snapshot.policy.reads_request:
        return Outcome(decide(snapshot.policy, caller, names, request, downgrade), caller)
    return Outcome(_decision(snapshot, caller, names, downgrade), caller, new)


def refused(refusal: Refusal) -> Outcome:
    """What a refusal of the caller comes to."""
    return Outcome(refuse(refusal), NOBODY)


def recall(snapshot: Snapshot, request: Headed, now: float) -> Outcome | None:
    """What `check` would find, for a request whose headers `remember` has seen; None: ask `check`."""
    known = snapshot.headings.get(request.heading)
    if known is None or now >= known.caller.expires:
        return None
    if isinstance(known, Outcome):
        return known
    names = gate.in_body(known.rule, request.body)
    if isinstance(names, Refusal):
        return Outcome(refuse(names, snapshot.policy.tiers[known.caller.tier]), known.caller)
    return Outcome(_decision(snapshot, known.caller, names, known.downgrade), known.caller)


def remember(snapshot: Snapshot, heading: Heading, request: Request, outcome: Outcome) -> None:
    """Remember the `outcome` of `check` on `request`, whose path and headers `heading` stands for.

    If the names were in the body, what the headers say is remembered, and the body read anew each time. A token's
    first request is not remembered: those that come once would push out those that come again.
    """
    decision, caller, new = outcome
    if new or not _lasting(decision) or request.repeated:
        return
    if snapshot.policy.reads_request or len(request.path) > MAX_PATH:
        return
    rule = gate.rule_for(snapshot.policy, request.path)
    if rule is None or rule.pointer is None:
        snapshot.headings.keep(heading, outcome, _places(decision) + len(request.path) // _PLACE_PATH)
    else:
        asked = Asked(caller, rule, may_downgrade(request))
        snapshot.headings.keep(heading, asked, 1 + len(request.path) // _PLACE_PATH)


def _decision(snapshot: Snapshot, caller: Identity, names: tuple[str, ...], downgrade: bool) -> Decision:
    """A decision that reads nothing of the request, made once for all callers that it is the same for."""
    who = caller if snapshot.personal else (caller.tier, caller.errors)
    key = (who, names, downgrade)
    decision = snapshot.decisions.get(key)
    if decision is None:
        decision = decide(snapshot.policy, caller, names, _UNREAD, downgrade)
        if _lasting(decision):
            snapshot.decisions.keep(key, decision, _places(decision))
    return decision


def _lasting(decision: Decision) -> bool:
    """Whether it is worth remembering: names that anybody can invent would fill the memory."""
    return bool(decision.requested) and not decision.unknown


def _places(decision: Decision) -> int:
    """The room that a decision takes with all that is made of it."""
    return 1 + (len(decision.requested) + len(decision.serve)) // _PLACE_NAMES


def headers_read(policy: Policy) -> frozenset[str] | None:
    """The headers that `check` may look at under `policy`; None: any."""
    return None if policy.reads_request else gate.headers(policy).union(TOKEN_HEADERS, (DOWNGRADE,))


def may_downgrade(request: Request) -> bool:
    """Whether the client takes a lesser expert: it does, unless it says anything but `allow`."""
    return request.headers.get(DOWNGRADE, "allow") == "allow" and DOWNGRADE not in request.repeated


def identify(snapshot: Snapshot, request: Request, now: float) -> Identity | Refusal:
    """The caller, verified now or remembered until its token ends. A failure is never remembered."""
    return _identify(snapshot, request, now)[0]


def _identify(snapshot: Snapshot, request: Request, now: float) -> tuple[Identity | Refusal, bool]:
    """The caller, and whether its token was not known before."""
    token = identity.token_of(request)
    if token is None:
        return snapshot.anonymous, False
    if isinstance(token, Refusal):
        return token, False
    digest = blake2b(token.encode("utf-8", "surrogatepass"), digest_size=32).digest()
    known = snapshot.tokens.get(digest)
    if known is not None and now < known.expires:
        return known, False
    caller = identity.verify(snapshot.policy, snapshot.keys, token, now)
    if isinstance(caller, Identity):
        snapshot.tokens.keep(digest, caller, 1 + len(token) // _PLACE)
    return caller, True
