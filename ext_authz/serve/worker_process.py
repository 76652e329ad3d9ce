"""One worker as its owner sees it: the process, the socket to it, and its latest reports."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ext_authz.observe.counts import Counts

START_TIMEOUT = 120.0  # seconds from a worker's start until it must be ready to listen; workers share the CPU cores
INSTALL_TIMEOUT = 2.0  # seconds to install an epoch
ANSWER_TIMEOUT = 3.0  # seconds to answer a poll


@dataclass(eq=False, slots=True)
class Slot:
    """The place of one worker: its socket's path, and the counts of the workers that had the slot before."""

    number: int
    path: Path
    restarts: int = 0
    past: Counts = field(default_factory=Counts)


@dataclass(eq=False, slots=True)
class WorkerProcess:
    """One process. `listens` is true once the owner has sent Listen: from then on it may be deciding.

    Times are from `time.monotonic`. `polled_at` is the time of the oldest poll without an answer, None if there is
    none; `answered` is the newest poll that it answered. `pending` has the epochs sent but not yet installed, oldest
    first, with the time of each.
    """

    slot: Slot
    process: subprocess.Popen[bytes]
    writer: asyncio.StreamWriter
    began: float
    listens: bool = False
    serving: bool = False
    compiled: set[str] = field(default_factory=set)
    installed: int = 0
    epoch: int = 0
    answered: int = 0
    pending: dict[int, float] = field(default_factory=dict)
    polled_at: float | None = None
    counts: Counts = field(default_factory=Counts)

    def send(self, data: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(data)

    def reset_deadlines(self, now: float) -> None:
        """Restart its timeouts: its answers may still be unread."""
        self.pending = dict.fromkeys(self.pending, now)
        self.polled_at = self.polled_at and now

    def record_installed(self, order: int, epoch: int) -> None:
        """Record that it has installed epoch `order`, and so none before it is pending."""
        self.installed, self.epoch = order, epoch
        self.pending = {later: since for later, since in self.pending.items() if later > order}

    def overdue(self, now: float) -> str | None:
        """Which timeout it has exceeded; None if none."""
        if not self.listens:
            return f"was not ready in {START_TIMEOUT:g} s" if now - self.began > START_TIMEOUT else None
        if self.pending and now - next(iter(self.pending.values())) > INSTALL_TIMEOUT:
            return f"did not install an epoch in {INSTALL_TIMEOUT:g} s"
        if self.polled_at is not None and now - self.polled_at > ANSWER_TIMEOUT:
            return f"has not answered for {ANSWER_TIMEOUT:g} s"
        return None


def spawn(listen: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A new worker, and this side of its socket. It has the same module search path as this process."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", "-m", "ext_authz.serve.worker", str(listen)]
        modules = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment = {**os.environ, "PYTHONPATH": modules}
        process = subprocess.Popen(command, stdin=theirs.fileno(), env=environment)  # noqa: S603 - our own command line
    return process, ours


def slot_report(slot: Slot, worker: WorkerProcess | None) -> dict[str, Any]:
    """The `/status` entry for a slot and the worker in it, if there is one."""
    past = slot.past.checks
    if worker is None:
        return {
            "worker": slot.number, "pid": None, "age_seconds": None, "serving": False, "epoch": None,
            "checks": past, "restarts": slot.restarts,
        }  # fmt: skip
    return {
        "worker": slot.number, "pid": worker.process.pid, "age_seconds": round(time.monotonic() - worker.began, 3),
        "serving": worker.serving, "epoch": worker.epoch, "checks": past + worker.counts.checks,
        "restarts": slot.restarts,
    }  # fmt: skip
