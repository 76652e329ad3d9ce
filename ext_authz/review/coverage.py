"""Which parts of a policy its test cases cover."""

from __future__ import annotations

from dataclasses import dataclass

from ext_authz.core.clearance import deciding
from ext_authz.core.model import Decision, Identity, Refusal, Request
from ext_authz.core.policy import Policy


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the policy that a case can cover. `gap` says what is missing while no case covers it."""

    path: str
    line: int
    gap: str


class Coverage:
    """Collects what the cases cover: experts asked for or offered, clearance rules that gave a tier, `allow` rules that
    were evaluated, `downgrade_to` entries that were used, gate rules that read a request."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._parts = {part.path: part for part in _parts(policy)}
        self._covered: set[str] = set()

    def add(self, caller: Identity | Refusal, request: Request | None, decision: Decision) -> None:
        """Add one case: its caller, its request if one went through the gate, and its decision."""
        if isinstance(caller, Refusal):
            return
        self._clearance(caller)
        if request is not None:
            number = next((n for n, rule in enumerate(self._policy.gate) if rule.covers(request.path)), None)
            self._covered.add(f"gate[{number}]")
        self._experts(caller, decision)

    @property
    def missed(self) -> list[Part]:
        """The parts that no case covers, in the order of the file."""
        return sorted((p for p in self._parts.values() if p.path not in self._covered), key=lambda p: (p.line, p.path))

    @property
    def total(self) -> int:
        return len(self._parts)

    @property
    def percent(self) -> float:
        return 100 * (self.total - len(self.missed)) / self.total

    def _clearance(self, caller: Identity) -> None:
        if caller.anonymous:
            return
        _, rule, _ = deciding(self._policy, caller.claims)
        if rule is not None:
            self._covered.add(rule.when.where)

    def _experts(self, caller: Identity, decision: Decision) -> None:
        experts = self._policy.experts
        self._covered.update(f"experts.{name}" for name in (*decision.requested, *decision.serve))
        evaluated = dict.fromkeys(decision.requested)
        if len(decision.struck) == len(decision.requested):  # no requested expert may serve: the stand-ins are tried
            for name in decision.requested:
                evaluated |= dict.fromkeys(experts[name].downgrade_to)
                for index, other in enumerate(experts[name].downgrade_to):
                    if other in decision.serve:
                        self._covered.add(f"experts.{name}.downgrade_to[{index}]")
        self._covered.update(f"experts.{name}.allow" for name in evaluated if experts[name].tier <= caller.tier)


def _parts(policy: Policy) -> list[Part]:
    parts = [Part(r.when.where, r.when.line, "no case's caller gets its tier from it") for r in policy.clearance]
    for name, expert in policy.experts.items():
        path = f"experts.{name}"
        parts.append(Part(path, expert.line, "no case asks for it or is offered it"))
        if expert.allow is not None:
            parts.append(Part(f"{path}.allow", expert.allow.line, "no case evaluates it"))
        parts += [
            Part(f"{path}.downgrade_to[{index}]", expert.line, f"no case downgrades to {other}")
            for index, other in enumerate(expert.downgrade_to)
        ]
    written = [(number, rule) for number, rule in enumerate(policy.gate) if rule.line]  # the default rule has no line
    return parts + [Part(f"gate[{n}]", rule.line, "no case's request goes through it") for n, rule in written]
