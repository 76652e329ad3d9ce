"""What is in force when, and the judge of what reaches a backend.

A value (a policy, the issuer's keys) is in force from the time its file is written until its successor has settled:
ext_authz has reported the successor in force, the Envoy in question has acknowledged it, and WORKER_LAG has passed.
The last lease of an older value ends then (docs/leases.md). Times are in seconds, on one clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any, Generic, TypeVar

from tests.harness.rules import Caller, Keys, Rules

V = TypeVar("V")


@dataclass(eq=False)
class Change(Generic[V]):
    """A value that comes into force. `settled` says from when on each Envoy uses nothing older.

    `dropped` is whether it never came into force, and never will.
    """

    value: V
    begun: float
    digest: str
    settled: list[float]
    reported: float = inf
    dropped: bool = False


class Timeline(Generic[V]):
    """The changes of one thing, in order, for so many Envoys."""

    def __init__(self, envoys: int) -> None:
        self._envoys = envoys
        self.changes: list[Change[V]] = []

    def begin(self, value: V, digest: str, now: float) -> Change[V]:
        self.changes.append(Change(value, now, digest, [inf] * self._envoys))
        return self.changes[-1]

    def report(self, digest: str, now: float) -> None:
        """The change of this digest is in force."""
        change = next(c for c in reversed(self.changes) if c.digest == digest)
        change.reported = min(change.reported, now)

    @property
    def newest(self) -> Change[V]:
        return self.changes[-1]

    @property
    def reported(self) -> Change[V] | None:
        """The newest change that has been reported in force."""
        return next((c for c in reversed(self.changes) if c.reported < inf), None)

    def in_force(self, envoy: int, since: float) -> list[Change[V]]:
        """What was in force, at this Envoy, at some time from `since` to now; the newest first."""
        found = []
        for change in reversed(self.changes):
            if not change.dropped:
                found.append(change)
            if change.settled[envoy] <= since:
                break
        return found


@dataclass(eq=False)
class Request:
    """A request through one of the Envoys, with its arrivals: backend and time.

    `fate` is what the first backend does: `answer`, `close`, `fail` (503), or first `hold`, as in `hold, close`.
    """

    number: int
    caller: Caller
    names: tuple[str, ...]
    envoy: int
    gate: str
    fate: str
    sent: float
    arrivals: list[tuple[str, float]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"#{self.number}, {self.caller.name} for {','.join(self.names)} by {self.gate} at envoy {self.envoy}"


@dataclass(frozen=True)
class Judge:
    """Knows which policies and keys were in force when."""

    policies: Timeline[Rules]
    keys: Timeline[Keys]

    def breach(self, request: Request, backend: str, now: float) -> str | None:
        """Why an arrival is a breach; None if something in force between the request and now permits it."""
        keys = self.keys.in_force(request.envoy, request.sent)
        for policy in self.policies.in_force(request.envoy, request.sent):
            if any(backend in policy.value.reach(request.caller, k.value, request.names) for k in keys):
                return None
        return "\n".join(self._report(request, backend, now))

    def certain(self, request: Request) -> bool:
        """Whether only one policy and one set of keys can have decided a request that arrives now."""
        return all(len(t.in_force(request.envoy, request.sent)) == 1 for t in (self.policies, self.keys))

    def _report(self, request: Request, backend: str, now: float) -> Iterator[str]:
        before = "".join(f", after {where} at {at:.3f}" for where, at in request.arrivals)
        yield f"{request}, sent at {request.sent:.3f}, reached {backend} at {now:.3f}{before}; not permitted by"
        for policy in self.policies.in_force(request.envoy, request.sent):
            rules = policy.value
            tier = rules.tier(request.caller, frozenset({request.caller.key or ""}))
            experts = "; ".join(f"{name} is {rules.experts.get(name, 'unknown')}" for name in request.names)
            yield f"    policy {_times(policy, request.envoy)}: the caller has {tier}; {experts}"
        for keys in self.keys.in_force(request.envoy, request.sent):
            yield f"    keys {_times(keys, request.envoy)}: {sorted(keys.value)}"


def _times(change: Change[Any], envoy: int) -> str:
    times = f"begun {change.begun:.3f}, reported {change.reported:.3f}, settled {change.settled[envoy]:.3f}"
    return f"{change.digest} ({times})"
