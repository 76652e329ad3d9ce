"""Free loopback ports for the demo."""

from __future__ import annotations

import contextlib
import os
import socket

from ext_authz.demo.children import DemoError

HOST = "127.0.0.1"


def check_free(port: int, advice: str) -> None:
    """DemoError, with `advice`, if the port is not available."""
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OverflowError:
            raise DemoError(f"{port} is not a valid port") from None
        except OSError as e:
            raise DemoError(f"port {port} is not available ({os.strerror(e.errno or 0).lower()}): {advice}") from None


def free_port() -> int:
    """A port that is free now."""
    return free_ports(1)[0]


def free_ports(n: int) -> list[int]:
    """`n` different ports that are free now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(n)]
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
