"""The counts of decisions, as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import generate_latest

from ext_authz.core.model import Decision, Reason, Verdict
from ext_authz.observe.metrics import BUCKETS, Tally, gauge, registry


def test_metrics_are_prometheus_text() -> None:
    """With counts under their names and cumulative buckets."""
    tally = Tally()
    for seconds in (0.00001, 0.0002, 0.0002, 9.0):
        tally.decided(Decision(Verdict.ALLOW, Reason.PERMITTED, serve=("A", "B")), seconds)
    tally.decided(Decision(Verdict.DENY, Reason.TIER_TOO_LOW), BUCKETS[0])
    tally.condition_errors["clearance[0].when"] += 2
    tally.rpc_errors += 1
    text = generate_latest(registry(tally.families, lambda: [gauge("srp_test", "A test.", 1.5)])).decode()
    lines = set(text.splitlines())
    assert lines >= {
        'srp_decisions_total{reason="permitted",verdict="allow"} 4.0',
        'srp_decisions_total{reason="tier_too_low",verdict="deny"} 1.0',
        'srp_candidates_total{expert="A"} 4.0',
        'srp_condition_errors_total{condition="clearance[0].when"} 2.0',
        "srp_rpc_errors_total 1.0",
        'srp_check_seconds_bucket{le="5e-05"} 2.0',
        'srp_check_seconds_bucket{le="0.00025"} 4.0',
        'srp_check_seconds_bucket{le="0.25"} 4.0',
        'srp_check_seconds_bucket{le="+Inf"} 5.0',
        "srp_check_seconds_count 5.0",
        "srp_test 1.5",
    }


def test_an_empty_tally_is_valid_text() -> None:
    """Before the first decision, every family is there, empty or zero."""
    text = generate_latest(registry(Tally().families)).decode()
    for name in ("srp_decisions", "srp_candidates", "srp_condition_errors", "srp_rpc_errors", "srp_check_seconds"):
        assert f"# TYPE {name}" in text
