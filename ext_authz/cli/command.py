"""What defines a command of `srp`: its name, its flags and its function."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

OK, FAILED, USAGE = 0, 1, 2  # exit statuses


class Mistake(Exception):
    """A user error, as a message for the user. The process exits with `code`."""

    def __init__(self, text: str, code: int = FAILED) -> None:
        super().__init__(text)
        self.code = code


class Command(NamedTuple):
    """A command. `run` returns the exit status; `flags` adds the command's arguments to its parser."""

    name: str
    text: str
    run: Callable[[argparse.Namespace], int]
    flags: Callable[[argparse.ArgumentParser], None] = lambda _: None


def pair(text: str, flag: str) -> tuple[str, str]:
    """The two parts of `NAME=VALUE`. Mistake if it has another form."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise Mistake(f"{flag}: expected NAME=VALUE, found `{text}`", USAGE)
    return name, value
