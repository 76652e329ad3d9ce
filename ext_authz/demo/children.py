"""The demo's child processes: each starts with its own log, and all stop together."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STOP_TIMEOUT = 5.0  # seconds that a child has to end


class DemoError(Exception):
    """The demo cannot start or continue; the text says why."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process of the demo, and its log file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def spawn(directory: Path, name: str, *command: str) -> Child:
    log = directory / "logs" / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603 - our own command lines
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, preexec_fn=_die_with_parent,
            process_group=0,
        )  # fmt: skip
    return Child(name, process, log)


def _die_with_parent() -> None:
    """Runs in the child: makes it end when the demo is killed (Linux only; elsewhere Ctrl-C still stops all)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def check_alive(children: Sequence[Child]) -> None:
    for child in children:
        code = child.process.poll()
        if code is not None:
            raise DemoError(f"{child.name} ended with status {code}; the last lines of {child.log}:\n{tail(child)}")


def stop(children: Sequence[Child]) -> None:
    """Stop all children. Envoy stops first, so that it sends no requests to children that are stopping."""
    for child in reversed(children):
        if child.process.poll() is None:
            child.process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT
    for child in reversed(children):
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def tail(child: Child, lines: int = 15) -> str:
    with child.log.open("rb") as f:
        f.seek(max(0, child.log.stat().st_size - 8192))
        text = f.read().decode("utf-8", "replace")
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])
