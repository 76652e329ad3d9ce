"""A one-line progress bar for long commands. It is drawn only on a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self, TextIO

WIDTH = 30  # characters of the bar
INTERVAL = 0.1  # seconds between redraws, at least


class Progress:
    """Call it with the amount done and the total. It erases the line at the end of the `with` block."""

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._stream = stream if stream.isatty() else None
        self._drawn = 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._stream is None or now - self._drawn < INTERVAL:
            return
        self._drawn = now
        share = min(1.0, done / total) if total else 1.0
        self._stream.write(f"\r{self._what} [{'#' * round(share * WIDTH):<{WIDTH}}] {share:4.0%}")
        self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._stream is not None and self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
