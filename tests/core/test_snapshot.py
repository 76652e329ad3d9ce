"""How much a snapshot caches."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from ext_authz.core import gate
from ext_authz.core.check import check, identify, store
from ext_authz.core.jwk import parse_jwks
from ext_authz.core.model import Outcome, Request
from ext_authz.core.snapshot import CacheSizes
from tests.harness import checks, tokens
from tests.harness.authorization import load_policy


def test_large_entries_evict_more_than_small_ones(tmp_path: Path) -> None:
    """Anyone can name all experts in ever new orders, so a cache is bounded by the size of its entries."""
    names = [f"e{n:02d}" for n in range(gate.MAX_NAMES)]
    experts = "".join(f"  {n}: {{tier: low, endpoints: ['127.0.0.1:1']}}\n" for n in names)
    policy = load_policy(tmp_path, ("experts:\n", f"experts:\n{experts}"))
    snapshot = CacheSizes(tokens=64, decisions=64).snapshot(
        policy, {tokens.ISSUER: parse_jwks(tokens.jwks("ES256")).keys}, 1
    )
    for order in itertools.islice(itertools.permutations(names), 200):
        made = check(snapshot, Request("GET", "/x", {"x-expert-names": ",".join(order)}), time.time())
        assert isinstance(made, Outcome)
        assert made.decision.serve == order
        store(snapshot, ("/x", ",".join(order).encode()), Request("GET", "/x", {}), made)
    assert 1 <= len(snapshot.decisions) <= 8
    assert 1 <= len(snapshot.requests) <= 8
    for n in range(20):
        token = checks.token(jti=str(n), roles=["x" * 10_000])
        identify(snapshot, Request("GET", "/x", {"authorization": f"Bearer {token}"}), time.time())
    assert 1 <= len(snapshot.tokens) <= 6
