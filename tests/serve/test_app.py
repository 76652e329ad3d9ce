"""What the settings of `srp serve` turn on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ext_authz.serve.app import leasing
from ext_authz.settings import Settings


def test_leases_are_off_where_every_decision_must_be_seen(tmp_path: Path) -> None:
    """A shadow policy and a decision log see every decision; a table without entries can hold no lease."""
    plain = Settings(tmp_path / "policy.yaml")
    assert leasing(plain, None) is not None
    assert leasing(plain, object()) is None  # type: ignore[arg-type]
    assert leasing(replace(plain, lease_entries=0), None) is None
