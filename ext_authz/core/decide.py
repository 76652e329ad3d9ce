"""The decision. Pure: a function of policy, caller, requested experts and request.

The caller may reach every expert in `Decision.serve` and `standby`. Only this file puts experts there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import cel

from ext_authz.core.clearance import claims_read
from ext_authz.core.condition import Truth, context
from ext_authz.core.headers import TOKEN_HEADERS
from ext_authz.core.model import Decision, Identity, Reason, Request, Struck, Verdict
from ext_authz.core.policy import Expert, Policy

# One decision judges so many experts by `allow`; those with a macro count for more. A caller that names experts with
# long lists of stand-ins would otherwise cost everybody else milliseconds. Beyond it a condition is an error: no match.
MAX_WORK = 1024
_MACRO_WORK = 16
_PLAIN = re.compile("%(2[146789abc]|3[abd]|40)", re.IGNORECASE)  # sub-delims, `:` and `@` of RFC 3986 §3.3


def decide(
    policy: Policy, caller: Identity, named: Iterable[str], request: Request, downgrade: bool = True
) -> Decision:
    """Decide which of the `named` experts may serve `caller`; `downgrade` False forbids serving fewer or other experts.

    Never raises, whatever the caller and the names. Source: the decision table in docs/policy.md.
    """
    tier = policy.tiers[caller.tier]
    asked = tuple(dict.fromkeys(named))
    requested = tuple(n for n in asked if n in policy.experts)
    unknown = tuple(n for n in asked if n not in policy.experts)
    if not requested:
        reason = Reason.UNKNOWN_EXPERT if unknown else Reason.NO_EXPERTS_REQUESTED
        detail = f"no such expert: {', '.join(unknown)}" if unknown else "the request names no expert"
        return Decision(Verdict.DENY, reason, unknown=unknown, detail=detail, caller_tier=tier, errors=caller.errors)

    access = _Access(policy, caller, request)
    serve = access.permitted(requested)
    if not serve:
        serve = access.permitted(dict.fromkeys(d for n in requested for d in policy.experts[n].downgrade_to))
    standby: tuple[str, ...] = ()
    if downgrade and len(requested) == 1 and serve == requested:
        (only,) = (policy.experts[n] for n in requested)
        standby = access.permitted(only.downgrade_to) if only.unavailable == "downgrade" else ()
    struck = tuple(s for n in requested if (s := access.struck(n)))
    needed = [policy.experts[s.expert].tier for s in struck if s.reason is Reason.TIER_TOO_LOW]
    common: dict[str, Any] = {
        "requested": requested, "struck": struck, "unknown": unknown, "caller_tier": tier,
        "required_tier": policy.tiers[min(needed)] if needed else None, "errors": (*caller.errors, *access.errors),
    }  # fmt: skip
    if serve == requested:
        return Decision(Verdict.ALLOW, Reason.PERMITTED, serve=serve, standby=standby, **common)
    if serve and downgrade:
        return Decision(Verdict.DOWNGRADE, struck[0].reason, serve=serve, **common)
    if serve:
        detail = f"only {', '.join(serve)} may serve this caller, and the request forbids a downgrade"
        return Decision(Verdict.DENY, Reason.DOWNGRADE_FORBIDDEN, detail=detail, **common)
    return Decision(Verdict.DENY, struck[0].reason, detail=_explain(policy, struck[0], tier), **common)


class _Access:
    """One caller's access to the experts. Each expert is judged at most once."""

    __slots__ = ("_caller", "_policy", "_request", "_variables", "_verdicts", "_work", "errors")

    def __init__(self, policy: Policy, caller: Identity, request: Request) -> None:
        self._policy, self._caller, self._request = policy, caller, request
        self._variables: cel.Context | None = None
        self._verdicts: dict[str, Struck | None] = {}
        self._work = 0
        self.errors: list[str] = []

    def permitted(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(n for n in names if self.struck(n) is None)

    def struck(self, name: str) -> Struck | None:
        """Why the caller may not reach `name`, or None if it may."""
        if name not in self._verdicts:
            self._verdicts[name] = self._judge(self._policy.experts[name])
        return self._verdicts[name]

    def _judge(self, expert: Expert) -> Struck | None:
        if expert.tier > self._caller.tier:
            return Struck(expert.name, Reason.TIER_TOO_LOW, f"experts.{expert.name}.tier")
        if expert.allow is None:
            return None
        if self._variables is None:
            request = readable(self._request) if self._policy.reads_request else None
            self._variables = context(claims_read(self._policy, self._caller.claims), request)
        self._work += 1 if expert.allow.max_entries is None else _MACRO_WORK
        truth = expert.allow.holds(self._variables) if self._work <= MAX_WORK else Truth.ERROR
        if truth is Truth.ERROR:
            self.errors.append(expert.allow.where)
        return None if truth is Truth.YES else Struck(expert.name, Reason.NOT_ALLOWED, expert.allow.where)


def readable(request: Request) -> dict[str, Any]:
    """What a condition may read of a request: method, path without query, headers except tokens and repeated ones.

    What needs no escape in a path is unescaped, as the expert will do: a condition must not miss `/a%3Ab` for `/a:b`.
    Envoy has unescaped letters and digits already, and rejects escaped slashes.
    """
    hidden = request.repeated.union(TOKEN_HEADERS)
    headers = {k: v for k, v in request.headers.items() if k not in hidden and not k.startswith(":")}
    path = _PLAIN.sub(lambda escape: chr(int(escape[1], 16)), request.path) if "%" in request.path else request.path
    return {"method": request.method, "path": path, "headers": headers}


def _explain(policy: Policy, struck: Struck, tier: str) -> str:
    if struck.reason is Reason.TIER_TOO_LOW:
        needed = policy.tiers[policy.experts[struck.expert].tier]
        return f"expert {struck.expert} needs tier {needed}, the caller has {tier}"
    return f"expert {struck.expert} does not accept this caller"
