"""A file that other programs replace: read whole, and read again when it may have changed."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from watchfiles import Change, awatch

SETTLE_TIME = 0.02  # seconds that a file must stay unchanged before it is used
MAX_BYTES = 16 * 1024 * 1024  # that are read; the parsers have lower limits
POLL_INTERVAL = 5.0  # seconds between checks of the file, in case a notification is lost


class WatchedFile:
    """The file at `path`, and its bytes as they were last read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: bytes | None = None

    async def read(self) -> bytes | None:
        """The bytes, once they stop changing; None if they are the same as last time. OSError if it cannot be read."""
        before, self._seen = self._seen, None  # after an error, even unchanged bytes are reported
        text = await asyncio.to_thread(_read, self.path)
        if text != before:
            # Half a file may be a valid policy with another meaning.
            for _ in range(50):
                await asyncio.sleep(SETTLE_TIME)
                again = await asyncio.to_thread(_read, self.path)
                if again == text:
                    break
                text = again
        self._seen = text
        return None if text == before else text

    async def changes(self) -> AsyncIterator[None]:
        """Yields whenever the file may have changed, without end."""
        while True:
            # The folder, not the file: ConfigMaps swap a symlink and editors rename, which a watch on a file misses.
            events = awatch(
                self.path.parent, watch_filter=self._concerns, debounce=50, step=50, recursive=False,
                rust_timeout=int(POLL_INTERVAL * 1000), yield_on_timeout=True,
            )  # fmt: skip
            with suppress(OSError, RuntimeError):
                async for _ in events:
                    yield
            await asyncio.sleep(POLL_INTERVAL)  # the folder does not exist, or the system has no watch left
            yield

    def _concerns(self, _: Change, path: str) -> bool:
        """Whether a change in the folder may affect the file: its own name, or a ConfigMap's `..data`."""
        name = Path(path).name
        return name == self.path.name or name.startswith("..")


def _read(path: Path) -> bytes:
    """The start of a regular file. OSError for anything else: a FIFO would block its thread, and shutdown, forever."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        return file.read(MAX_BYTES)
