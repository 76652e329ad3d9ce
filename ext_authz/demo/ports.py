"""Free loopback ports for the demo."""

from __future__ import annotations

import contextlib
import os
import random
import socket

from ext_authz.demo.children import DemoError

HOST = "127.0.0.1"
_PORTS = range(20_000, 32_000)


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
    """Different ports on which nothing listens now, below those that the kernel gives to outgoing connections: one of
    them could be taken before it is used."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(found) < n:
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((HOST, random.choice(_PORTS)))  # noqa: S311 - no secret
                found.append(probe.getsockname()[1])
    return found
