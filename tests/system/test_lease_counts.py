"""A real Envoy's lease counters, in `/status`, `srp status` and `/metrics`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import urllib.request

from ext_authz.observe import status_text
from ext_authz.observe.lease_counts import LeaseCounts, fetch
from tests.conftest import demo_policy
from tests.harness import tokens
from tests.harness.system import HOST, system, wait_for


def test_every_page_shows_the_lease_counters_and_says_when_envoy_is_gone() -> None:
    """Without Envoy the pages are still served."""

    def metrics(port: int) -> str:
        with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=5) as response:
            return response.read().decode()

    files = {"jwks.json": tokens.jwks("ES256")}
    with system(demo_policy, {"A": 1, "B": 1, "C": 1, "D": 1}, files, workers=1) as it:
        wait_for(lambda: bool(it.status()["leases"]["on"]), "leases")
        for _ in range(5):
            assert it.send("/x", headers=[("x-expert-names", "A")], body=b"{}").status == 200
        counts = it.status()["leases"]["envoy"]
        assert (counts["misses"], counts["stores"], counts["hits"], counts["errors"]) == (1, 1, 4, 0)
        assert counts == vars_of(asyncio.run(fetch((HOST, it.admin))))
        assert counts["repeated"] == 4
        assert "srp_lease_hits_total 4.0" in metrics(it.status_port)
        shown = status_text.text(it.status())
        assert "1 granted; since the epoch began 4 hits, 1 misses, 1 stores, 0 evictions; 4 hits in all" in shown
        it.envoy.stop()
        assert "cannot connect" in it.status()["leases"]["error"]
        assert "srp_lease_counts_error 1.0" in metrics(it.status_port)
        command = [sys.executable, "-m", "ext_authz", "status", "--address", f"{HOST}:{it.status_port}"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "; hits unknown\n! envoy's counters on" in printed


def vars_of(counts: LeaseCounts) -> dict[str, int]:
    return {name: getattr(counts, name) for name in counts.__slots__}
