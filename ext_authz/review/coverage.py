"""Which parts of a policy its test cases touched."""

from __future__ import annotations

from dataclasses import dataclass

from ext_authz.core.clearance import claims_read
from ext_authz.core.condition import Truth, context
from ext_authz.core.model import Decision, Identity, Refusal, Request
from ext_authz.core.policy import Policy


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the policy that a case can touch, and what that takes."""

    path: str
    line: int
    takes: str


class Coverage:
    """Counts what cases touch: experts named or offered, clearance rules that gave a tier, `allow` rules that judged,
    `downgrade_to` entries that stood in, gate rules that read a request."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._parts = {part.path: part for part in _parts(policy)}
        self._touched: set[str] = set()

    def add(self, caller: Identity | Refusal, request: Request | None, decision: Decision) -> None:
        """One case: its caller, the request that went through the gate if there was one, and what came of it."""
        if isinstance(caller, Refusal):
            return
        self._clearance(caller)
        if request is not None:
            number = next((n for n, rule in enumerate(self._policy.gate) if rule.covers(request.path)), None)
            self._touched.add(f"gate[{number}]")
        self._experts(caller, decision)

    @property
    def missed(self) -> list[Part]:
        """What no case touched, in the order of the file."""
        return sorted((p for p in self._parts.values() if p.path not in self._touched), key=lambda p: (p.line, p.path))

    @property
    def total(self) -> int:
        return len(self._parts)

    @property
    def percent(self) -> float:
        return 100 * (self.total - len(self.missed)) / self.total

    def _clearance(self, caller: Identity) -> None:
        if caller.anonymous:
            return
        variables = context(claims_read(self._policy, caller.claims))
        for rule in self._policy.clearance:
            if rule.when.holds(variables) is Truth.YES:
                self._touched.add(rule.when.where)
                return

    def _experts(self, caller: Identity, decision: Decision) -> None:
        experts = self._policy.experts
        self._touched.update(f"experts.{name}" for name in (*decision.requested, *decision.serve))
        judged = dict.fromkeys(decision.requested)
        if len(decision.struck) == len(decision.requested):  # nobody asked for may serve: the stand-ins are judged
            for name in decision.requested:
                judged |= dict.fromkeys(experts[name].downgrade_to)
                for place, other in enumerate(experts[name].downgrade_to):
                    if other in decision.serve:
                        self._touched.add(f"experts.{name}.downgrade_to[{place}]")
        self._touched.update(f"experts.{name}.allow" for name in judged if experts[name].tier <= caller.tier)


def _parts(policy: Policy) -> list[Part]:
    parts = [Part(r.when.where, r.when.line, "no case's caller gets its tier by it") for r in policy.clearance]
    for name, expert in policy.experts.items():
        path = f"experts.{name}"
        parts.append(Part(path, expert.line, "no case asks for it or is offered it"))
        if expert.allow is not None:
            parts.append(Part(f"{path}.allow", expert.allow.line, "no case is judged by it"))
        parts += [
            Part(f"{path}.downgrade_to[{place}]", expert.line, f"{other} stands in for it in no case")
            for place, other in enumerate(expert.downgrade_to)
        ]
    given = [(number, rule) for number, rule in enumerate(policy.gate) if rule.line]  # the default one has no line
    return parts + [Part(f"gate[{n}]", rule.line, "no case's request goes through it") for n, rule in given]
