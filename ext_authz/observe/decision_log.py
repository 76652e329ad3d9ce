"""The decision log: JSON lines in a file that is rotated by size. Adding a line does no I/O on the event loop.

A thread collects the lines and writes them. A decision never waits for its record: lines that the thread cannot keep
up with, or cannot write, are lost and counted.
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
WRITE_SIZE = 256 * 1024  # bytes per write, at most
WRITE_INTERVAL = 0.05  # seconds that lines collect before they are written
CLOSE_TIMEOUT = 5.0  # seconds to write the last lines
MODE = 0o600

log = logging.getLogger("srp.decision_log")


class DecisionLog:
    """Appends to `path`. Before a file exceeds `max_bytes`, it becomes `path.1`, `path.1` becomes `path.2`, and so on.

    It keeps `keep` old files. Counts of lines: `written`, `dropped` (too many pending), `failed` (could not be
    written).
    """

    def __init__(self, path: Path, max_bytes: int, keep: int) -> None:
        self.written = self.dropped = self.failed = 0
        self._path = path
        self._max_bytes = max_bytes
        self._keep = keep
        self._file = -1
        self._size = 0
        self._failing = False
        # One thread adds lines and one takes them. Each owns one of the two byte counts, so they need no lock.
        self._lines: deque[bytes] = deque()
        self._added = self._taken = 0
        self._pending = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)

    @property
    def counts(self) -> dict[str, int]:
        """Lines so far, by outcome."""
        return {"written": self.written, "dropped": self.dropped, "failed": self.failed}

    def start(self) -> None:
        """Open the file and start the thread. OSError if the file cannot be opened."""
        self._open()
        self._thread.start()

    def add(self, line: bytes) -> None:
        """Queue `line` to be written, or drop it if over MAX_PENDING bytes would be pending."""
        if self._added - self._taken + len(line) > MAX_PENDING:
            self.dropped += 1
            return
        self._lines.append(line)
        self._added += len(line)
        if not self._pending.is_set():
            self._pending.set()

    def close(self) -> None:
        """Write the pending lines and stop. Lines not written within CLOSE_TIMEOUT seconds are lost."""
        self._closing.set()
        self._pending.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._pending.wait()
            self._closing.wait(WRITE_INTERVAL)
            self._pending.clear()
            self._write_all()
        self._write_all()
        self._close_file()

    def _write_all(self) -> None:
        """Write all pending lines, in chunks that fit into the rest of the file."""
        while self._lines:
            chunk: list[bytes] = []
            room = min(WRITE_SIZE, self._max_bytes - self._size)
            while self._lines and (not chunk or len(self._lines[0]) <= room):
                chunk.append(self._lines.popleft())
                room -= len(chunk[-1])
            self._write(chunk)

    def _write(self, chunk: list[bytes]) -> None:
        data = b"".join(chunk)
        try:
            if self._file < 0 or self._replaced():
                self._close_file()
                self._open()
            if self._size and self._size + len(data) > self._max_bytes:
                self._rotate()
            self._append(data)
        except OSError as e:
            self.failed += len(chunk)
            if not self._failing:
                log.error("%s: %s; decisions continue, their records are lost", self._path, e.strerror or e)
            self._failing = True
        else:
            self.written += len(chunk)
            if self._failing:
                log.warning("%s: writing works again; %d records were lost", self._path, self.failed)
            self._failing = False
        finally:
            self._taken += len(data)

    def _append(self, data: bytes) -> None:
        """Append all of `data` or none of it: a partial line would corrupt the next one."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            self._close_file()
            raise
        self._size += len(data)

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        file = os.open(self._path, flags, MODE)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{self._path} is not a regular file")
            os.fchmod(file, MODE)
            size = status.st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # the last writer was killed within a line
                size += os.write(file, b"\n")
        except OSError:
            os.close(file)
            raise
        self._file, self._size = file, size

    def _close_file(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _replaced(self) -> bool:
        """Whether another process has moved, removed or replaced the file."""
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return True

    def _rotate(self) -> None:
        self._close_file()
        for number in range(self._keep, 0, -1):
            older = self._numbered(number - 1) if number > 1 else self._path
            with suppress(FileNotFoundError):
                older.replace(self._numbered(number))
        if not self._keep:
            self._path.unlink(missing_ok=True)
        self._open()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
