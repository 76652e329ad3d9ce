"""A watched file, and what may take its place."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from ext_authz.sources.watched import WatchedFile


def test_a_fifo_is_an_error_until_a_file_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("a")
    file = WatchedFile(path)

    async def play() -> None:
        assert await file.read() == b"a"
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(OSError, match="not a regular file"):
            await asyncio.wait_for(file.read(), 5)
        path.unlink()
        path.write_text("b")
        assert await file.read() == b"b"

    asyncio.run(play())
