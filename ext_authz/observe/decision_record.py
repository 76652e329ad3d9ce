"""One line of the decision log: written for a decision, read back for a replay. Format: docs/changing-policy.md.

A record contains what a replay needs and no more: no token, header, query or body, and only those claims that the
policy lists in `log_claims`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as _text
from typing import Any
from weakref import WeakKeyDictionary

from cachetools import LRUCache

from ext_authz.core import strict_json
from ext_authz.core.check import identify, may_downgrade
from ext_authz.core.clearance import claims_read
from ext_authz.core.condition import Truth, compile_condition, context
from ext_authz.core.difference import Difference
from ext_authz.core.model import Decision, Identity, Reason, Request, Verdict
from ext_authz.core.policy import Policy
from ext_authz.core.snapshot import Snapshot

MAX_DEPTH = 24  # levels of nesting; more than those of a token's claims within a record
MAX_PATH = 2048  # characters; at least twice as long as any gate rule's path
CACHED_CALLERS = 4096
_MAX_TIME = 1e11

_UNVERIFIED = frozenset(
    {
        Reason.TOKEN_REQUIRED, Reason.INVALID_TOKEN, Reason.KEYS_UNAVAILABLE, Reason.HEADERS_TOO_LARGE, Reason.INTERNAL
    }
)  # fmt: skip
_READABLE = compile_condition("size(claims) >= 0", "decision_record", 0)
_json = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Record:
    """A decision as logged. `time` is in seconds since the epoch.

    `requested` is None if no names were read because the caller or the gate value was rejected first. `claims` are
    those of `log_claims` that the token has, `absent` those that it lacks; other claims are unknown. If `claims` is
    None, all claims are unknown. If `path` is None, it was too long to log.
    """

    time: float
    decision_id: str
    policy: str
    verdict: Verdict
    reason: Reason
    requested: tuple[str, ...] | None
    serve: tuple[str, ...]
    downgrade: bool
    tier: str | None
    anonymous: bool
    claims: Mapping[str, Any] | None
    absent: frozenset[str]
    method: str
    path: str | None

    @classmethod
    def read(cls, line: bytes) -> Record:
        """The record on `line`. ValueError if it is not a record."""
        try:
            data = strict_json.loads(line, MAX_DEPTH)
            requested = data["requested"]
            record = cls(
                time=data["time"],
                decision_id=data["decision_id"],
                policy=data["policy"],
                verdict=Verdict(data["verdict"]),
                reason=Reason(data["reason"]),
                requested=None if requested is None else _names(requested),
                serve=_names(data["serve"]),
                downgrade=data["downgrade"],
                tier=data["tier"],
                anonymous=data["anonymous"],
                claims=data["claims"],
                absent=frozenset(_names(data["absent"])),
                method=data["method"],
                path=data["path"],
            )
        except (KeyError, TypeError, ValueError):
            raise ValueError("not a decision record") from None
        if not record._valid():
            raise ValueError("not a decision record")
        return record

    def knows(self, claim: str) -> bool:
        """Whether the record shows if the caller has `claim`, and its value. An anonymous caller has no claims."""
        return self.anonymous or (self.claims is not None and (claim in self.claims or claim in self.absent))

    def _valid(self) -> bool:
        return (
            type(self.time) in (int, float)
            and 0 <= self.time < _MAX_TIME
            and type(self.decision_id) is type(self.policy) is type(self.method) is str
            and type(self.downgrade) is type(self.anonymous) is bool
            and (self.tier is None or type(self.tier) is str)
            and (self.path is None or type(self.path) is str)
            and (self.claims is None or (type(self.claims) is dict and type(self.claims.get("iss", "")) is str))
        )


def _names(value: Any) -> tuple[str, ...]:
    if type(value) is not list or not all(type(name) is str for name in value):
        raise TypeError
    return tuple(value)


class RecordWriter:
    """Turns decisions into lines. Caches the parts that depend only on the decision or only on the caller."""

    __slots__ = ("_callers", "_decisions")

    def __init__(self) -> None:
        self._callers: LRUCache[Identity, str] = LRUCache(CACHED_CALLERS)
        self._decisions: WeakKeyDictionary[Decision, str] = WeakKeyDictionary()

    def line(
        self,
        snapshot: Snapshot,
        request: Request,
        decision: Decision,
        decision_id: str,
        now: float,
        shadow: Difference | None = None,
    ) -> bytes:
        """The record of one decision made at `now`, with its line break."""
        decided = self._decisions.get(decision)
        if decided is None:
            decided = self._decisions[decision] = _decided(decision)
        caller = self._caller(snapshot, request, decision, now)
        path = _text(request.path) if len(request.path) <= MAX_PATH else "null"
        compared = f',"shadow":"{shadow.value}"' if shadow is not None else ""
        downgrade = "true" if may_downgrade(request) else "false"
        text = (
            f'{{"time":{now:.6f},"decision_id":"{decision_id}","policy":{_text(snapshot.policy.digest)},{decided},{caller},'
            f'"downgrade":{downgrade},"method":{_text(request.method)},"path":{path}{compared}}}\n'
        )
        return text.encode()

    def _caller(self, snapshot: Snapshot, request: Request, decision: Decision, now: float) -> str:
        # A rejected token is never verified a second time: that would double the cost of an attacker's tokens.
        caller = None if decision.reason in _UNVERIFIED else identify(snapshot, request, now)
        if not isinstance(caller, Identity):
            anonymous = "true" if decision.reason is Reason.TOKEN_REQUIRED else "false"
            return f'"anonymous":{anonymous},"claims":null,"absent":[]'
        text = self._callers.get(caller)  # safe across policies: each snapshot has its own Identity objects
        if text is None:
            text = self._callers[caller] = _described(caller, snapshot.policy)
        return text


def _decided(decision: Decision) -> str:
    named = decision.requested + decision.unknown
    return ",".join(
        (
            f'"verdict":"{decision.verdict.value}"',
            f'"reason":"{decision.reason.value}"',
            f'"requested":{_json(named) if named else "null"}',
            f'"serve":{_json(decision.serve)}',
            f'"tier":{_json(decision.caller_tier)}',
        )
    )


def _described(caller: Identity, policy: Policy) -> str:
    if caller.anonymous:
        return '"anonymous":true,"claims":{},"absent":[]'
    if _READABLE.holds(context(claims_read(policy, caller.claims))) is Truth.ERROR:
        # No condition could read these claims. A replay with only some of them would not reproduce that.
        return '"anonymous":false,"claims":null,"absent":[]'
    claims = {name: caller.claims[name] for name in policy.log_claims if name in caller.claims}
    absent = [name for name in policy.log_claims if name not in caller.claims]
    return f'"anonymous":false,"claims":{_json(claims)},"absent":{_json(absent)}'
