"""A file that somebody else replaces: read whole, and read again when it may have changed."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from watchfiles import Change, awatch

SETTLE_TIME = 0.02  # seconds a file must hold still before it is believed
MAX_BYTES = 16 * 1024 * 1024  # that are read; who reads them has a lower limit
POLL_INTERVAL = 5.0  # seconds between looks at the file, should a notification be lost


class WatchedFile:
    """The file at `path`, and its bytes when they were last read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: bytes | None = None

    async def read(self) -> bytes | None:
        """The bytes once they hold still, None if they are those of the last time; OSError if it cannot be read."""
        before, self._seen = self._seen, None  # what comes after an error is news, even if it is what was there before
        text = await asyncio.to_thread(_read, self.path)
        if text != before:
            # Half a file may be a valid policy of another meaning.
            for _ in range(50):
                await asyncio.sleep(SETTLE_TIME)
                again = await asyncio.to_thread(_read, self.path)
                if again == text:
                    break
                text = again
        self._seen = text
        return None if text == before else text

    async def changes(self) -> AsyncIterator[None]:
        """Comes round whenever the file may have changed, without end."""
        while True:
            # The folder, not the file: a ConfigMap swaps a symlink and editors rename, and neither shows in the file.
            events = awatch(
                self.path.parent, watch_filter=self._concerns, debounce=50, step=50, recursive=False,
                rust_timeout=int(POLL_INTERVAL * 1000), yield_on_timeout=True,
            )  # fmt: skip
            with suppress(FileNotFoundError):
                async for _ in events:
                    yield
            await asyncio.sleep(POLL_INTERVAL)  # the folder is not there
            yield

    def _concerns(self, _: Change, path: str) -> bool:
        """Whether a change in the folder may be one of the file: its own name, or a ConfigMap's `..data`."""
        name = Path(path).name
        return name == self.path.name or name.startswith("..")


def _read(path: Path) -> bytes:
    """The start of a regular file. Anything else is an OSError: a FIFO would hold its thread, and the end, for ever."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is not a regular file")
        return file.read(MAX_BYTES)
