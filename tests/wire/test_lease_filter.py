"""The lease filter: the settings it gets, and its script."""

from __future__ import annotations

import pytest

from ext_authz.wire import lease_filter
from tests.harness import ROOT

HOSTILE = ['"', "\\", "\n", "]]", "é", "a\x00b", "%d", "--"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_escapes_from_its_lua_string(text: str) -> None:
    """Paths and headers of the policy become Lua strings, whatever they contain."""
    made = lease_filter._lua(text)
    assert made.isascii()
    assert made.strip('"').replace("\\", "").isalnum()


def test_the_script_ends_a_lease_when_the_clock_is_set_back() -> None:
    """It compares both ends of a lease. A test cannot set this machine's clock, so it reads the script."""
    text = (ROOT / "envoy" / "lease.lua").read_text()
    assert "lease.since <= now and now < lease.expires" in text
