"""`srp serve` with a policy that it cannot start with."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ext_authz.cli.main import main
from tests.harness import ROOT
from tests.harness.policies import BROKEN, BROKEN_KEYS, write_keys
from tests.harness.server import served

REFUSED = [path for path in BROKEN if path.stem not in BROKEN_KEYS]


@pytest.fixture
def own_logging() -> Iterator[None]:
    """`srp serve` replaces the root logger's handlers: restore them."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("path", REFUSED, ids=lambda p: p.stem)
@pytest.mark.usefixtures("own_logging")
def test_a_broken_policy_is_refused(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With exit status 1; every line names the file."""
    write_keys(tmp_path)
    shutil.copy(path, tmp_path / "policy.yaml")
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--policy", str(tmp_path / "policy.yaml"), "--listen", f"unix:{tmp_path}/s", "--status", "off"])
    assert ended.value.code == 1
    assert all(line.startswith(f"{tmp_path}/policy.yaml:") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("name", ["jwks_file_missing", "jwks_file_private", "secret_file_short"])
def test_a_policy_with_a_broken_key_file_is_served(tmp_path: Path, name: str) -> None:
    """The log names the file; its issuer's tokens are refused until it is mended. The other mistakes of key files
    are in tests/policyfile."""
    assert name in BROKEN_KEYS
    write_keys(tmp_path)
    (tmp_path / "short-secret").write_text("0123456789")
    shutil.copy(ROOT / "tests/policyfile/broken" / f"{name}.yaml", tmp_path / "policy.yaml")
    with served(tmp_path) as it:
        assert "is in force" in it.log
        assert "its tokens are refused" in it.log
        assert it.status()["policy"]["error"] is None
        assert it.status()["keys"][0]["last_error"]


def test_a_refused_policy_ends_the_process_without_a_traceback(tmp_path: Path) -> None:
    """The exit status is 1, and each error has its line."""
    path = tmp_path / "policy.yaml"
    path.write_text("version: 2\n")
    command = [sys.executable, "-m", "ext_authz", "serve", "--policy", str(path), "--listen", f"unix:{tmp_path}/s"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert f"{path}:1:10: version: " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_fifo_in_place_of_the_policy_ends_the_process_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "policy.yaml")
    command = [sys.executable, "-m", "ext_authz", "serve", "--status", "off", "--listen", f"unix:{tmp_path}/socket"]
    ended = subprocess.run(
        [*command, "--policy", str(tmp_path / "policy.yaml")], capture_output=True, text=True, timeout=20, check=False
    )
    assert (ended.returncode, "is not a regular file" in ended.stderr) == (1, True), ended.stderr
    assert "Traceback" not in ended.stderr
