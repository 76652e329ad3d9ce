"""A real Envoy: its program, its configuration on loopback, its command line."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from ext_authz.demo.ports import HOST
from ext_authz.wire.bootstrap import bootstrap, envoy_file

ENVOY = shutil.which("envoy", path=str(Path(sys.executable).parent)) or shutil.which("envoy") or "envoy"


def configuration(port: int, admin: int, socket: str, change: Callable[[str], str] = str) -> str:
    """envoy/envoy.yaml after `change`, listening on these ports (0: a free one), with ext_authz at `socket`."""
    template, lua = change(envoy_file("envoy.yaml").read_text()), str(envoy_file("least_request.lua"))
    return bootstrap(template, listen=(HOST, port), admin=(HOST, admin), socket=socket, lua=lua)


def command(config: Path, threads: int, *flags: str) -> list[str]:
    """What starts Envoy with `threads` worker threads."""
    return [
        ENVOY, "-c", str(config), "--concurrency", str(threads), "--log-level", "warning", "--disable-hot-restart",
        *flags,
    ]  # fmt: skip
