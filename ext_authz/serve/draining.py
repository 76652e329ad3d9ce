"""Policies that are no longer in force, while requests that they permitted may still be on their way."""

from __future__ import annotations

from dataclasses import dataclass, field

from ext_authz.core.policy import Policy

MIN_DRAIN, MAX_DRAIN = 10.0, 60.0  # seconds
MAX_POLICIES = 16  # the oldest beyond these is dropped early


@dataclass(slots=True)
class Draining:
    """The newest policy comes first. Times are those of one clock, in seconds."""

    _until: list[tuple[Policy, float]] = field(default_factory=list)

    def add(self, policy: Policy, now: float) -> None:
        """`policy` made its last decision at `now`. Its clusters are needed for as long as its experts may take."""
        timeouts = [e.traffic.timeout or MAX_DRAIN for e in policy.experts.values()]
        drain = min(max([MIN_DRAIN, *timeouts]), MAX_DRAIN)
        self._until = [(policy, now + drain), *self._until][:MAX_POLICIES]

    def policies(self, now: float) -> tuple[Policy, ...]:
        """The policies whose clusters are still needed; the others are forgotten."""
        self._until = [(policy, until) for policy, until in self._until if now < until]
        return tuple(policy for policy, _ in self._until)

    def next_end(self) -> float | None:
        """When the next one is done; None if there are none."""
        return min((until for _, until in self._until), default=None)
