"""What one process has counted, and the sum of several."""

from __future__ import annotations

from ext_authz.core.model import Decision, Reason, Verdict
from ext_authz.core.snapshot import CACHES, CacheSizes
from ext_authz.observe.counts import CacheUsage, Counts, add_up, counted, ended
from ext_authz.observe.metrics import Tally
from ext_authz.policyfile.parse import parse_policy
from tests.harness.authorization import POLICY

COUNTS = Counts(
    (("allow", "permitted", 2),), {"A": 2}, {}, 0, 1, (2, *[0] * 10), 0.5, {"tokens": CacheUsage(1, 2, 3, 4)}
)


def test_counts_of_living_and_ended_processes_add_up() -> None:
    tally, sizes = Tally(), CacheSizes()
    policy = parse_policy(POLICY, key_files=False)
    tally.decided(Decision(Verdict.ALLOW, Reason.PERMITTED, serve=("A", "B")), 0.0)
    tally.condition_errors["clearance[0]"] += 1
    one = counted(tally, sizes, sizes.snapshot(policy, {}, 1))
    assert (one.checks, dict(one.experts)) == (1, {"A": 1, "B": 1})
    total = add_up([one, COUNTS, ended(COUNTS)])
    assert total.decisions == (("allow", "permitted", 5),)
    assert total.tally().decisions == {("allow", "permitted"): 5}
    assert (total.checks, total.leases, total.latency_sum) == (5, 2, one.latency_sum + 1.0)
    assert total.experts == {"A": 5, "B": 1}
    assert total.condition_errors == {"clearance[0]": 1}
    assert total.caches["tokens"] == CacheUsage(1, 4, 6, 8)  # the entries of the one that ended are gone
    assert total.caches.keys() == set(CACHES)
    assert add_up([]) == add_up([Counts()])
