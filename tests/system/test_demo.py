"""`srp demo` as a user runs it: to `ready`, the printed curls, the smoke test, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT


@contextlib.contextmanager
def demo(directory: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running demo and all that it printed up to `ready`."""
    command = [sys.executable, "-m", "ext_authz", "demo", "--dir", str(directory), "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        printed = ""
        for line in process.stdout:
            printed += line
            if line == "ready\n":
                break
        assert printed.endswith("ready\n"), printed
        yield process, printed
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.stdout.close()
        process.wait(20)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    directory = tmp_path_factory.mktemp("demo")
    with demo(directory) as (process, printed):
        yield directory, printed
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_printed_curls_work_when_pasted(running: tuple[Path, str]) -> None:
    """Each does what its comment says."""
    _, printed = running
    curls = re.findall(r"^# (.*)\n(curl .*)$", printed, re.MULTILINE)
    expected = [(200, "allow"), (200, "allow"), (403, "deny"), (200, "downgrade")]
    assert len(curls) == len(expected)
    for (comment, line), (status, verdict) in zip(curls, expected, strict=True):
        out = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=20, check=True).stdout
        assert out.startswith(f"HTTP/1.1 {status} "), (comment, out)
        assert f"x-srp-decision: {verdict}" in out, (comment, out)


def test_the_smoke_test_passes(running: tuple[Path, str]) -> None:
    """The decision table by HTTP, as an operator would check it."""
    directory, printed = running
    found = re.search(r"http://127\.0\.0\.1:\d+(?=/route)", printed)
    assert found
    command = [sys.executable, "scripts/smoke", found[0], str(directory / "tokens")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ", 0 failed" in run.stdout


def test_keys_and_tokens_are_private(running: tuple[Path, str]) -> None:
    """Nobody but their owner can read what signs or is signed."""
    directory, _ = running
    for path in (directory / "key.pem", *(directory / "tokens").iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_child_that_dies_stops_the_demo_and_its_log_is_shown(tmp_path: Path) -> None:
    """One crash is reported, nothing is left behind."""
    with demo(tmp_path) as (process, _):
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-a"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert len(children) == 7
        pids = [int(line.split()[0]) for line in children]
        victim = next(int(line.split()[0]) for line in children if "ext_authz serve" in line)
        os.kill(victim, signal.SIGKILL)
        assert process.stdout is not None
        rest = process.stdout.read()
        assert process.wait(20) == 1
        assert "ext_authz ended with status -9" in rest
        assert "listens on" in rest
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_the_readme_shows_the_demo(running: tuple[Path, str]) -> None:
    """The README's curls are those that the demo prints, but for port and folder."""
    _, printed = running
    readme = (ROOT / "README.md").read_text()
    for line in re.findall(r"^curl .*$", printed, re.MULTILINE):
        words = [re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:9000", w) for w in shlex.split(line)]
        shown = [w for w in words if not w.startswith("authorization")]
        assert all(w in readme for w in shown), shown
