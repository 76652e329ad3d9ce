"""The whole check: who is calling, which experts they ask for, and whether they may reach them.

Each request uses one immutable snapshot. `lookup` answers from the cache, `check` decides, and `store` caches the
result. `core.snapshot` says what each cache holds, for how long, and why that is safe.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Protocol, assert_never

from ext_authz.core import gate, identity
from ext_authz.core.decide import decide
from ext_authz.core.headers import DOWNGRADE, MAX_LINES, MAX_SIZE
from ext_authz.core.model import UNVERIFIED, Decision, Identity, Outcome, Reason, Refusal, Request, refuse
from ext_authz.core.policy import Body, DefaultOnly, Header
from ext_authz.core.snapshot import Asked, Fingerprint, Snapshot

MAX_PATH = 1024  # characters; requests for longer paths are not cached

# The size of an ordinary cache entry, which has a weight of 1. Larger entries weigh more.
_TOKEN = 1024  # bytes of a token
_PATH = 128  # characters of a path
_NAMES = 16  # experts that a decision names, requested and chosen

_UNREAD = Request("", "", {})
_HEADERS_TOO_LARGE = Refusal(
    Reason.HEADERS_TOO_LARGE, f"the request has over {MAX_LINES} headers, or over {MAX_SIZE // 1024} KiB of them"
)


class Fingerprinted(Protocol):
    """A request whose headers have not been parsed."""

    fingerprint: Fingerprint

    @property
    def body(self) -> bytes: ...


def check(snapshot: Snapshot, request: Request, now: float) -> Outcome | Refusal:
    """The decision on one request at `now` (seconds since the epoch), and its caller.

    Returns a Refusal only if fresh keys from `Refusal.issuer` could change the answer; `refused` makes it an outcome.
    """
    if request.lines > MAX_LINES or request.size > MAX_SIZE:
        return refused(_HEADERS_TOO_LARGE)
    caller, new_token = _identify(snapshot, request, now)
    if isinstance(caller, Refusal):
        return caller if caller.issuer else refused(caller)
    names = gate.read(snapshot.policy, request)
    if isinstance(names, Refusal):
        return _unreadable(snapshot, caller, names)
    downgrade = may_downgrade(request)
    if snapshot.policy.reads_request:
        return Outcome(decide(snapshot.policy, caller, names, request, downgrade), caller)
    return Outcome(_decision(snapshot, caller, names, downgrade), caller, new_token)


def refused(refusal: Refusal) -> Outcome:
    """The outcome of a request whose caller was refused."""
    return Outcome(refuse(refusal), UNVERIFIED)


def lookup(snapshot: Snapshot, request: Fingerprinted, now: float) -> Outcome | None:
    """What `check` would return, if the cache has enough to answer; None otherwise."""
    cached = snapshot.requests.get(request.fingerprint)
    if cached is None or now >= cached.caller.expires:
        return None
    if isinstance(cached, Outcome):
        return cached
    names = gate.in_body(cached.source, cached.default, request.body)
    if isinstance(names, Refusal):
        return _unreadable(snapshot, cached.caller, names)
    return Outcome(_decision(snapshot, cached.caller, names, cached.downgrade), cached.caller)


def store(snapshot: Snapshot, fingerprint: Fingerprint, request: Request, outcome: Outcome) -> None:
    """Cache the `outcome` of `check` for `request`, which has this fingerprint.

    If the body names the experts, only what the headers say is cached, and each body is read. The first request with
    a token is not cached: tokens that are used once would evict tokens that are used again.
    """
    decision, caller, new_token = outcome
    if new_token or not _cacheable(decision) or request.repeated:
        return
    if snapshot.policy.reads_request or len(request.path) > MAX_PATH:
        return
    rule = gate.rule_for(snapshot.policy, request.path)
    if rule is None:
        return
    weight = len(request.path) // _PATH
    match rule.source:
        case Body() as source:
            asked = Asked(caller, source, rule.default, may_downgrade(request))
            snapshot.requests.put(fingerprint, asked, 1 + weight)
        case Header() | DefaultOnly():
            snapshot.requests.put(fingerprint, outcome, _weight(decision) + weight)
        case unknown:
            assert_never(unknown)


def may_downgrade(request: Request) -> bool:
    """Whether the client accepts a downgrade: it does, unless its header has any value other than `allow`."""
    return request.headers.get(DOWNGRADE, "allow") == "allow" and DOWNGRADE not in request.repeated


def identify(snapshot: Snapshot, request: Request, now: float) -> Identity | Refusal:
    """The caller, verified now or cached until its token expires. A failure is never cached."""
    return _identify(snapshot, request, now)[0]


def _identify(snapshot: Snapshot, request: Request, now: float) -> tuple[Identity | Refusal, bool]:
    """The caller, and whether its token is new, that is, was not in the cache."""
    token = identity.token_of(request)
    if token is None:
        return snapshot.anonymous, False
    if isinstance(token, Refusal):
        return token, False
    digest = blake2b(token.encode("utf-8", "surrogatepass"), digest_size=32).digest()
    cached = snapshot.tokens.get(digest)
    if cached is not None and now < cached.expires:
        return cached, False
    caller = identity.verify(snapshot.policy, snapshot.keys, token, now)
    if isinstance(caller, Identity):
        snapshot.tokens.put(digest, caller, 1 + len(token) // _TOKEN)
    return caller, True


def _decision(snapshot: Snapshot, caller: Identity, names: tuple[str, ...], downgrade: bool) -> Decision:
    """A decision that does not depend on the request. Callers for whom it is the same share it."""
    who = caller if snapshot.personal else (caller.tier, caller.errors)
    key = (who, names, downgrade)
    decision = snapshot.decisions.get(key)
    if decision is None:
        decision = decide(snapshot.policy, caller, names, _UNREAD, downgrade)
        if _cacheable(decision):
            snapshot.decisions.put(key, decision, _weight(decision))
    return decision


def _unreadable(snapshot: Snapshot, caller: Identity, names: Refusal) -> Outcome:
    """The outcome of a request whose expert names could not be read."""
    return Outcome(refuse(names, snapshot.policy.tiers[caller.tier]), caller)


def _cacheable(decision: Decision) -> bool:
    """Whether to cache a decision: unknown names, which a caller can invent, would fill the cache."""
    return bool(decision.requested) and not decision.unknown


def _weight(decision: Decision) -> int:
    """The cache weight of a decision and of everything derived from it."""
    return 1 + (len(decision.requested) + len(decision.serve)) // _NAMES
