"""How long the clusters of a policy that is no longer in force are kept."""

from __future__ import annotations

import pytest

from ext_authz.core.policy import Expert, Policy, Traffic
from ext_authz.serve.draining import MAX_DRAIN, MAX_POLICIES, MIN_DRAIN, Draining


def policy(*timeouts: float) -> Policy:
    """A policy whose experts have these timeouts, in seconds."""
    experts = {str(n): Expert(str(n), 0, f"c{n}", traffic=Traffic(timeout=t)) for n, t in enumerate(timeouts)}
    return Policy(("low",), experts)


ENDS = [
    # name, timeouts, seconds
    ("the shortest", (1.0,), MIN_DRAIN),
    ("as long as an expert may take", (20.0,), 20.0),
    ("the most patient expert's", (1.0, 30.0, 20.0), 30.0),
    ("at most", (3600.0,), MAX_DRAIN),
    ("no timeout is the longest", (1.0, 0.0), MAX_DRAIN),
    ("no expert", (), MIN_DRAIN),
]


@pytest.mark.parametrize(("timeouts", "seconds"), [e[1:] for e in ENDS], ids=[e[0] for e in ENDS])
def test_a_policy_drains_for_as_long_as_its_requests_may_take(timeouts: tuple[float, ...], seconds: float) -> None:
    it, old = Draining(), policy(*timeouts)
    it.add(old, 100.0)
    assert it.next_end() == 100.0 + seconds
    assert it.policies(100.0 + seconds - 0.001) == (old,)
    assert it.policies(100.0 + seconds) == ()
    assert it.next_end() is None


def test_the_newest_comes_first_and_each_ends_at_its_own_time() -> None:
    it, patient, hasty = Draining(), policy(50.0), policy(1.0)
    it.add(patient, 0.0)
    it.add(hasty, 1.0)
    assert it.policies(2.0) == (hasty, patient)
    assert it.next_end() == 11.0
    assert it.policies(11.0) == (patient,)
    assert it.next_end() == 50.0


def test_the_number_of_policies_is_bounded() -> None:
    """The oldest go first."""
    it, many = Draining(), [policy(20.0) for _ in range(MAX_POLICIES + 3)]
    for now, each in enumerate(many):
        it.add(each, float(now))
    assert len(kept := it.policies(float(len(many)))) == MAX_POLICIES
    assert all(a is b for a, b in zip(kept, reversed(many), strict=False))
