"""The progress line of long commands."""

from __future__ import annotations

import io
import time

from ext_authz.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_one_line_on_a_terminal_and_nothing_elsewhere() -> None:
    """The line is erased at the end."""
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with Progress("replaying", stream) as progress:
            for done in range(100):
                progress(done, 100)
            time.sleep(0.11)
            progress(100, 100)
    assert file.getvalue() == ""
    assert "\n" not in terminal.getvalue()
    assert f"[{'#' * 30}] 100%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
