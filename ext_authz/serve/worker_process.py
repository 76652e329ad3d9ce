"""One worker as its owner sees it: the process, the socket to it, and what it has said."""

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

START_TIMEOUT = 120.0  # seconds until a worker must be ready to listen; many of them share the machine's cores
INSTALL_TIMEOUT = 2.0  # seconds to take over an epoch
ANSWER_TIMEOUT = 3.0  # seconds to answer anything at all


@dataclass(eq=False, slots=True)
class Place:
    """A worker's socket, and the counts of those that were there before."""

    number: int
    path: Path
    restarts: int = 0
    past: Counts = field(default_factory=Counts)


@dataclass(eq=False, slots=True)
class WorkerProcess:
    """One process. `listens` from when it is told to: from then on it may be deciding.

    Times are those of `time.monotonic`; `asked` None: there is nothing to wait for. `owed` are the epochs that it has
    been told to take over and has not, oldest first, with the time of each.
    """

    place: Place
    process: subprocess.Popen[bytes]
    writer: asyncio.StreamWriter
    began: float
    listens: bool = False
    serving: bool = False
    compiled: set[str] = field(default_factory=set)
    installed: int = 0
    epoch: int = 0
    told: int = 0
    owed: dict[int, float] = field(default_factory=dict)
    asked: float | None = None
    counts: Counts = field(default_factory=Counts)

    def send(self, data: bytes) -> None:
        if not self.writer.is_closing():
            self.writer.write(data)

    def wait_anew(self, now: float) -> None:
        """What it has said meanwhile may not have been heard."""
        self.owed = dict.fromkeys(self.owed, now)
        self.asked = self.asked and now

    def has_installed(self, order: int, epoch: int) -> None:
        """It has taken over that one, and so owes none before it."""
        self.installed, self.epoch = order, epoch
        self.owed = {later: since for later, since in self.owed.items() if later > order}

    def late(self, now: float) -> str | None:
        """Why it is not to be waited for any longer."""
        if not self.listens:
            return f"was not ready in {START_TIMEOUT:g} s" if now - self.began > START_TIMEOUT else None
        if self.owed and now - next(iter(self.owed.values())) > INSTALL_TIMEOUT:
            return f"did not take over an epoch in {INSTALL_TIMEOUT:g} s"
        if self.asked is not None and now - self.asked > ANSWER_TIMEOUT:
            return f"has not answered for {ANSWER_TIMEOUT:g} s"
        return None


def spawn(listen: Path) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A new worker, and this side of its socket. Its modules come from where this process has them from."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", "-m", "ext_authz.serve.worker", str(listen)]
        modules = os.pathsep.join(p or os.getcwd() for p in sys.path)
        environment = {**os.environ, "PYTHONPATH": modules}
        process = subprocess.Popen(command, stdin=theirs.fileno(), env=environment)  # noqa: S603 - our own command line
    return process, ours


def reported(place: Place, worker: WorkerProcess | None) -> dict[str, Any]:
    """A place and who is there, for `/status`."""
    past = place.past.checks
    if worker is None:
        return {
            "worker": place.number, "pid": None, "age_seconds": None, "serving": False, "epoch": None,
            "checks": past, "restarts": place.restarts,
        }  # fmt: skip
    return {
        "worker": place.number, "pid": worker.process.pid, "age_seconds": round(time.monotonic() - worker.began, 3),
        "serving": worker.serving, "epoch": worker.epoch, "checks": past + worker.counts.checks,
        "restarts": place.restarts,
    }  # fmt: skip
