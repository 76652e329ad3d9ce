"""The sentence: who is calling, what do they name, may they have it. One immutable snapshot a request.

`Snapshot` is everything a decision depends on. A new policy or key set makes a new snapshot with empty caches,
so nothing remembered can outlive what it was derived from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType

from ext_authz import gate, identity
from ext_authz.identity import Keys
from ext_authz.model import Decision, Identity, Refusal, Request, refuse
from ext_authz.policy import TOKEN_HEADERS, Policy, decide
from ext_authz.recent import Recent, Uses

DOWNGRADE = "x-srp-downgrade"
CACHED_TOKENS = 16_384
CACHED_DECISIONS = 16_384
MEMORIES = ("tokens", "decisions", "answers")  # of a Snapshot
MAX_QUESTION = 4096  # characters of a request's path and headers, to be remembered
_PLACE = 1024  # bytes of a token or characters of a question in an ordinary place of a memory
_PLACE_NAMES = 16  # experts that a decision names, asked and chosen, likewise

Question = tuple[str | None, ...]
Tokens = Recent[bytes, Identity]
Decisions = Recent[tuple[Identity, tuple[str, ...], bool], Decision]
Answers = Recent[Question, Decision]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One epoch: a policy, the keys it is read with, and what has been worked out under them (bounded)."""

    policy: Policy
    keys: Keys = field(default_factory=lambda: MappingProxyType({}))
    epoch: int = 0
    tokens: Tokens = field(default_factory=lambda: Recent(CACHED_TOKENS))
    decisions: Decisions = field(default_factory=lambda: Recent(CACHED_DECISIONS))
    answers: Answers = field(default_factory=lambda: Recent(CACHED_DECISIONS))
    anonymous: Identity | Refusal = field(init=False)
    reads: frozenset[str] | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anonymous", identity.anonymous(self.policy))
        object.__setattr__(self, "reads", headers_read(self.policy))


@dataclass(frozen=True, slots=True)
class Memory:
    """What each epoch may remember: so many verified `tokens`, and decisions by either key; and how that was used."""

    tokens: int = CACHED_TOKENS
    decisions: int = CACHED_DECISIONS
    uses: Mapping[str, Uses] = field(default_factory=lambda: {name: Uses() for name in MEMORIES})

    def snapshot(self, policy: Policy, keys: Keys, epoch: int) -> Snapshot:
        """A new epoch's, with nothing in it."""
        tokens = Recent[bytes, Identity](self.tokens, self.uses["tokens"])
        decisions: Decisions = Recent(self.decisions, self.uses["decisions"])
        return Snapshot(policy, keys, epoch, tokens, decisions, Recent(self.decisions, self.uses["answers"]))


def check(snapshot: Snapshot, request: Request, now: float) -> Decision | Refusal:
    """The decision on one request at `now` (seconds since the epoch).

    A Refusal comes back only when fresh keys of `Refusal.issuer` could change it; `refuse` makes it a decision.
    """
    question = question_of(snapshot, request)
    if question is not None:
        known = snapshot.answers.get(question)
        if known is not None and now < known.expires:
            return known
    made = _check(snapshot, request, now)
    if question is not None and isinstance(made, Decision) and lasting(snapshot.policy, made):
        rule = gate.rule_for(snapshot.policy, request.path)
        length = sum(len(t) for t in question if t)
        if (rule is None or rule.pointer is None) and length <= MAX_QUESTION:
            snapshot.answers.keep(question, made, _places(made) + length // _PLACE)
    return made


def question_of(snapshot: Snapshot, request: Request) -> Question | None:
    """The exact text of all that a decision on `request` may read but for its body; None if that cannot be told."""
    if snapshot.reads is None or request.repeated:
        return None
    return (request.path, *map(request.headers.get, snapshot.reads))


def _check(snapshot: Snapshot, request: Request, now: float) -> Decision | Refusal:
    caller = identify(snapshot, request, now)
    if isinstance(caller, Refusal):
        return caller if caller.issuer else refuse(caller)
    names = gate.read(snapshot.policy, request)
    if isinstance(names, Refusal):
        return refuse(names, snapshot.policy.tiers[caller.tier])
    downgrade = may_downgrade(request)
    key = (caller, names, downgrade)
    decision = snapshot.decisions.get(key)
    if decision is None:
        decision = decide(snapshot.policy, caller, names, request, downgrade)
        if lasting(snapshot.policy, decision):
            snapshot.decisions.keep(key, decision, _places(decision))
    return decision


def _places(decision: Decision) -> int:
    """The room that a decision takes with all that is made of it."""
    return 1 + (len(decision.requested) + len(decision.serve)) // _PLACE_NAMES


def headers_read(policy: Policy) -> frozenset[str] | None:
    """The headers that `check` may look at under `policy`; None: any."""
    return None if policy.reads_request else gate.headers(policy).union(TOKEN_HEADERS, (DOWNGRADE,))


def lasting(policy: Policy, decision: Decision) -> bool:
    """Whether the same request has the same decision until `decision.expires`, and is worth remembering."""
    # Names that anybody can invent would fill the memory; a rule may read what no key holds.
    return bool(decision.requested) and not decision.unknown and not policy.reads_request


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
        snapshot.tokens.keep(digest, caller, 1 + len(token) // _PLACE)
    return caller
