"""`srp demo` where it cannot start."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from tests.harness import ROOT


def test_a_port_in_use_is_reported_in_one_line(tmp_path: Path) -> None:
    """And the exit status is 1."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        command = [sys.executable, "-m", "ext_authz", "demo", "--dir", str(tmp_path), "--port", str(port)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    assert run.returncode == 1
    assert run.stderr == (
        f"srp demo: port {port} is not available (address already in use): choose another with --port\n"
    )
