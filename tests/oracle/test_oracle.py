"""ext_authz and the oracle, on random policies, tokens and requests.

SRP_CASES is the number of requests, SRP_SEED the seed: `SRP_CASES=1000000 .venv/bin/python -m pytest tests/oracle`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pprint import pformat

import pytest

from ext_authz.core.policy import Revoked
from tests.harness import ROOT
from tests.oracle.runs import Difference, differences
from tests.oracle.shrink import smallest

CASES = int(os.environ.get("SRP_CASES") or 20_000)
SEED = int(os.environ.get("SRP_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Without the warnings about conditions that cannot be evaluated, of which there are thousands."""
    with caplog.at_level(logging.ERROR, "srp.server"):
        yield


def test_every_request_gets_what_the_documents_say() -> None:
    """Status, reason, clusters, headers set and removed, the body of a denial, and whose newer keys are looked for."""
    found = asyncio.run(_first(SEED, CASES))
    if found is not None:
        pytest.fail(f"SRP_SEED={SEED}\n{_shown(smallest(found))}", pytrace=False)


def test_a_defect_is_found_and_reduced_to_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """If revocations were ignored, the test above would fail, and show a small policy and one request."""
    monkeypatch.setattr(Revoked, "covers", lambda _self, _claims: False)
    found = asyncio.run(_first(1, 4_000, status=401))
    assert found is not None
    least = smallest(found)
    assert (len(least.steps), len(least.case.policy["experts"]), len(least.case.policy["issuers"])) == (1, 1, 1)
    assert "revoked" in least.case.policy
    assert least.expected.status == 401


def test_the_oracle_imports_nothing_of_ext_authz() -> None:
    code = "import sys, tests.oracle.answers; print([m for m in sys.modules if m.split('.')[0] == 'ext_authz'])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


async def _first(seed: int, cases: int, status: int | None = None) -> Difference | None:
    """The first difference, or the first where the documents demand this status."""
    async for difference in differences(seed, cases):
        if status in (None, difference.expected.status):
            return difference
    return None


def _shown(difference: Difference) -> str:
    keys, newer = difference.case.keys, difference.case.newer
    steps = "\n".join(f"at {now}: {pformat(request, width=120)}" for request, now in difference.steps)
    return "\n".join(
        (
            f"policy: {difference.case.text}",
            f"keys: {pformat(keys, width=120)}",
            f"newer keys: {pformat(newer, width=120)}",
            f"leases are granted: {difference.case.grants}",
            steps,
            f"the documents: {pformat(difference.expected, width=120)}",
            f"ext_authz: {pformat(difference.actual, width=120)}",
        )
    )
