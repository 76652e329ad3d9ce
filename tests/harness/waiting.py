"""Waiting for another task, thread or process: TimeoutError, with the tails of its logs, if it takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol


class Logging(Protocol):
    """Something that keeps its logs, `*.log`, in one folder."""

    directory: Path


async def until(ready: Callable[[], object], what: str, it: Logging | None = None, seconds: float = 10) -> None:
    """Let the event loop run until `ready()` holds."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(_message(what, it, seconds))
        await asyncio.sleep(0.01)


def wait_for(ready: Callable[[], object], what: str, it: Logging | None = None, seconds: float = 30) -> None:
    """Block until `ready()` holds; a server that cannot be reached yet counts as not ready."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if ready():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(_message(what, it, seconds))
        time.sleep(0.02)


def _message(what: str, it: Logging | None, seconds: float) -> str:
    logs = sorted(it.directory.glob("*.log")) if it else []
    return "\n".join([f"waited {seconds} s for {what}", *(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)])
