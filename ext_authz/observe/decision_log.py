"""The decision log: JSON lines in a file that is turned over by size. Adding a line costs the event loop no I/O.

A thread gathers lines and writes them. What it cannot keep up with, and what the disk does not take, is lost and
counted: a decision never waits for its record.
"""

from __future__ import annotations

import logging
import os
import stat
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path

MAX_PENDING = 8 * 1024 * 1024  # bytes of lines that wait for the disk
WRITE_SIZE = 256 * 1024  # bytes that go to the disk at once
WRITE_INTERVAL = 0.05  # seconds of lines that one write takes
CLOSE_TIMEOUT = 5.0  # seconds that the last lines get
MODE = 0o600

log = logging.getLogger("srp.decision_log")


class DecisionLog:
    """Appends to `path`; before it grows over `max_bytes` it becomes `path.1`, that `path.2`, up to `path.keep`.

    Counts of lines: `written`, `dropped` (too many waited), `failed` (the disk did not take them).
    """

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self.written = self.dropped = self.failed = 0
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._file = -1
        self._size = 0
        self._failing = False
        # One thread appends and one takes: each owns one of the two sums, so neither needs a lock.
        self._lines: deque[bytes] = deque()
        self._added = self._taken = 0
        self._something = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)

    @property
    def counts(self) -> dict[str, int]:
        """Lines so far, by what became of them."""
        return {"written": self.written, "dropped": self.dropped, "failed": self.failed}

    def start(self) -> None:
        """Open the file and begin; OSError if it cannot be had."""
        self._open()
        self._thread.start()

    def add(self, line: bytes) -> None:
        """Have `line` written soon, or drop it if too much waits already."""
        if self._added - self._taken + len(line) > MAX_PENDING:
            self.dropped += 1
            return
        self._lines.append(line)
        self._added += len(line)
        if not self._something.is_set():
            self._something.set()

    def close(self) -> None:
        """Write what waits and end; what the disk has not taken within CLOSE_TIMEOUT seconds is lost."""
        self._closing.set()
        self._something.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._something.wait()
            self._closing.wait(WRITE_INTERVAL)
            self._something.clear()
            self._write_all()
        self._write_all()
        self._shut()

    def _write_all(self) -> None:
        """Write all that waits, in pieces that fit into what is left of the file."""
        while self._lines:
            piece: list[bytes] = []
            room = min(WRITE_SIZE, self._max_bytes - self._size)
            while self._lines and (not piece or len(self._lines[0]) <= room):
                piece.append(self._lines.popleft())
                room -= len(piece[-1])
            self._write(piece)

    def _write(self, piece: list[bytes]) -> None:
        data = b"".join(piece)
        try:
            if self._file < 0 or self._moved():
                self._shut()
                self._open()
            if self._size and self._size + len(data) > self._max_bytes:
                self._turn_over()
            self._append(data)
        except OSError as e:
            self.failed += len(piece)
            if not self._failing:
                log.error("%s: %s; decisions go on and their records are lost", self._path, e.strerror or e)
            self._failing = True
        else:
            self.written += len(piece)
            if self._failing:
                log.warning("%s: written again; %d records were lost", self._path, self.failed)
            self._failing = False
        finally:
            self._taken += len(data)

    def _append(self, data: bytes) -> None:
        """All of `data` or none of it: half a line would spoil the next one."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            self._shut()
            raise
        self._size += len(data)

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(self._path, flags, MODE)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{self._path} is not a regular file")
            os.fchmod(file, MODE)
            size = found.st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # whoever wrote last was killed at it
                size += os.write(file, b"\n")
        except OSError:
            os.close(file)
            raise
        self._file, self._size = file, size

    def _shut(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _moved(self) -> bool:
        """Whether somebody took the file away from under its name."""
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return True

    def _turn_over(self) -> None:
        self._shut()
        for number in range(self._keep, 0, -1):
            older = self._numbered(number - 1) if number > 1 else self._path
            with suppress(FileNotFoundError):
                older.replace(self._numbered(number))
        if not self._keep:
            self._path.unlink(missing_ok=True)
        self._open()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
