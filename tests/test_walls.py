"""The walls between the rooms hold: each kind of trespass, in a copy of the code, is refused by name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

LINT = Path(sys.executable).with_name("lint-imports")

# (name, file, the line appended to it, what the refusal must say)
TRESPASSES = [
    (
        "core to a room above",
        "core/policy.py",
        "from ext_authz.sources import watched",
        "ext_authz.core.policy -> ext_authz.sources.watched",
    ),
    ("core to the file system", "core/gate.py", "import os", "ext_authz.core.gate may not import os"),
    (
        "core to the network",
        "core/jwks_url.py",
        "import urllib.request",
        "ext_authz.core.jwks_url may not import urllib",
    ),
    ("core to a log", "core/decide.py", "import logging", "ext_authz.core.decide may not import logging"),
    ("core to a library", "core/jwk.py", "import aiohttp", "ext_authz.core.jwk may not import aiohttp"),
    ("core to what no list foresaw", "core/check.py", "import ftplib", "ext_authz.core.check may not import ftplib"),
    (
        "core upwards inside",
        "core/model.py",
        "from ext_authz.core import gate",
        "ext_authz.core.model -> ext_authz.core.gate",
    ),
    (
        "between rooms of one floor",
        "wire/ads.py",
        "from ext_authz.policyfile import parse",
        "ext_authz.wire.ads -> ext_authz.policyfile.parse",
    ),
    (
        "to the floor above",
        "observe/counts.py",
        "from ext_authz.serve import epoch",
        "ext_authz.observe.counts -> ext_authz.serve.epoch",
    ),
    ("Envoy's messages", "serve/server.py", "import envoy_data_plane", "ext_authz.serve.server -> envoy_data_plane"),
    ("gRPC", "review/diff.py", "import grpc", "ext_authz.review.diff -> grpc"),
    (
        "two files that import each other",
        "review/reads.py",
        "from ext_authz.review import replay",
        "No cycles are allowed in ext_authz.review.",
    ),
    ("a file in no room", "helpers.py", "", "not listed as layers: - ext_authz.helpers"),
    ("a file of the core on no floor", "core/extra.py", "", "not listed as layers: - ext_authz.core.extra"),
    (
        "experts to the proxy",
        "../experts/service.py",
        "from ext_authz.core import model",
        "experts.service -> ext_authz.core.model",
    ),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What lint-imports says about a copy with all trespasses in it."""
    copy = tmp_path_factory.mktemp("copy")
    for package in ("ext_authz", "experts", "tests/harness"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/__init__.py"):
        shutil.copy(ROOT / name, copy / name)
    for _, file, line, _ in TRESPASSES:
        with (copy / "ext_authz" / file).open("a") as out:
            out.write(f"\n{line}\n")
    done = subprocess.run(
        [LINT, "--no-cache"], cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    return re.sub(r"\s+", " ", done.stdout)


@pytest.mark.parametrize("says", [t[3] for t in TRESPASSES], ids=[t[0] for t in TRESPASSES])
def test_a_trespass_is_refused(refusals: str, says: str) -> None:
    assert says in refusals
