"""Random edits of a policy, each of one kind: what operators do, and what has gone wrong before."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from tests.harness.backends import HANGING, REFUSING
from tests.harness.rules import HOUR, Caller, Expert, Rules

NAMES = ("A", "B", "C", "D")
CLUSTERS = ("expert-a", "expert-b", "expert-c", "expert-d", "expert-e")

# The backends that experts choose from. Only experts of tier high have those of `high`, and only experts for `acme`
# those of `acme`, so a caller without these rights never belongs there. Those of `mixed` change hands.
POOLS = {
    "low": ("low-1", "low-2", "low-3"),
    "mixed": ("mixed-1", "mixed-2", "mixed-3"),
    "high": ("high-1", "high-2", "high-3"),
    "acme": ("acme-1", "acme-2"),
}
DEAD = (REFUSING, HANGING)
BACKENDS = (*DEAD, *(backend for pool in POOLS.values() for backend in pool))

_TRAFFIC: dict[str, dict[str, Any]] = {
    "A": {"retry_on": "5xx"},
    "B": {},
    "C": {"retry_on": "5xx", "lesser": ("A", "B")},
    "D": {"lesser": ("B", "C"), "unavailable": "downgrade"},
}

Question = tuple[Caller, tuple[str, ...], str]  # caller, experts requested, gate


def _expert(name: str, tier: str, endpoints: Sequence[str], cluster: str, acme: bool) -> Expert:
    return Expert(tier, tuple(endpoints), cluster, acme, connect_timeout="150ms", **_TRAFFIC[name])


START = Rules(
    {
        "A": _expert("A", "low", ["low-1"], "expert-a", False),
        "B": _expert("B", "low", ["mixed-1"], "expert-b", False),
        "C": _expert("C", "high", ["high-1"], "expert-c", False),
        "D": _expert("D", "high", ["acme-1"], "expert-d", True),
    }
)


class Edits:
    """`rules` after the last edit. `focus` is the expert that was edited last.

    Half the edits are about what the `regulars` ask for: questions that are asked again and again.
    """

    def __init__(self, source: random.Random, regulars: Sequence[Question]) -> None:
        self._random = source
        self._regulars = regulars
        self.rules = START
        self.focus = NAMES[0]
        self._edits = [
            *[self._move] * 3, *[self._retier] * 2, *[self._swap] * 2, *[self._revoke] * 2, *[self._relent] * 4,
            self._allow, self._remove, self._clearance, self._anonymous, self._trust,
        ]  # fmt: skip

    def edit(self) -> str:
        """Change `rules` in one way. Returns how."""
        before, what = self.rules, ""
        while self.rules == before:
            what = self._random.choice(self._edits)()
        return what

    # ---- experts ----

    def _move(self) -> str:
        """To other endpoints, mostly of another pool: tier and `allow` change with them."""
        name = self._pick(self.rules.experts)
        return self._put(name, self.rules.experts[name].cluster)

    def _retier(self) -> str:
        """To another tier, at the same endpoints."""
        name = self._pick(n for n, e in self.rules.experts.items() if {*e.endpoints} <= {*POOLS["mixed"], *DEAD})
        if name is None:
            return ""
        return self._change(name, tier="low" if self.rules.experts[name].tier == "high" else "high")

    def _allow(self) -> str:
        """For everybody, or for `acme` only."""
        name = self._pick(n for n, e in self.rules.experts.items() if not {*e.endpoints} & {*POOLS["acme"]})
        return "" if name is None else self._change(name, acme=not self.rules.experts[name].acme)

    def _swap(self) -> str:
        """Two experts swap the names of their clusters."""
        if len(self.rules.experts) < 2:
            return ""
        one = self._pick(self.rules.experts)
        other = self._random.choice([n for n in self.rules.experts if n != one])
        first, second = self.rules.experts[one].cluster, self.rules.experts[other].cluster
        return f"{self._change(one, cluster=second)}; {self._change(other, cluster=first)}"

    def _remove(self) -> str:
        """If an expert is missing, it comes back as something else, with any cluster's name that is free."""
        name = self._pick(n for n in NAMES if n not in self.rules.experts)
        if name is not None:
            free = {*CLUSTERS} - {e.cluster for e in self.rules.experts.values()}
            return f"again {self._put(name, self._random.choice(sorted(free)))}"
        name = self._pick(NAMES)
        self.rules = replace(self.rules, experts={n: e for n, e in self.rules.experts.items() if n != name})
        return f"{name} is gone"

    def _pick(self, names: Iterable[str]) -> Any:
        """One of these experts, None if there are none. From now on it is the focus."""
        found = sorted(names)
        if not found:
            return None
        asked = [n for _, some, _ in self._regulars for n in some if n in found]
        self.focus = self._random.choice(asked if asked and self._random.random() < 0.5 else found)
        return self.focus

    def _put(self, name: str, cluster: str) -> str:
        """Write an expert, with endpoints of one pool that no other expert has."""
        pool = self._random.choice([*POOLS])
        taken = {b for n, e in self.rules.experts.items() for b in e.endpoints if n != name}
        free = [b for b in POOLS[pool] if b not in taken]
        endpoints = self._random.sample(free, min(len(free), self._random.randint(1, 2)))
        endpoints += [b for b in DEAD if self._random.random() < 0.15]
        tier = {"low": "low", "mixed": self._random.choice(("low", "high"))}.get(pool, "high")
        expert = _expert(name, tier, endpoints or [REFUSING], cluster, pool == "acme")
        self.rules = replace(self.rules, experts={**self.rules.experts, name: expert})
        return f"{name} is {expert}"

    def _change(self, name: str, **fields: Any) -> str:
        expert = replace(self.rules.experts[name], **fields)
        self.rules = replace(self.rules, experts={**self.rules.experts, name: expert})
        return f"{name} is now {expert}"

    # ---- callers ----

    def _clearance(self) -> str:
        self.rules = replace(self.rules, plan="gold" if self.rules.plan == "premium" else "premium")
        return f"plan {self.rules.plan} has tier high"

    def _anonymous(self) -> str:
        self.rules = replace(self.rules, anonymous="deny" if self.rules.anonymous == "low" else "low")
        return f"anonymous: {self.rules.anonymous}"

    def _trust(self) -> str:
        """The policy loses its issuer, or gets it back."""
        self.rules = replace(self.rules, trusted=not self.rules.trusted)
        return "the issuer is trusted" if self.rules.trusted else "no issuer is trusted"

    def _revoke(self) -> str:
        """By id, subject or time; what is revoked already is no longer."""
        rules, name = self.rules, self._random.choice([*(caller.name for caller, _, _ in self._regulars), "acme"])
        kind = self._random.choice(("jti", "sub", "issued_before"))
        if kind == "jti":
            self.rules = replace(rules, revoked_jti=rules.revoked_jti ^ {f"{name}-jti"})
        elif kind == "sub":
            self.rules = replace(rules, revoked_sub=rules.revoked_sub ^ {f"{name}-sub"})
        else:
            before = int(time.time()) - HOUR // 2
            self.rules = replace(rules, issued_before=None if rules.issued_before else before)
        revoked = sorted(self.rules.revoked_jti | self.rules.revoked_sub)
        return f"revoked: {revoked}, issued before {self.rules.issued_before}"

    def _relent(self) -> str:
        """Frequent, because otherwise most callers would be denied most of the time."""
        self.rules = Rules(self.rules.experts)
        return "nothing is revoked, everybody is welcome"
